"""Every epsilon against other accountants, exact figures and simulation. What the libraries get wrong is next door."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy import accountants
from common.privacy.accountants import (
    ContradictionError,
    cross_check,
    epsilon_gaussian,
    epsilon_pld,
    epsilon_prv,
    epsilon_rdp,
    epsilon_rdp_google,
    gaussian_delta,
    privacy_profile,
    published_epsilon,
)
from common.privacy.mechanisms import Event, GaussianSum, UnknownMechanismError
from tests.common.privacy.accountant_cases import dp_sgd

TWENTY_ROUNDS = [
    dp_sgd(float(rate), float(noise), 10)
    for rate, noise in zip(np.linspace(0.02, 0.1, 20), np.linspace(1.2, 0.7, 20), strict=True)
]
THREE_RUNS = [dp_sgd(0.01, 0.8, 500), dp_sgd(0.05, 1.5, 200), dp_sgd(1, 20, 5)]

# Measured figures: PLD, RDP, PRV and dp-accounting's RDP, at the digits given.
MEASURED: dict[str, tuple[list[Event], float, float, float | None, float | None, float | None]] = {
    "A": ([dp_sgd(0.01, 1, 1000)], 1e-5, 1.829, 2.101, 1.838, 2.101),
    "B": ([dp_sgd(0.1, 0.8, 50)], 1e-5, 8.063, 9.234, 8.073, 9.257),
    "C": ([dp_sgd(1, 4, 10)], 1e-5, 3.341, 3.617, 3.352, 3.617),
    "D": ([dp_sgd(0.001, 0.5, 10000)], 1e-5, 5.229, 6.418, 5.237, 6.418),
    "E": ([dp_sgd(0.01, 10, 10)], 1e-5, 0.0084, 0.011, 0.018, 0.011),
    "F": ([dp_sgd(0.05, 1, 1)], 1e-5, 1.033, 1.607, 1.043, 1.607),
    "G": ([dp_sgd(0.2, 2, 500)], 1e-5, 12.621, 13.598, 12.632, 13.692),
    "I": (list(THREE_RUNS), 1e-5, 3.284, 3.793, 3.294, 3.793),
    "J": ([dp_sgd(0.2, 0.4, 200)], 1e-5, 147.15, 158.24, 147.17, 303.12),
    "K": ([dp_sgd(0.01, 1, 1000)], 1e-9, 2.990, 3.408, 3.000, 3.408),
    "M": ([dp_sgd(0.3, 0.3, 3)], 1e-5, 31.759, 34.393, 31.771, 34.393),
    "N": ([dp_sgd(1, 0.6, 1)], 1e-5, 8.004, 8.603, 8.014, 8.603),
    "O": ([dp_sgd(1e-4, 0.3, 100)], 1e-5, 5.952, 8.438, 5.963, 8.438),
}


def last_digit(figure: float) -> float:
    """One unit in the last digit that the figure was recorded with."""
    return 10.0 ** -(len(f"{figure}".split(".")[1]))


@pytest.mark.parametrize("row", MEASURED)
def test_figures_measured_before_come_out_again(row: str) -> None:
    events, delta, pld, rdp, prv, google = MEASURED[row]
    for accountant, figure in [
        (epsilon_pld, pld),
        (epsilon_rdp, rdp),
        (epsilon_prv, prv),
        (epsilon_rdp_google, google),
    ]:
        assert figure is not None
        assert accountant(events, delta) == pytest.approx(figure, abs=last_digit(figure)), accountant.__name__


def test_a_finer_discretisation_gives_the_measured_tighter_figures() -> None:
    assert epsilon_pld([dp_sgd(0.01, 1, 1000)], 1e-5, discretisation=1e-4) == pytest.approx(1.828, abs=1e-3)
    assert epsilon_pld([dp_sgd(0.01, 10, 10)], 1e-5, discretisation=1e-4) == pytest.approx(0.0078, abs=1e-4)


GRID = [
    ([dp_sgd(rate, noise, steps)], delta)
    for (rate, noise), steps, delta in itertools.product(
        [(0.001, 0.6), (0.01, 0.8), (0.05, 1.1), (0.25, 2.0), (0.5, 6.0), (1.0, 12.0)],
        [1, 30, 600],
        [1e-4, 1e-7],
    )
]


@pytest.mark.parametrize("position", range(len(GRID)))
def test_over_a_grid_every_accountant_confirms_the_published_epsilon(position: int) -> None:
    events, delta = GRID[position]
    published = published_epsilon(events, delta)
    assert published.prv is not None
    assert published.epsilon == epsilon_pld(events, delta, discretisation=published.discretisation)
    assert published.epsilon <= published.prv <= published.epsilon + 0.02 + 0.001 * published.epsilon
    assert published.epsilon <= min(published.rdp, epsilon_rdp_google(events, delta))
    # From below: what is certain is that one step out of many costs no more than all of them.
    assert published.epsilon >= epsilon_pld(
        [dp_sgd(events[0].sampling_rate, events[0].noise_multiplier, 1)], delta
    )
    if events[0].sampling_rate == 1:
        assert published.closed_form is not None
        assert abs(published.epsilon - published.closed_form) <= 1e-3


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.7, 1, 3, 10, 100, 1000])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9, 1e-12])
def test_without_sampling_the_pld_is_the_closed_form(noise: float, delta: float) -> None:
    for events in ([GaussianSum(noise)], [dp_sgd(1.0, noise * 5, 25)]):
        exact = epsilon_gaussian(events, delta)
        assert exact - 1e-6 <= epsilon_pld(events, delta) <= exact + 1e-3


def test_the_closed_form_agrees_with_known_values_and_with_direct_integration() -> None:
    assert epsilon_gaussian([dp_sgd(1, 4, 10)], 1e-5) == pytest.approx(3.3414, abs=1e-4)
    assert epsilon_gaussian([GaussianSum(0.6)], 1e-5) == pytest.approx(8.0037, abs=1e-4)
    # delta(epsilon) = integral of (p - e^epsilon q)_+, on a grid, for p = N(1, s^2) and q = N(0, s^2).
    noise, delta = 1.7, 1e-4
    epsilon = epsilon_gaussian([GaussianSum(noise)], delta)
    x = np.linspace(-30, 30, 2_000_001)
    density = np.exp(-((x - 1) ** 2) / (2 * noise**2)) - np.exp(epsilon - x**2 / (2 * noise**2))
    integral = np.maximum(density, 0).sum() * (x[1] - x[0]) / (noise * math.sqrt(2 * math.pi))
    assert integral == pytest.approx(delta, rel=1e-5)


def test_the_closed_form_is_refused_where_users_are_sampled() -> None:
    with pytest.raises(ValueError, match="without sampling"):
        epsilon_gaussian([GaussianSum(2.0), dp_sgd(0.5, 1, 1)], 1e-5)


def test_the_profile_is_the_exact_curve_from_above_and_epsilon_is_one_point_of_it() -> None:
    epsilons = [0.0, 0.5, 1.0, 3.0]
    for epsilon, delta in zip(epsilons, privacy_profile([GaussianSum(1.5)], epsilons), strict=True):
        exact = gaussian_delta(1.5, epsilon)
        assert exact <= delta <= exact + 1e-3
    sampled = [dp_sgd(0.1, 0.8, 50)]
    [delta] = privacy_profile(sampled, [epsilon_pld(sampled, 1e-5)])
    assert delta == pytest.approx(1e-5, rel=1e-3)
    assert privacy_profile([], [0.0, 1.0]) == [0.0, 0.0]


def simulated_delta(
    rate: float, noise: float, steps: int, epsilon: float, draws: int, seed: int
) -> tuple[float, float]:
    """Delta at `epsilon` by simulation of the privacy loss, and its standard error.

    The user is present under p, absent under q: delta = E_p[(1 - exp(epsilon - loss))_+]. A step's output is
    x ~ (1 - rate) N(0, noise^2) + rate N(1, noise^2), its loss log(1 + rate (e^((2 x - 1) / 2 noise^2) - 1)).
    """
    generator = np.random.default_rng(seed)
    loss = np.zeros(draws)
    for _ in range(steps):
        x = generator.normal(0, noise, draws) + (generator.random(draws) < rate)
        loss += np.log1p(rate * np.expm1((2 * x - 1) / (2 * noise**2)))
    values = np.maximum(0, -np.expm1(np.minimum(0.0, epsilon - loss)))
    return float(values.mean()), float(values.std() / math.sqrt(draws))


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.1, 0.8, 50), (0.05, 1.0, 1)])
def test_simulation_that_shares_no_accounting_code_confirms_the_pld(
    rate: float, noise: float, steps: int
) -> None:
    delta = 1e-3
    epsilon = epsilon_pld([dp_sgd(rate, noise, steps)], delta)
    found, error = simulated_delta(rate, noise, steps, epsilon, draws=300_000, seed=1)
    assert error < 0.08 * delta
    assert abs(found - delta) < 4 * error + 0.01 * delta
    # It would notice an epsilon ten per cent too low, or noise a tenth weaker than stated.
    too_low, error = simulated_delta(rate, noise, steps, 0.9 * epsilon, draws=300_000, seed=1)
    assert too_low - delta > 4 * error
    weaker, error = simulated_delta(rate, 0.9 * noise, steps, epsilon, draws=300_000, seed=1)
    assert weaker - delta > 4 * error


# Composition


def test_rounds_of_one_event_cost_one_composition_and_give_the_same_as_one_event() -> None:
    accountants._step_pld.cache_clear()
    accountants._epsilon_pld.cache_clear()
    sixty = [dp_sgd(0.05, 1.1, 10)] * 60
    assert epsilon_pld(sixty, 1e-5) == epsilon_pld([dp_sgd(0.05, 1.1, 600)], 1e-5)
    assert accountants._step_pld.cache_info().misses == 1
    assert epsilon_rdp(sixty, 1e-5) == epsilon_rdp([dp_sgd(0.05, 1.1, 600)], 1e-5)


def test_epsilon_does_not_depend_on_the_order_of_the_events() -> None:
    for accountant in (epsilon_pld, epsilon_rdp, epsilon_prv):
        figures = {accountant(list(order), 1e-5) for order in (THREE_RUNS, THREE_RUNS[::-1])}
        assert len(figures) == 1


def test_the_pld_is_that_of_the_library_s_own_accountant() -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for event in THREE_RUNS:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        accountant.compose(
            gaussian if event.sampling_rate == 1 else PoissonSampledDpEvent(event.sampling_rate, gaussian),
            event.steps,
        )
    assert epsilon_pld(THREE_RUNS, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-6)


@given(
    rate=st.sampled_from([0.01, 0.3, 1.0]),
    noise=st.floats(
        0.7, 20
    ),  # from about 0.6 on, 300 steps of all users pass epsilon 709, where exp overflows
    steps=st.integers(1, 300),
    delta=st.sampled_from([1e-4, 1e-6, 1e-8]),
)
@settings(max_examples=12, deadline=None)
def test_more_steps_more_users_less_noise_and_a_smaller_delta_never_cost_less(
    rate: float, noise: float, steps: int, delta: float
) -> None:
    epsilon = epsilon_pld([dp_sgd(rate, noise, steps)], delta)
    slack = 1e-9
    assert epsilon_pld([dp_sgd(rate, noise, steps + 50)], delta) >= epsilon - slack
    assert epsilon_pld([dp_sgd(min(1, 1.3 * rate), noise, steps)], delta) >= epsilon - slack
    assert epsilon_pld([dp_sgd(rate, 0.9 * noise, steps)], delta) >= epsilon - slack
    assert epsilon_pld([dp_sgd(rate, noise, steps)], delta / 10) >= epsilon - slack
    assert epsilon_pld([dp_sgd(rate, noise, steps), GaussianSum(5.0)], delta) >= epsilon - slack


def test_a_run_of_many_phases_is_confirmed() -> None:
    published = published_epsilon(
        [GaussianSum(6.0), GaussianSum(3.0), dp_sgd(0.05, 1.1, 400), dp_sgd(0.1, 1.4, 100)], 1e-5
    )
    assert published.closed_form is None
    assert published.prv is not None
    assert published.epsilon < published.prv < published.rdp


def test_noise_that_changes_every_round_is_confirmed() -> None:
    published = published_epsilon(TWENTY_ROUNDS[::4], 1e-5)
    assert published.prv is not None


def test_no_event_costs_nothing() -> None:
    published = published_epsilon([], 1e-5)
    assert (published.epsilon, published.rdp, published.prv, published.closed_form) == (0, 0, 0, 0)
    for accountant in (epsilon_pld, epsilon_rdp, epsilon_prv, epsilon_rdp_google, epsilon_gaussian):
        assert accountant([], 1e-5) == 0


def test_an_unknown_event_is_refused_by_every_accountant() -> None:
    for accountant in (
        epsilon_pld,
        epsilon_rdp,
        epsilon_prv,
        epsilon_rdp_google,
        epsilon_gaussian,
        published_epsilon,
    ):
        with pytest.raises(UnknownMechanismError, match="dict"):
            accountant([{"noise": 1}], 1e-5)  # type: ignore[list-item]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_a_delta_outside_zero_and_one_is_refused_by_every_accountant(delta: float) -> None:
    for accountant in (
        epsilon_pld,
        epsilon_rdp,
        epsilon_prv,
        epsilon_rdp_google,
        epsilon_gaussian,
        published_epsilon,
    ):
        with pytest.raises(ValueError, match="delta is"):
            accountant([GaussianSum(1.0)], delta)


# The cross-check


CONSISTENT = {"pld": 8.0, "rdp": 9.0, "prv": 8.01, "closed_form": 7.9999}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prv": 7.99}, "PLD <= PRV fails"),
        ({"prv": 8.0281}, "PRV <= PLD"),
        ({"prv": 0.5}, "PLD <= PRV fails"),
        ({"rdp": 7.9999}, "PLD <= RDP fails"),
        ({"pld": 9.5, "prv": None, "closed_form": None}, "PLD <= RDP fails"),
        ({"pld": 4.0}, "PRV <= PLD"),
        ({"closed_form": 8.001}, "closed form"),
        ({"closed_form": 7.9989}, "closed form"),
        ({"pld": math.inf}, "PLD is inf"),
        ({"pld": math.nan}, "PLD is nan"),
        ({"rdp": math.nan}, "RDP is nan"),
        ({"prv": -0.1}, "PRV is -0.1"),
        ({"closed_form": math.nan}, "closed form is nan"),
    ],
)
def test_a_contradiction_is_refused_and_named(changes: dict[str, float | None], message: str) -> None:
    with pytest.raises(ContradictionError, match=message):
        cross_check(**(CONSISTENT | changes))  # type: ignore[arg-type]


def test_consistent_figures_pass_with_or_without_what_may_be_missing() -> None:
    cross_check(pld=8.0, rdp=9.0, prv=8.01, closed_form=7.9999)
    cross_check(pld=8.0, rdp=9.0, prv=8.0279, closed_form=None)
    cross_check(pld=8.0, rdp=8.0, prv=None, closed_form=None)
    cross_check(pld=0.0, rdp=0.0, prv=0.0, closed_form=0.0)


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        ("epsilon_rdp", 0.8, "PLD <= RDP"),
        ("epsilon_prv", 0.8, "PLD <= PRV"),
        ("epsilon_prv", 1.2, "PRV <= PLD"),
        ("epsilon_pld", 0.8, "PRV <= PLD"),
    ],
)
def test_an_accountant_gone_wrong_stops_publication(
    name: str, factor: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(accountants, name)
    monkeypatch.setattr(accountants, name, lambda *given, **more: factor * right(*given, **more))
    with pytest.raises(ContradictionError, match=message):
        published_epsilon([dp_sgd(0.05, 1.1, 400)], 1e-5)


def test_an_accountant_that_raises_stops_publication(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("Discrete mean differs significantly")

    monkeypatch.setattr(accountants, "epsilon_prv", fail)
    with pytest.raises(ContradictionError, match="PRV gives no figure"):
        published_epsilon([dp_sgd(0.05, 1.1, 400)], 1e-5)


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([dp_sgd(0.05, 0.25, 3)], 1e-5),
        ([dp_sgd(0.05, 1.0, 10)], 1e-13),
        ([dp_sgd(0.05, 1.0, 10)], 1e-2),
        ([dp_sgd(0.0005, 1.0, 200_000)], 1e-5),
    ],
)
def test_outside_its_range_prv_is_not_asked_and_the_pld_is_finer(events: list[Event], delta: float) -> None:
    published = published_epsilon(events, delta)
    assert published.prv is None
    assert published.discretisation <= 1e-4
    assert published.epsilon == epsilon_pld(events, delta, discretisation=published.discretisation)


@pytest.mark.parametrize(("rate", "noise"), [(0.001, 1.0), (0.05, 10.0)])
def test_very_many_steps_are_published_at_a_finer_interval_instead_of_a_false_contradiction(
    rate: float, noise: float
) -> None:
    events = [dp_sgd(rate, noise, 100_000)]
    assert epsilon_pld(events, 1e-5, discretisation=1e-3) > epsilon_prv(events, 1e-5)
    published = published_epsilon(events, 1e-5)
    assert published.discretisation < 1e-3
    assert published.prv is not None
    assert published.epsilon <= epsilon_pld(events, 1e-5)
