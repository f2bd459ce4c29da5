"""The questions that `fedtide audit noise` asks of a run's witnesses, and their answers.

The level is shared equally by the questions, and within each by what it is asked of (Bonferroni): releases, sites,
pairs of releases.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from simulations.audit import noise_statistics as test
from simulations.audit.evidence import Check
from simulations.audit.noise_draws import how_drawn
from simulations.audit.witnesses import WHOLE, Release, by_site

QUESTIONS = (
    "level",
    "level-by-site",
    "level-of-all",
    "drift",
    "shape",
    "outlier",
    "tails",
    "repeat",
    "places",
    "shared",
    "sizes",
    "rest",
)
"""What is asked. Each gets an equal part of the level."""

SURE = ("grid",)
"""What is asked besides, and never alarms falsely."""


def judge(
    releases: Sequence[Release],
    *,
    level: float,
    on_asked: Callable[[int, int], None] = lambda done, of: None,
) -> list[Check]:
    """Asks every question.

    Args:
        releases: in the order of rounds; at least one.
        level: of false alarms, of all questions together.
        on_asked: told how many of how many groups of questions are asked.
    """
    share, sites = level / len(QUESTIONS), by_site(releases)
    groups: tuple[Callable[[], Iterable[Check]], ...] = (
        lambda: _levels(sites, len(releases), share),
        lambda: _shapes(sites, share),
        lambda: _repeats(sites, share),
        lambda: _shared(sites, share),
        lambda: _rest(sites, share),
        lambda: how_drawn(sites, share),
    )
    checks: list[Check] = []
    for number, ask in enumerate(groups, 1):
        checks += ask()
        on_asked(number, len(groups))
    order = {name: place for place, name in enumerate((*QUESTIONS, *SURE))}
    return sorted(checks, key=lambda check: order[check.name])


def _levels(sites: Mapping[str, list[Release]], releases: int, share: float) -> list[Check]:
    checks = []
    for site, own in sites.items():
        low, high = test.level_limits(own[0].z.size, share / releases)
        worst = max(own, key=lambda each: abs(math.log(max(test.ratio(each.z), 1e-9))))
        odd = [each for each in own if test.level_probability(each.z) < share / releases]
        said = (
            f"{len(odd)} of {len(own)} releases have another noise level than claimed; the furthest is round "
            f"{worst.round} with {test.ratio(worst.z):.3f} of it"
            if odd
            else f"the noise of each of {len(own)} releases is as claimed; the furthest is round {worst.round} with "
            f"{test.ratio(worst.z):.3f} of it"
        )
        within = f"{low:.3f} to {high:.3f}"
        checks.append(Check("level", site, test.ratio(worst.z), within, not odd, said))
        checks += [_pooled("level-by-site", site, own, share / len(sites)), _drift(site, own, share, sites)]
    everything = [each for own in sites.values() for each in own]
    return [*checks, _pooled("level-of-all", "all sites", everything, share)]


def _pooled(name: str, subject: str, releases: Sequence[Release], probability: float) -> Check:
    z = np.concatenate([each.z for each in releases])
    low, high = test.level_limits(z.size, probability)
    holds = test.level_probability(z) >= probability
    found = test.ratio(z)
    word = "as claimed" if holds else "not what is claimed" if found < 1 else "more than is claimed"
    said = f"over {len(releases)} releases the noise is {word}: {found:.4f} of it"
    return Check(name, subject, found, f"{low:.4f} to {high:.4f}", holds, said)


def _drift(site: str, own: Sequence[Release], share: float, sites: Mapping[str, object]) -> Check:
    limit = drift_limit(len(sites), share)
    evidence = drift_of(own)
    holds = bool((evidence <= limit).all())
    said = (
        "no sign that the noise changed in the course of the rounds"
        if holds
        else "the noise is not what is claimed since about or before round "
        f"{own[int(np.argmax(evidence > limit))].round}, where the evidence crossed the limit"
    )
    return Check("drift", site, float(evidence.max()), f"at most {limit:.3g}", holds, said)


def drift_limit(sites: int, share: float) -> float:
    """What the evidence of drift in either direction, at any of so many sites, exceeds with this probability."""
    return 2 * sites / share


def drift_of(own: Sequence[Release]) -> test.Array:
    """[rounds] evidence of drift at one site, in the direction that has more."""
    rounds = [each.z for each in own]
    evidence: test.Array = np.maximum(
        test.drift_evidence(rounds, test.DRIFT), test.drift_evidence(rounds, 1 / test.DRIFT)
    )
    return evidence


def _shapes(sites: Mapping[str, list[Release]], share: float) -> list[Check]:
    checks = []
    for site, own in sites.items():
        z, probability = np.concatenate([each.z for each in own]), share / len(sites)
        distance, found = test.shape_probability(z)
        said = (
            "the noise is Gaussian"
            if found >= probability
            else "the noise is not the Gaussian that is claimed"
        )
        bound = f"at most {test.shape_limit(z.size, probability):.4f}"
        checks.append(Check("shape", site, distance, bound, found >= probability, said))
        largest = float(np.abs(z).max())
        holds = test.outlier_probability(largest, z.size) >= probability
        where = max(own, key=lambda each: float(np.abs(each.z).max())).round
        said = (
            "no place of a witness stands out"
            if holds
            else f"in round {where} a place of the witness holds what no noise makes: something else was written there"
        )
        bound = f"at most {test.outlier_limit(z.size, probability):.2f}"
        checks.append(Check("outlier", site, largest, bound, holds, said))
    return checks


def _repeats(sites: Mapping[str, list[Release]], share: float) -> list[Check]:
    total = sum(len(own) for own in sites.values())
    pairs, checks = total * (total - 1) // 2, []
    for site, own in sites.items():
        found = test.most_alike(np.stack([each.z for each in own]))
        if found is not None:
            places = (f"round {own[found.first].round}", f"round {own[found.second].round}")
            checks.append(_repeat(site, found, places, own[0].z.size, share / pairs))
    found, everything = between(sites)
    if found is not None:
        first, second = everything[found.first], everything[found.second]
        places = (f"{first.site}, round {first.round}", f"{second.site}, round {second.round}")
        checks.append(_repeat("between sites", found, places, first.z.size, share / pairs))
    return checks


def between(sites: Mapping[str, Sequence[Release]]) -> tuple[test.Pair | None, list[Release]]:
    """The most alike releases of different sites, and the list that the pair's places are of."""
    everything = [each for own in sites.values() for each in own]
    if len(sites) < 2:
        return None, everything
    groups = [place for place, own in enumerate(sites.values()) for _ in own]
    return test.most_alike(np.stack([each.z for each in everything]), groups), everything


