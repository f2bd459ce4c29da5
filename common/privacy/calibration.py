"""The noise for a target: the smallest noise multiplier whose published epsilon keeps a promise.

Figures come from `accountants.py`; nothing here decides what an epsilon is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from common.privacy.accountants import (
    LARGEST_EPSILON,
    check_delta,
    epsilon_pld,
    gaussian_delta,
    quick_bound,
)
from common.privacy.mechanisms import SMALLEST_NOISE_MULTIPLIER, Event, GaussianSum, PoissonSubsampledGaussian

NOISE_STEP = 1e-3
"""Calibrated noise multipliers are rounded up to a multiple of this, so that equal events group."""

_LARGEST_NOISE_MULTIPLIER = 1e6


def calibrate_noise(
    epsilon: float, delta: float, *, sampling_rate: float, steps: int, spent: Sequence[Event] = ()
) -> float:
    """The smallest noise multiplier with which `steps` steps of DP-SGD, and all events spent, fit epsilon.

    Args:
        epsilon: the target, by `epsilon_pld`.
        delta: the delta that it is to hold for.
        sampling_rate: q of the steps to come.
        steps: how many are to come.
        spent: every event that the same users have already paid for.

    Returns:
        The noise multiplier, a multiple of NOISE_STEP, at least SMALLEST_NOISE_MULTIPLIER.

    Raises:
        ValueError: a number out of its bounds, or a target that no noise reaches.
    """
    _check_epsilon(epsilon)
    check_delta(delta)
    PoissonSubsampledGaussian(sampling_rate=sampling_rate, noise_multiplier=1.0, steps=steps)
    spent_epsilon = epsilon_pld(spent, delta)
    if spent_epsilon >= epsilon:
        raise ValueError(
            f"epsilon is {epsilon:g}, but the events already spent come to {spent_epsilon:.4g} at delta "
            f"{delta:g}: raise epsilon above that, or stop here"
        )

    def cost(noise: float) -> float:
        event = PoissonSubsampledGaussian(sampling_rate=sampling_rate, noise_multiplier=noise, steps=steps)
        return epsilon_pld([*spent, event], delta)

    def quick_cost(noise: float) -> float:
        event = PoissonSubsampledGaussian(sampling_rate=sampling_rate, noise_multiplier=noise, steps=steps)
        return quick_bound([*spent, event], delta)

    # By the quick bound, what is spent may exceed the target alone; its excess there is allowed for, or the search
    # would begin at the largest noise, whose distribution takes minutes.
    excess = max(0.0, quick_bound(spent, delta) - spent_epsilon) if spent else 0.0
    enough = _smallest_noise(cost, epsilon, start=_rough_noise(quick_cost, epsilon + excess))
    if enough is None:
        raise ValueError(
            f"epsilon is {epsilon:g}, but {steps} steps at sampling rate {sampling_rate:g} exceed it at "
            f"delta {delta:g} even with noise multiplier {_LARGEST_NOISE_MULTIPLIER:g}: raise epsilon or "
            "delta, or take fewer steps"
        )
    return enough


def calibrate_gaussian(epsilon: float, delta: float) -> float:
    """The smallest noise multiplier of one Gaussian sum within (epsilon, delta) (Balle & Wang 2018).

    Returns:
        The noise multiplier, rounded up to a multiple of NOISE_STEP, at least SMALLEST_NOISE_MULTIPLIER.
        This is by the closed form; the PLD, a bound, may come out above epsilon by up to 1e-3.

    Raises:
        ValueError: `epsilon` not in (0, LARGEST_EPSILON], `delta` not in (0, 1), or no noise reaches them.
    """
    _check_epsilon(epsilon)
    check_delta(delta)
    low, high = (
        round(SMALLEST_NOISE_MULTIPLIER / NOISE_STEP) - 1,
        round(_LARGEST_NOISE_MULTIPLIER / NOISE_STEP),
    )
    if gaussian_delta(high * NOISE_STEP, epsilon) > delta:
        raise ValueError(f"epsilon {epsilon:g} at delta {delta:g} is out of reach of any noise: raise either")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gaussian_delta(middle * NOISE_STEP, epsilon) <= delta else (middle, high)
    return _noise(high)


def calibrate_sum(epsilon: float, delta: float) -> float:
    """The noise multiplier of one Gaussian sum that takes the whole promise, by the published accountant.

    Returns:
        The noise multiplier, a multiple of NOISE_STEP: that of the closed form, or the next that the PLD, a bound
        slightly above it, lets pass.

    Raises:
        ValueError: as `calibrate_gaussian`.
    """
    start = round(calibrate_gaussian(epsilon, delta) / NOISE_STEP)
    enough = _smallest_noise(lambda noise: epsilon_pld([GaussianSum(noise)], delta), epsilon, start=start)
    if enough is None:
        raise ValueError(f"epsilon {epsilon:g} at delta {delta:g} is out of reach of any noise: raise either")
    return max(_noise(start), enough)


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon <= LARGEST_EPSILON:
        raise ValueError(
            f"epsilon is {epsilon}, but must lie in (0, {LARGEST_EPSILON:g}]: choose a target such as 8, or "
            "train without privacy and say so"
        )


def _noise(steps_of_noise: int) -> float:
    return round(steps_of_noise * NOISE_STEP, 3)


def _rough_noise(cost: Callable[[float], float], epsilon: float) -> int:
    """About the right noise, in multiples of NOISE_STEP, by bisection of a cheap cost."""
    low, high = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(_LARGEST_NOISE_MULTIPLIER)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(math.exp(middle)) <= epsilon else (middle, high)
    return math.ceil(math.exp(high) / NOISE_STEP)


def _smallest_noise(cost: Callable[[float], float], epsilon: float, *, start: int) -> float | None:
    """The smallest multiple of NOISE_STEP whose cost is within epsilon, or None if even the largest is not.

    From `start` the bracket is widened until it holds the answer. Cost falls about as a power of the noise,
    so each further guess lies on the line through the bracket's ends in logarithms, and is followed by a step
    to its other side, which closes the bracket.
    """
    smallest, largest = (
        round(bound / NOISE_STEP) for bound in (SMALLEST_NOISE_MULTIPLIER, _LARGEST_NOISE_MULTIPLIER)
    )
    costs: dict[int, float] = {}

    def fits(point: int) -> bool:
        if point not in costs:
            costs[point] = cost(_noise(point))
        return costs[point] <= epsilon

    high = min(max(start, smallest), largest)
    while not fits(high):
        if high == largest:
            return None
        high = min(math.ceil(high * 1.1), largest)
    low, factor = high, 0.95
    while fits(low):
        if low == smallest:
            return _noise(smallest)
        high, low = low, max(math.floor(low * factor), smallest)
        factor **= 2
    stride = 1
    while high - low > 1:
        guess = _between(low, high, costs[low], costs[high], epsilon)
        low, high = (low, guess) if fits(guess) else (guess, high)
        other_side = guess - stride if guess == high else guess + stride
        if not low < other_side < high:  # where cost is a staircase, guesses would creep along one step of it
            other_side = (low + high) // 2
        if low < other_side < high:
            low, high = (low, other_side) if fits(other_side) else (other_side, high)
        stride *= 2
    return _noise(high)


def _between(low: int, high: int, cost_low: float, cost_high: float, epsilon: float) -> int:
    """A point strictly between `low` and `high`, by interpolation in logarithms where that is possible."""
    if math.isfinite(cost_low) and cost_high > 0:
        share = math.log(cost_low / epsilon) / math.log(cost_low / cost_high)
        guess = math.exp(math.log(low) + share * math.log(high / low))
    else:
        guess = math.sqrt(low * high)
    return min(max(math.ceil(guess), low + 1), high - 1)
