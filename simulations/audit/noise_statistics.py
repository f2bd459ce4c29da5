"""Whether numbers that should be independent standard normals are: exact tests of level, shape and repetition.

Each function gives a probability that holds for honest noise; `noise.py` shares the level of false alarms among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]

DRIFT = 0.9
"""The drift chart is made to catch noise of this factor of the claimed, or of its inverse."""

_ROWS_AT_ONCE = 512
_MOST_SHARED = 1e12  # told of vectors that are all the same: JSON knows no infinity


def ratio(z: Array) -> float:
    """Empirical over claimed standard deviation."""
    return float(np.sqrt(np.mean(np.square(z))))


def level_probability(z: Array) -> float:
    """Two-sided: the sum of squares is chi-square with as many degrees as there are numbers."""
    total = float(np.square(z).sum())
    return min(1.0, 2 * float(min(stats.chi2.cdf(total, z.size), stats.chi2.sf(total, z.size))))


def level_limits(count: int, probability: float) -> tuple[float, float]:
    """Ratios outside which `level_probability` of so many numbers is below `probability`."""
    low, high = stats.chi2.ppf(probability / 2, count), stats.chi2.isf(probability / 2, count)
    return math.sqrt(low / count), math.sqrt(high / count)


def control_limits(count: int) -> tuple[float, float]:
    """Three standard deviations of the ratio around 1: lines of a control chart, outside which 1 in 370 lies."""
    width = 3 / math.sqrt(2 * count)
    return 1 - width, 1 + width


def shape_probability(z: Array) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance to the standard normal, and its probability."""
    found = stats.kstest(z, "norm")
    return float(found.statistic), float(found.pvalue)


def shape_limit(count: int, probability: float) -> float:
    """The distance that honest noise exceeds with this probability."""
    return float(stats.kstwo.isf(probability, count))


def outlier_probability(largest: float, count: int) -> float:
    """That the largest of so many standard normals lies further from 0 than this."""
    return float(-np.expm1(count * np.log1p(-2 * stats.norm.sf(largest)))) if largest > 0 else 1.0


def outlier_limit(count: int, probability: float) -> float:
    """How far from 0 the largest of so many lies with this probability."""
    return float(stats.norm.isf(-np.expm1(np.log1p(-probability) / count) / 2))


def drift_evidence(rounds: Sequence[Array], factor: float) -> Array:
    """[rounds] how strongly the rounds so far speak for noise of `factor` since some round, against the claimed.

    Shiryaev-Roberts' sum of likelihood ratios over all rounds in which it may have begun, each equally likely: of
    mean 1 for honest noise at any time, so that it ever exceeds 1 / p with probability p at most (Ville).
    """
    log_sum, evidence = -math.inf, []
    for done, z in enumerate(rounds, start=1):
        squares = float(np.square(z).sum())
        log_ratio = -z.size * math.log(factor) - (factor**-2 - 1) * squares / 2
        log_sum = float(np.logaddexp(log_sum, 0.0)) + log_ratio
        evidence.append((math.exp(min(log_sum, 700.0)) + len(rounds) - done) / len(rounds))
    return np.array(evidence)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two most alike of many vectors: their places, and their correlation."""

    first: int
    second: int
    correlation: float


def most_alike(vectors: Array, groups: Sequence[int] | None = None) -> Pair | None:
    """The pair of largest correlation, of either sign; None where there is no pair.

    Args:
        vectors: [vectors, numbers].
        groups: only pairs of different groups count.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    own = np.arange(len(vectors)) if groups is None else np.asarray(groups)
    best: Pair | None = None
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        rows = unit[start : start + _ROWS_AT_ONCE]
        found = np.abs(rows @ unit.T)
        found[own[start : start + len(rows), None] == own[None, :]] = -1.0
        first, second = np.unravel_index(int(found.argmax()), found.shape)
        if found[first, second] > (-0.5 if best is None else abs(best.correlation)):
            one, other = sorted((start + int(first), int(second)))
            best = Pair(one, other, float(np.clip(unit[one] @ unit[other], -1, 1)))
    return best


def correlation_probability(correlation: float, numbers: int) -> float:
    """That two independent vectors of so many normals correlate as much, with either sign (exact)."""
    if numbers < 2:
        return 1.0
    return float(stats.beta.sf(min(1.0, correlation * correlation), 0.5, (numbers - 1) / 2))


def correlation_limit(numbers: int, probability: float) -> float:
    """The correlation that two independent vectors of so many normals exceed with this probability."""
    return 1.0 if numbers < 2 else math.sqrt(stats.beta.isf(probability, 0.5, (numbers - 1) / 2))


def shared_part(vectors: Array) -> tuple[float, float]:
    """How much vectors add up: F ratio of their mean's square to what is left, and its two-sided probability.

    It is 1 for independent noise of whatever level, above where vectors share a part that is too small to be seen in
    any pair, below where they cancel.
    """
    count, numbers = vectors.shape
    together = float(np.square(vectors.sum(axis=0)).sum()) / count
    left = float(np.square(vectors).sum()) - together
    if left <= 1e-12 * together:
        return (_MOST_SHARED, 0.0) if together > 0 else (1.0, 1.0)
    found = (together / numbers) / (left / (numbers * (count - 1)))
    degrees = (numbers, numbers * (count - 1))
    return found, min(1.0, 2 * float(min(stats.f.cdf(found, *degrees), stats.f.sf(found, *degrees))))


def shared_limits(count: int, numbers: int, probability: float) -> tuple[float, float]:
    """F ratios outside which `shared_part` has a probability below this."""
    degrees = (numbers, numbers * (count - 1))
    return float(stats.f.ppf(probability / 2, *degrees)), float(stats.f.isf(probability / 2, *degrees))


def too_little(squares: float, count: int) -> float:
    """That so many normals, with whatever added that is independent of them, have so small a sum of squares."""
    return float(stats.chi2.cdf(squares, count))


TAILS = (3.0, 3.5, 4.0, 4.5)
"""Standard deviations beyond which the share of numbers is counted."""


def tail_probability(z: Array, beyond: float) -> tuple[float, float]:
    """The share of numbers further from 0 than so many deviations, and its two-sided probability (exact binomial)."""
    chance, found = 2 * float(stats.norm.sf(beyond)), int((np.abs(z) > beyond).sum())
    exact = stats.binom(z.size, chance)
    return found / z.size, min(1.0, 2 * float(min(exact.cdf(found), exact.sf(found - 1))))


def tail_limits(count: int, beyond: float, probability: float) -> tuple[float, float]:
    """Shares outside which `tail_probability` of so many numbers is below `probability`, but for rounding."""
    exact = stats.binom(count, 2 * float(stats.norm.sf(beyond)))
    return float(exact.ppf(probability / 2)) / count, float(exact.isf(probability / 2)) / count


def norms_probability(draws: Sequence[Array] | Array) -> tuple[float, float]:
    """How far the sizes of draws lie from what chance makes them: Kolmogorov and Smirnov's distance, its probability.

    A draw's sum of squares is chi-square with as many degrees as it has numbers, draw by draw.
    """
    sizes = [stats.chi2.cdf(float(np.square(each).sum()), each.size) for each in draws]
    found = stats.kstest(sizes, "uniform")
    return float(found.statistic), float(found.pvalue)