def _repeat(
    subject: str, pair: test.Pair, places: tuple[str, str], numbers: int, probability: float
) -> Check:
    holds = test.correlation_probability(pair.correlation, numbers) >= probability
    said = (
        "no two releases have noise in common"
        if holds
        else f"{places[0]} and {places[1]} have noise in common (correlation {pair.correlation:.2f}): a seed or a "
        "generator's state was used twice"
    )
    bound = f"at most {test.correlation_limit(numbers, probability):.3f}"
    return Check("repeat", subject, abs(pair.correlation), bound, holds, said)


def _shared(sites: Mapping[str, list[Release]], share: float) -> list[Check]:
    """Noise that adds up over a site's rounds or over a round's sites, though no pair may show it."""
    groups = {site: own for site, own in sites.items() if len(own) > 1}
    rounds: dict[int, list[Release]] = defaultdict(list)
    for own in sites.values():
        for each in own:
            rounds[each.round].append(each)
    across = {f"round {number}": each for number, each in sorted(rounds.items()) if len(each) > 1}
    probability = share / max(len(groups) + len(across), 1)
    checks = [_adds_up(site, {site: own}, "rounds", probability) for site, own in groups.items()]
    return [*checks, _adds_up("between sites", across, "sites", probability)] if across else checks


def _adds_up(subject: str, groups: Mapping[str, Sequence[Release]], over: str, probability: float) -> Check:
    """One answer for several groups of releases: the furthest of them."""
    found = {name: test.shared_part(np.stack([each.z for each in own])) for name, own in groups.items()}
    odd = [name for name, (_, chance) in found.items() if chance < probability]
    name = min(found, key=lambda each: found[each][1])
    low, high = test.shared_limits(len(groups[name]), groups[name][0].z.size, probability)
    measured = found[name][0]
    where = (
        "" if odd == [subject] else f" ({', '.join(odd[:3])}{f' and {len(odd) - 3} more' if odd[3:] else ''})"
    )
    said = (
        f"the noise of different {over} {'adds up' if measured > 1 else 'cancels'}{where}: it is not drawn anew"
        if odd
        else f"the noise of different {over} is independent"
    )
    return Check("shared", subject, measured, f"{low:.3f} to {high:.3f}", not odd, said)


def _rest(sites: Mapping[str, list[Release]], share: float) -> list[Check]:
    """Whether there can be noise outside the witness, tensor by tensor: without it they would be far too small.

    Exact, with no look at any user: the noise of a release's last step is independent of all that it is added to,
    so a sum of squares is at least as large as that noise alone makes it. Noise that is missing where users add much
    more than noise is not seen.
    """
    asked = sum(len(each.parts()) for own in sites.values() for each in own)
    checks = []
    for site, own in sites.items():
        worst, odd = (math.inf, ""), []
        for each in own:
            for name, (squares, count) in each.parts().items():
                of_a_step = squares * each.steps  # in units of one step's noise
                if test.too_little(of_a_step, count) < share / asked:
                    odd.append(f"{name} in round {each.round}")
                if name == WHOLE:
                    worst = min(worst, (math.sqrt(of_a_step / count), f"round {each.round}"))
        said = (
            f"smaller than their noise alone: {', '.join(odd[:3])}{f' and {len(odd) - 3} more' if odd[3:] else ''}"
            if odd
            else "nothing outside the witness is smaller than noise makes it; the smallest release is that of "
            f"{worst[1]}"
        )
        checks.append(Check("rest", site, worst[0], "one step's noise", not odd, said))
    return checks
