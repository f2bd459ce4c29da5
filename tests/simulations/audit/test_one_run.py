"""The statistics of canaries: against brute force and against mechanisms whose epsilon is known, honest and lying."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from common.privacy.accountants import epsilon_pld
from common.privacy.calibration import calibrate_gaussian
from common.privacy.mechanisms import PoissonSubsampledGaussian
from simulations.audit.one_run import (
    Floats,
    Guesses,
    clopper_pearson,
    curve_of,
    f_dp_bound_gaussian,
    f_dp_bound_sampled,
    f_dp_p,
    f_dp_refuted,
    gaussian_curve,
    gaussian_epsilon,
    guess_extremes,
    sampled_curve,
    steinke_bound,
    steinke_p,
)

DELTA = 1e-5
steinke = lru_cache(steinke_bound)
f_dp = lru_cache(f_dp_bound_gaussian)


def brute_force_p(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Steinke et al.'s formula as it stands, term by term, with exact binomials."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, j) * q**j * (1 - q) ** (r - j) for j in range(r + 1)]
    beta = sum(mass[v:])
    alpha = max((sum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, beta + 2 * m * delta * alpha)


def test_the_chance_of_so_many_right_guesses_is_the_formula_term_by_term() -> None:
    chance = np.random.default_rng(1)
    for _ in range(300):
        m = int(chance.integers(1, 60))
        r = int(chance.integers(0, m + 1))
        v = int(chance.integers(0, r + 1))
        epsilon, delta = float(chance.uniform(0, 4)), float(chance.choice([0.0, 1e-6, 1e-3, 0.1]))
        assert steinke_p(Guesses(m, r, v), epsilon, delta) == pytest.approx(
            brute_force_p(m, r, v, epsilon, delta), rel=1e-9
        )


def test_all_guesses_right_give_the_closed_form() -> None:
    """With delta 0 the bound solves chance^100 = level."""
    chance = 0.05 ** (1 / 100)
    assert steinke_bound(Guesses(100, 100, 100), 0.0, 0.05) == pytest.approx(
        math.log(chance / (1 - chance)), abs=1e-5
    )


def randomised_response(epsilon: float, m: int, repetitions: int, seed: int = 2) -> list[Guesses]:
    """Each coin is told rightly with chance e^epsilon / (1 + e^epsilon): exactly epsilon-DP."""
    right = np.random.default_rng(seed).binomial(m, 1 / (1 + math.exp(-epsilon)), size=repetitions)
    return [Guesses(m, m, int(v)) for v in right]


@pytest.mark.parametrize(("epsilon", "at_least"), [(1.0, 0.85), (4.0, 3.5)])
def test_on_randomised_response_the_bound_is_wrong_as_rarely_as_it_says(
    epsilon: float, at_least: float
) -> None:
    repetitions = 400
    bounds = [steinke(guesses, 0.0, 0.05) for guesses in randomised_response(epsilon, 1000, repetitions)]
    wrong = sum(bound > epsilon for bound in bounds)
    assert wrong <= binom.ppf(0.9999, repetitions, 0.05)
    assert np.mean(bounds) >= at_least


def test_a_liar_in_randomised_response_is_wrong_far_more_often() -> None:
    bounds = [steinke(guesses, 0.0, 0.05) for guesses in randomised_response(1.5, 1000, 100)]
    assert sum(bound > 1.0 for bound in bounds) > 90


def test_f_dp_never_promises_more_than_exact_randomised_response_allows() -> None:
    """For epsilon-DP's own curve, the level found is at least the exact binomial chance: the test is valid."""
    for epsilon in (0.5, 1.0, 3.0):
        curve = curve_of(np.array([epsilon]), np.array([0.0]))
        for right in range(50, 101, 5):
            exact = float(binom.sf(right - 1, 100, 1 / (1 + math.exp(-epsilon))))
            assert f_dp_p(Guesses(100, 100, right), curve) >= min(exact, 1.0) * 0.999


def gaussian_scores(mu: float, m: int, repetitions: int, each: int, seed: int = 3) -> list[Guesses]:
    """Canaries in directions of their own, with noise of 1 / mu."""
    chance, found = np.random.default_rng(seed), []
    for _ in range(repetitions):
        included = chance.random(m) < 0.5
        found.append(guess_extremes(mu * included + chance.standard_normal(m), included, each))
    return found


