"""What guesses about canaries say of epsilon: one-run audits, and intervals for attack rates.

Each of `canaries` was included by a fair coin of its own; an auditor who sees the release guesses for some of them
whether it was. Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846) bound how often guesses can be right under (epsilon,
delta)-DP; Mahloujifar, Melis & Chaudhuri 2024 (arXiv 2410.22235) do it for a whole trade-off curve, and so see more.
Neither assumes anything of the mechanism or of independent scores; both hold for a number of guesses fixed before
the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import beta as beta_distribution
from scipy.stats import binom

from common.privacy.accountants import epsilon_pld, privacy_profile
from common.privacy.mechanisms import SMALLEST_NOISE_MULTIPLIER, PoissonSubsampledGaussian

Floats = npt.NDArray[np.float64]
Curve = Callable[[Floats], Floats]
"""From the chance of an outcome with a user to the least chance of it without: f-DP's inverse blow-up."""

LARGEST_EPSILON = 60.0
"""Where searches end: no number of canaries in use here certifies as much."""


@dataclass(frozen=True, slots=True)
class Guesses:
    """How an auditor fared.

    Attributes:
        canaries: how many fair coins were thrown.
        made: guesses, a number fixed before the run.
        right: how many of them were.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries or self.canaries < 1:
            raise ValueError(
                f"{self.right} of {self.made} guesses right over {self.canaries} canaries is impossible: give "
                "0 <= right <= made <= canaries, and at least one canary"
            )


def guess_extremes(scores: Floats, included: npt.NDArray[np.bool_], each: int) -> Guesses:
    """Guesses "in" for the `each` highest scores and "out" for the `each` lowest.

    Raises:
        ValueError: `each` is not in [1, canaries / 2].
    """
    if not 1 <= each <= len(scores) // 2:
        raise ValueError(
            f"guesses is {each} on each side, but must lie in [1, {len(scores) // 2}]: half the canaries at most"
        )
    order = np.argsort(scores, kind="stable")
    right = included[order[-each:]].sum() + (~included[order[:each]]).sum()
    return Guesses(len(scores), 2 * each, int(right))


# (epsilon, delta): Steinke et al.


def steinke_p(guesses: Guesses, epsilon: float, delta: float) -> float:
    """The chance, at most, of so many right guesses under (epsilon, delta)-DP (theorem 5.2 there).

    beta + 2 m delta alpha, with beta = P[B >= v], alpha = max_i P[v > B >= v - i] / i and B binomial over the
    guesses with chance e^epsilon / (1 + e^epsilon).
    """
    made, right = guesses.made, guesses.right
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, made, chance))
    if right == 0 or delta == 0:
        return min(1.0, beta)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), made, chance))
    alpha = float((below / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2 * guesses.canaries * delta * alpha)


def steinke_bound(guesses: Guesses, delta: float, level: float) -> float:
    """Epsilon is at least this, but for a chance of `level` to be wrong; 0 where nothing can be said."""
    return _crossing(lambda epsilon: steinke_p(guesses, epsilon, delta) <= level)


def _crossing(refuted: Callable[[float], bool]) -> float:
    """The largest epsilon that is refuted, to 1e-6; everything below it is refuted too."""
    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
        if low >= LARGEST_EPSILON:
            return LARGEST_EPSILON
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


# f-DP: Mahloujifar et al.


def gaussian_curve(mu: float) -> Curve:
    """Of a Gaussian sum whose noise is 1 / mu of what one user can move it by."""
    return lambda chance: ndtr(ndtri(chance) - mu)


def curve_of(epsilons: Floats, deltas: Floats) -> Curve:
    """Of a mechanism that is (epsilon, delta(epsilon))-DP at each of these epsilons, add and remove alike.

    The outcome's chances x without and y with the user obey y <= e^epsilon x + delta and, the other way round,
    1 - x <= e^epsilon (1 - y) + delta; so x is at least the largest of these lines in y.
    """
    grown = np.exp(epsilons)
    slopes = np.concatenate([1 / grown, grown])
    offsets = np.concatenate([-deltas / grown, 1 - deltas - grown])

    def least(chance: Floats) -> Floats:
        lines = np.multiply.outer(np.asarray(chance, dtype=np.float64), slopes) + offsets
        found: Floats = lines.max(axis=-1).clip(0.0)
        return found

    return least


def sampled_curve(sampling_rate: float, noise_multiplier: float, steps: int) -> Curve:
    """Of DP-SGD's Poisson-sampled Gaussian sums, by the PLD: from above, so that it refutes no more than it may."""
    epsilons = np.concatenate([np.arange(0, 3, 0.05), np.arange(3, 10, 0.25), np.arange(10, 30)])
    event = PoissonSubsampledGaussian(sampling_rate, noise_multiplier, steps)
    return curve_of(epsilons, np.array(privacy_profile([event], epsilons.tolist())))


