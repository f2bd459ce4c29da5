"""Is the noise there, as wide as stated, normal, and drawn anew each time? Seen in updates, with the real generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from common.privacy.noise import INFLATION
from common.privacy.statistics import noise_chi_square
from simulations.audit.conformance.checking import (
    LEVEL,
    Vector,
    corrected,
    statistical,
)
from simulations.audit.conformance.code import Code, Everyone
from simulations.audit.conformance.forks import in_fork
from simulations.audit.conformance.subjects import Subject, in_steps, one_step, some_users
from simulations.audit.evidence import Check

STEPS, SIGMA = 3, 1.7


def residuals(
    subject: Subject, code: Code, rows: Sequence[Sequence[int]], rounds: int, steps: int = STEPS
) -> Vector:
    """[rounds, coordinates] what rounds on these users release, in units of the noise that is claimed."""
    settings = one_step(0.4, noise_multiplier=SIGMA, steps=steps)
    wide = SIGMA * math.sqrt(steps) * (1 + INFLATION)
    released = []
    for _ in range(rounds):
        update = code.trainer(
            subject.rewound(), subject.batch(rows), settings, sampler=Everyone(), noise=code.noise()
        )
        released.append(in_steps({name: update[name] for name in subject.start}, settings) / wide)
    return np.stack(released)


def noise_checks(subject: Subject, code: Code, rounds: int) -> list[Check]:
    """`noise level`, `noise with users`, `every coordinate`, `normal`, `new noise`.

    Args:
        rounds: of a site with nobody in it; the more, the less may be missing unseen.
    """
    empty = residuals(subject, code, [], rounds)
    # One step of everyone, twice: what differs is noise. (Later steps would differ by more.)
    users = some_users(5, subject.items)
    twice = residuals(subject, code, users, 2 * max(2, rounds // 2), steps=1)
    differences = (twice[0::2] - twice[1::2]) / math.sqrt(2)
    return [
        level("noise level", subject, empty, "of a site with nobody in it"),
        level("noise with users", subject, differences, "of two rounds on the same users"),
        _everywhere(subject, twice),
        _normal(subject, empty),
        fresh("new noise", subject.name, list(empty), "rounds"),
    ]


def level(name: str, subject: Subject, found: Vector, where: str) -> Check:
    """Is the noise as wide as stated, over all and in each parameter alone?"""
    sizes = [subject.start[each].numel() for each in sorted(subject.start)]
    parts = np.split(found, np.cumsum(sizes)[:-1], axis=1)
    p = corrected([noise_chi_square(found, 1.0), *(noise_chi_square(part, 1.0) for part in parts)])
    ratio = float(np.sqrt(np.mean(np.square(found))))
    low, high = detectable(found.size, 1 + len(parts))
    return statistical(
        name,
        subject.name,
        ratio,
        p,
        "1: as wide as stated",
        f"The noise {where} is {ratio:.4f} times as wide as stated; {low:.3f} or {high:.3f} would be refused.",
    )


def detectable(coordinates: int, comparisons: int) -> tuple[float, float]:
    """Widths found, relative to the stated one, beyond which so many coordinates are refused for sure."""
    from scipy.stats import chi2

    tail = LEVEL / 2 / comparisons
    low, high = chi2.ppf(tail, coordinates), chi2.isf(tail, coordinates)
    return float(math.sqrt(low / coordinates)), float(math.sqrt(high / coordinates))


def _everywhere(subject: Subject, found: Vector) -> Check:
    """Two coordinates of noise are equal once in a million: four times the same, and it is no noise."""
    constant = int((found == found[0]).all(axis=0).sum())
    return Check(
        "every coordinate",
        subject.name,
        float(constant),
        "0 coordinates",
        constant == 0,
        f"{constant} of {found.shape[1]} coordinates are the same in {len(found)} rounds on the same users.",
    )


def _normal(subject: Subject, found: Vector) -> Check:
    """Kolmogorov and Smirnov's distance from the normal distribution that is claimed."""
    from scipy.stats import kstest

    distance, p = kstest(found.ravel(), "norm")
    return statistical(
        "normal",
        subject.name,
        float(distance),
        float(p),
        "0: normal",
        f"The noise's distribution is {distance:.4f} from the normal one at most.",
    )


def fresh(name: str, subject: str, draws: Sequence[Vector], of: str) -> Check:
    """Are all draws independent of each other? Correlation of each pair."""
    found = {
        (first, second): _correlation(draws[first], draws[second])
        for first, second in combinations(range(len(draws)), 2)
    }
    worst = max(found.values(), key=abs)
    coordinates = draws[0].size
    p = corrected([_chance(value, coordinates) for value in found.values()])
    return statistical(
        name,
        subject,
        worst,
        p,
        "0: no correlation",
        f"The noise of {len(draws)} {of} correlates by {worst:+.3f} at most, each with each.",
    )


def _correlation(one: Vector, other: Vector) -> float:
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else 1.0


def _chance(correlation: float, coordinates: int) -> float:
    """The two-sided p-value of a correlation about a mean that is known to be 0 (Student's t, exact for normals)."""
    from scipy.stats import t

    left = max(1 - correlation * correlation, 1e-300)
    freedom = coordinates - 1
    return float(min(1.0, 2 * t.sf(abs(correlation) * math.sqrt(freedom / left), freedom)))


def forked_noise(subject: Subject, code: Code) -> list[Check]:
    """Two copies of one process, as of a snapshot restored twice: a generator kept in memory would repeat itself."""
    settings = one_step(0.4, noise_multiplier=SIGMA)

    def one_round() -> Vector:
        update = code.trainer(
            subject.rewound(), subject.batch([]), settings, sampler=Everyone(), noise=code.noise()
        )
        return in_steps({name: update[name] for name in subject.start}, settings) / SIGMA

    return [
        fresh("forked noise", subject.name, [in_fork(one_round) for _ in range(2)], "copies of a process")
    ]