def test_on_the_gaussian_mechanism_bounds_are_rarely_wrong_and_f_dp_sees_more() -> None:
    noise = calibrate_gaussian(2.0, DELTA)
    found = gaussian_scores(1 / noise, 1000, 300, 100)
    by_curve = np.array([f_dp(guesses, DELTA, 0.05) for guesses in found])
    by_pair = np.array([steinke(guesses, DELTA, 0.05) for guesses in found])
    assert max((by_curve > 2).sum(), (by_pair > 2).sum()) <= binom.ppf(0.9999, 300, 0.05)
    assert 0.85 <= by_curve.mean() <= 1.15
    assert 0.5 <= by_pair.mean() <= 0.8
    assert not any(f_dp_refuted(guesses, gaussian_curve(1 / noise), 0.01) for guesses in set(found))


@pytest.mark.parametrize(("share", "at_least"), [(0.5, 0.35), (0.33, 0.95), (0.1, 1.0)])
def test_too_little_noise_is_refuted_with_the_power_that_the_docs_state(
    share: float, at_least: float
) -> None:
    noise = calibrate_gaussian(2.0, DELTA)
    refuted = lru_cache(lambda guesses: f_dp_refuted(guesses, gaussian_curve(1 / noise), 0.01))
    found = [refuted(guesses) for guesses in gaussian_scores(1 / (share * noise), 1000, 100, 100)]
    assert np.mean(found) >= at_least


def test_the_curve_of_a_privacy_loss_distribution_is_the_gaussian_one_where_nobody_is_sampled() -> None:
    outcomes = np.array([0.0, 1e-5, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.999])
    composed = sampled_curve(1.0, 4.0, 9)(outcomes)
    assert np.abs(composed - gaussian_curve(3 / 4)(outcomes)).max() < 2e-4
    assert (composed <= gaussian_curve(3 / 4)(outcomes) + 1e-9).all()  # pessimistic, so it refutes no more


def sampled_scores(rate: float, noise: float, steps: int, repetitions: int, seed: int = 4) -> list[Guesses]:
    chance, found, m = np.random.default_rng(seed), [], 1000
    for _ in range(repetitions):
        included = chance.random(m) < 0.5
        taken = included * chance.binomial(steps, rate, size=m)
        scores = taken + noise * math.sqrt(steps) * chance.standard_normal(m)
        found.append(guess_extremes(scores, included, 100))
    return found


def test_under_poisson_sampling_the_claimed_curve_stands_and_a_tenth_of_the_noise_does_not() -> None:
    rate, noise, steps = 0.5, 3.0, 8
    claim, curve = (
        epsilon_pld([PoissonSubsampledGaussian(rate, noise, steps)], DELTA),
        sampled_curve(rate, noise, steps),
    )
    for guesses in sampled_scores(rate, noise, steps, 2):
        assert not f_dp_refuted(guesses, curve, 0.01)
        assert 0 <= f_dp_bound_sampled(guesses, rate, noise, steps, DELTA, 0.05) < claim
    (lying,) = sampled_scores(rate, noise / 10, steps, 1)
    assert f_dp_refuted(lying, curve, 0.01)
    assert f_dp_bound_sampled(lying, rate, noise, steps, DELTA, 0.05) > claim


def test_the_gaussian_epsilon_is_that_of_the_calibration() -> None:
    assert gaussian_epsilon(1 / calibrate_gaussian(2.0, DELTA), DELTA) == pytest.approx(2.0, abs=2e-3)
    assert gaussian_epsilon(0.0, DELTA) == 0


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (17, 400)])
def test_intervals_are_clopper_and_pearsons_and_hold_what_they_say(successes: int, trials: int) -> None:
    exact = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(successes, trials) == pytest.approx((exact.low, exact.high))
    for chance in (0.01, 0.2, 0.5):
        intervals = [clopper_pearson(found, trials) for found in range(trials + 1)]
        outside = [not low <= chance <= high for low, high in intervals]
        assert binom.pmf(np.arange(trials + 1)[outside], trials, chance).sum() <= 0.05


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Guesses(10, 12, 3),
        lambda: Guesses(10, 5, 6),
        lambda: guess_extremes(np.zeros(10), np.ones(10, dtype=np.bool_), 6),
        lambda: clopper_pearson(3, 2),
    ],
)
def test_impossible_counts_are_refused(wrong: Callable[[], Floats]) -> None:
    with pytest.raises(ValueError, match=r"impossible|must lie in"):
        wrong()
