"""Tests of hypothesis on the generators: is the noise as wide as stated, is the sampling Poisson?

Each function returns a two-sided p-value and nothing else, so the same statistic serves a unit test, an audit
of a site's pipeline and a check of released updates. They refute; a large p-value proves nothing.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def noise_chi_square(residuals: npt.ArrayLike, sigma: float) -> float:
    """Are the residuals independent normals of mean 0 and standard deviation `sigma`?

    The sum of (residual / sigma)^2 over n residuals is chi-square with n degrees of freedom.

    Args:
        residuals: released minus noiseless values, any shape, in the unit of `sigma`.
        sigma: the standard deviation that is claimed.

    Returns:
        The two-sided p-value: small for too little noise and for too much.

    Raises:
        ValueError: no residuals, a residual that is not finite, or `sigma` not a positive number.
    """
    from scipy.stats import chi2

    values = np.asarray(residuals, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("noise cannot be tested without residuals, or with residuals that are not finite")
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma is {sigma}, but must be a positive number")
    statistic = float(np.sum(np.square(values / sigma)))
    return _two_sided(float(chi2.cdf(statistic, values.size)), float(chi2.sf(statistic, values.size)))


def sampler_dispersion(masks: npt.ArrayLike, rate: float) -> float:
    """Did every user take part in every step independently with probability `rate`?

    Three statistics: the number of users over all steps (binomial; a wrong rate), the spread of the batch
    sizes (batches of fixed size spread too little), and the spread of how often each user took part (shuffled
    epochs spread too little, the same users again and again too much). The spreads are sums of squared
    binomial deviations, whose mean and variance a scaled chi-square matches (Satterthwaite 1946).

    Args:
        masks: bool [steps, users], who took part in which step.
        rate: the sampling rate that is claimed, in (0, 1].

    Returns:
        The two-sided p-value of the three together (Bonferroni).

    Raises:
        ValueError: masks that are not [steps, users] or are empty, or a rate outside (0, 1].
    """
    from scipy.stats import binom

    taken = np.asarray(masks, dtype=np.bool_)
    if taken.ndim != 2 or taken.size == 0:
        raise ValueError(f"masks have shape {taken.shape}, but must be [steps, users] and not empty")
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}, but must lie in (0, 1]")
    if rate == 1:
        return 1.0 if taken.all() else 0.0
    steps, users = taken.shape
    total = int(taken.sum())
    in_total = _two_sided(
        float(binom.cdf(total, taken.size, rate)), float(binom.sf(total - 1, taken.size, rate))
    )
    by_step = _binomial_spread(taken.sum(axis=1), users, rate)
    by_user = _binomial_spread(taken.sum(axis=0), steps, rate)
    return min(1.0, 3 * min(in_total, by_step, by_user))


def _binomial_spread(counts: npt.NDArray[np.int_], trials: int, rate: float) -> float:
    """Two-sided p-value of sum (count - trials rate)^2 for independent Binomial(trials, rate) counts."""
    from scipy.stats import chi2

    variance = trials * rate * (1 - rate)
    statistic = float(np.sum(np.square(counts - trials * rate))) / variance
    # The mean of one term is 1, its variance 2 + the binomial's excess kurtosis.
    scale = 1 + (1 - 6 * rate * (1 - rate)) / (2 * variance)
    freedom = counts.size / scale
    return _two_sided(float(chi2.cdf(statistic / scale, freedom)), float(chi2.sf(statistic / scale, freedom)))


def _two_sided(below: float, above: float) -> float:
    return min(1.0, 2 * min(below, above))
