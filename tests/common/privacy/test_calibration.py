"""The noise for a target: enough, and not a thousandth more than that; beside what was spent already."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from common.privacy.accountants import epsilon_gaussian, epsilon_pld, published_epsilon
from common.privacy.calibration import calibrate_gaussian, calibrate_noise
from common.privacy.mechanisms import Event, GaussianSum, PoissonSubsampledGaussian


def dp_sgd(rate: float, noise: float, steps: int) -> PoissonSubsampledGaussian:
    return PoissonSubsampledGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps", "spent"),
    [
        (8.0, 1e-5, 0.05, 400, []),
        (1.0, 1e-6, 0.1, 1000, []),
        (0.1, 1e-6, 1.0, 100, []),
        (0.05, 1e-6, 0.2, 2000, []),
        (20.0, 1e-5, 0.2, 200, []),
        (3.0, 1e-9, 0.01, 10_000, []),
        (8.0, 1e-5, 0.001, 100_000, []),
        (8.0, 1e-5, 0.05, 400, [GaussianSum(4.0), dp_sgd(0.1, 1.5, 100)]),
    ],
)
def test_calibrated_noise_reaches_the_target_and_less_noise_misses_it(
    epsilon: float, delta: float, rate: float, steps: int, spent: list[Event]
) -> None:
    noise = calibrate_noise(epsilon, delta, sampling_rate=rate, steps=steps, spent=spent)
    assert noise == round(noise, 3)
    assert epsilon_pld([*spent, dp_sgd(rate, noise, steps)], delta) <= epsilon
    assert epsilon_pld([*spent, dp_sgd(rate, noise - 2e-3, steps)], delta) > epsilon
    assert published_epsilon([*spent, dp_sgd(rate, noise, steps)], delta).epsilon <= epsilon


def test_what_was_spent_asks_for_more_noise() -> None:
    """The error to avoid: noise calibrated as if nothing had been spent."""
    fresh = calibrate_noise(8.0, 1e-5, sampling_rate=0.05, steps=400)
    later = calibrate_noise(8.0, 1e-5, sampling_rate=0.05, steps=400, spent=[GaussianSum(2.0)])
    assert later > fresh
    assert epsilon_pld([GaussianSum(2.0), dp_sgd(0.05, fresh, 400)], 1e-5) > 8.0


def test_a_generous_target_gets_the_smallest_noise_that_an_event_may_have() -> None:
    assert calibrate_noise(500.0, 1e-5, sampling_rate=0.2, steps=1) == 0.1
    assert calibrate_gaussian(500.0, 1e-5) == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0"),
        ({"epsilon": -1.0}, "epsilon is -1"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"epsilon": 501.0}, "epsilon is 501"),
        ({"delta": 0.0}, "delta is 0"),
        ({"delta": 1.0}, "delta is 1"),
        ({"delta": 1e-16}, "even with noise multiplier"),
        ({"sampling_rate": 0.0}, "sampling_rate is 0"),
        ({"sampling_rate": 1.1}, "sampling_rate is 1.1"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"epsilon": 1e-6, "delta": 1e-9, "sampling_rate": 1.0, "steps": 10_000_000}, "take fewer steps"),
        ({"spent": [GaussianSum(0.5)], "epsilon": 1.0}, "already spent come to"),
    ],
)
def test_a_target_out_of_bounds_or_out_of_reach_is_refused(changes: dict[str, object], message: str) -> None:
    settings = {"epsilon": 8.0, "delta": 1e-5, "sampling_rate": 0.1, "steps": 10} | changes
    with pytest.raises(ValueError, match=message):
        calibrate_noise(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-5), (30.0, 1e-9)])
def test_the_gaussian_is_calibrated_by_its_closed_form(epsilon: float, delta: float) -> None:
    noise = calibrate_gaussian(epsilon, delta)
    assert epsilon_gaussian([GaussianSum(noise)], delta) <= epsilon
    assert epsilon_gaussian([GaussianSum(noise - 1e-3)], delta) > epsilon
    classical = math.sqrt(2 * math.log(1.25 / delta)) / epsilon  # Dwork & Roth 2014, for epsilon < 1 only
    assert epsilon >= 1 or noise < classical
    assert abs(noise - calibrate_noise(epsilon, delta, sampling_rate=1.0, steps=1)) <= 2e-3


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0), (1e-9, 1e-15)]
)
def test_a_gaussian_target_out_of_bounds_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon|delta"):
        calibrate_gaussian(epsilon, delta)


def test_importing_the_accountants_imports_no_accountant() -> None:
    code = (
        "import sys, common.privacy.accountants; "
        "print([m for m in ('opacus', 'dp_accounting', 'scipy', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