def f_dp_refuted(guesses: Guesses, curve: Curve, level: float) -> bool:
    """Whether so many right guesses have a chance of at most `level` under the curve (algorithm 3 there).

    From the last count downwards, `right_mass` and `wrong_mass` are the least that counts from there on must add to
    the means of right and wrong guesses if the tail had more than `level`; together they cannot exceed the guesses.
    """
    made, right, canaries = guesses.made, guesses.right, guesses.canaries
    if made == 0:
        return False
    right_mass = np.array(level * right / canaries)
    wrong_mass = np.array(level * (made - right) / canaries)
    for count in range(right - 1, -1, -1):
        more = np.maximum(wrong_mass, curve(np.minimum(right_mass, 1.0)))
        right_mass = right_mass + count / (made - count) * (more - wrong_mass)
        wrong_mass = more
        if right_mass + wrong_mass > made / canaries:
            return True
    return bool(right_mass + wrong_mass > made / canaries)


def f_dp_p(guesses: Guesses, curve: Curve) -> float:
    """The smallest level at which the curve is refuted, to a factor of 1.001; 1 where none does."""
    low, high = 1e-12, 1.0
    if not f_dp_refuted(guesses, curve, high):
        return 1.0
    if f_dp_refuted(guesses, curve, low):
        return low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if f_dp_refuted(guesses, curve, middle) else (middle, high)
    return high


def f_dp_bound_gaussian(guesses: Guesses, delta: float, level: float) -> float:
    """Epsilon at `delta` is at least this if the mechanism is Gaussian: the first mu that is not refuted."""
    mu = _crossing(lambda mu: f_dp_refuted(guesses, gaussian_curve(mu), level))
    return gaussian_epsilon(mu, delta)


def f_dp_bound_sampled(
    guesses: Guesses, sampling_rate: float, noise_multiplier: float, steps: int, delta: float, level: float
) -> float:
    """Epsilon at `delta` is at least this if the mechanism is DP-SGD at this rate and some noise.

    Args:
        noise_multiplier: the claimed one, where the search begins.
    """
    if sampling_rate == 1:
        return f_dp_bound_gaussian(guesses, delta, level)

    def refuted(noise: float) -> bool:
        return f_dp_refuted(guesses, sampled_curve(sampling_rate, noise, steps), level)

    # The least noise that is refuted lies between `low`, which stands, and `high`.
    low = high = noise_multiplier
    while not refuted(high):
        low, high = high, high * 1.5
        if high > 20 * noise_multiplier:
            return 0.0
    while low == high or refuted(low):
        if low == SMALLEST_NOISE_MULTIPLIER:
            break
        low, high = max(low / 1.5, SMALLEST_NOISE_MULTIPLIER), low
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return epsilon_pld([PoissonSubsampledGaussian(sampling_rate, high, steps)], delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """epsilon(delta) of a Gaussian sum (Balle & Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        above, below = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return float(np.exp(above) * -np.expm1(min(0.0, below - above))) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    upper = 1.0
    while excess(upper) > 0:
        upper *= 2
    return float(brentq(excess, 0.0, upper, xtol=1e-9))


# Intervals


def clopper_pearson(successes: int, trials: int, level: float = 0.05) -> tuple[float, float]:
    """An interval that holds a chance with 1 - level at least (Clopper & Pearson 1934)."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is impossible: give 0 <= successes <= trials, and a trial")
    low = 0.0 if successes == 0 else beta_distribution.ppf(level / 2, successes, trials - successes + 1)
    high = (
        1.0
        if successes == trials
        else beta_distribution.ppf(1 - level / 2, successes + 1, trials - successes)
    )
    return float(low), float(high)
