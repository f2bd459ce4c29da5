"""The promise in plain words, the same on every page: who it does not cover."""

from __future__ import annotations


def not_protected(epsilon: float) -> list[str]:
    """Who or what a promise of this epsilon does not cover."""
    said = [
        "A person who is in the logs of several sites: the epsilons add up, and nobody here can see it.",
        "A person with several accounts at a site: each is protected by itself, unless the site merged them.",
        "A family, a team or any group: for k people together the promise is k times weaker or worse.",
        "Anyone, from what is true of people in general: that is learned, and can be applied to people who never "
        "took part.",
        "Anyone, against the site that holds the log, and against whoever breaks into it.",
        "Users of a site that lies: receipts prove what a site signed, not what it ran.",
    ]
    if epsilon > 1:
        said.append(
            f"Whoever needs a strong guarantee: NIST calls epsilon up to 1 conservative, and {epsilon:g} is more."
        )
    return said


def small(share: float) -> str:
    """A small number as a person reads it: 0.000001, and not 1e-06."""
    return f"{share:.10f}".rstrip("0") if share >= 1e-9 else f"{share:g}"
