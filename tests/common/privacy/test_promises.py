"""Every promise is calibrated by few looks at an accountant, or is refused at once with its bound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.config import PlanError, make_plan
from common.phases import noise_of_promise
from common.planning import Federation, propose
from common.planning_cli import app
from common.privacy import accountants, calibration
from common.privacy.accountants import SMALLEST_DELTA, SMALLEST_EPSILON, epsilon_pld
from common.privacy.calibration import NOISE_STEP, calibrate_gaussian, calibrate_sum
from common.privacy.mechanisms import GaussianSum, PoissonSubsampledGaussian

MOST_LOOKS = 120


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A PLD that was computed, each, by its delta."""
    made: list[float] = []

    def counted(groups: Any, delta: float, discretisation: float) -> float:
        made.append(delta)
        return uncounted(groups, delta, discretisation)

    uncounted = accountants._epsilon_pld
    monkeypatch.setattr(accountants, "_epsilon_pld", counted)
    return made


@pytest.mark.parametrize(
    ("epsilon", "delta", "bound"),
    [
        (1e-6, 1e-5, "epsilon is 1e-06, but the accountants vouch for no less than 0.001"),
        (9.9e-4, 1e-5, "epsilon is 0.00099"),
        (5e-324, 1e-5, "epsilon is 4.94066e-324"),
        (8.0, 1e-30, "delta is 1e-30, but the accountants vouch for no less than 1e-12"),
        (8.0, 1e-13, "delta is 1e-13"),
        (8.0, 1e-15, "delta is 1e-15"),
        (8.0, 5e-324, "delta is 4.94066e-324"),
        (1e-6, 1e-30, "epsilon is 1e-06"),
    ],
)
def test_what_no_accountant_vouches_for_is_refused_without_a_look(
    epsilon: float, delta: float, bound: str, looks: list[float]
) -> None:
    with pytest.raises(PlanError, match=bound.replace(".", r"\.")):
        propose(Federation(users_per_site=50, sites=2, epsilon=epsilon, delta=delta))
    with pytest.raises(PlanError, match=bound.replace(".", r"\.")):
        make_plan({"privacy": {"epsilon": epsilon, "delta": delta}})
    assert looks == []


def test_the_command_says_so_too() -> None:
    done = CliRunner().invoke(
        app, ["--users-per-site", "50", "--sites", "2", "--epsilon", "1e-6", "--delta", "1e-5"]
    )
    assert "promise more, such as 1" in str(done.exception)


@pytest.mark.parametrize("epsilon", [SMALLEST_EPSILON, 0.003, 0.05, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("delta", [SMALLEST_DELTA, 1e-9, 1e-5])
def test_every_promise_above_the_bounds_is_kept_within_few_looks(
    epsilon: float, delta: float, looks: list[float]
) -> None:
    proposal = propose(Federation(users_per_site=50, sites=2, epsilon=epsilon, delta=delta))
    assert len(looks) < MOST_LOOKS
    spent = epsilon_pld(proposal.plan.events(), delta)
    assert math.isfinite(spent)
    assert spent <= epsilon


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [
        (
            SMALLEST_EPSILON,
            SMALLEST_DELTA,
            1.0,
            1,
        ),  # cost is a staircase here: guesses crept along it for hours
        (SMALLEST_EPSILON, SMALLEST_DELTA, 1e-6, 1),
        (SMALLEST_EPSILON, 1e-5, 0.01, 10**6),
        (1.0, 1e-5, 1e-6, 1),  # rare users and little noise: millions of points in one distribution
        (1.0, SMALLEST_DELTA, 1.0, 10**6),
        (100.0, SMALLEST_DELTA, 0.01, 1),
        (100.0, 1e-5, 1.0, 10**6),
    ],
)
def test_extreme_mechanisms_are_calibrated_within_few_looks(
    epsilon: float, delta: float, rate: float, steps: int, looks: list[float]
) -> None:
    noise = calibration.calibrate_noise(epsilon, delta, sampling_rate=rate, steps=steps)
    assert len(looks) < MOST_LOOKS
    event = PoissonSubsampledGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps)
    assert epsilon_pld([event], delta) <= epsilon


def test_what_no_noise_reaches_is_refused_within_few_looks(looks: list[float]) -> None:
    with pytest.raises(ValueError, match=r"1000000 steps at sampling rate 1 exceed it .* raise epsilon"):
        calibration.calibrate_noise(SMALLEST_EPSILON, 1e-5, sampling_rate=1.0, steps=10**6)
    assert len(looks) < MOST_LOOKS


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-6), (2.0, 1e-5), (8.0, 1e-5), (50.0, 1e-5)])
def test_a_sums_noise_is_the_first_that_the_accountant_lets_pass(epsilon: float, delta: float) -> None:
    noise = calibrate_sum(epsilon, delta)
    slow = calibrate_gaussian(epsilon, delta)  # one by one, as it was found before
    while epsilon_pld([GaussianSum(slow)], delta) > epsilon:
        slow = round(slow + NOISE_STEP, 3)
    assert noise == slow == noise_of_promise(epsilon, delta)


def test_a_ledger_of_such_a_promise_is_not_begun(tmp_path: Path) -> None:
    from client.making import check_promise

    with pytest.raises(ValueError, match="vouch for no less"):
        check_promise(1.0, 1e-30)
