"""The brake against Opacus' RDP, the lab's table of admitted rounds, and its own monotonicity."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp

from common.privacy import renyi
from common.privacy.mechanisms import Event, GaussianSum, PoissonSubsampledGaussian
from common.privacy.renyi import (
    NANO,
    RenyiFilter,
    best_order,
    cap_of,
    charge_at,
    charge_of,
    least_charge,
    renyi_cap,
    renyi_cost,
    renyi_to_epsilon,
)

RATES = [0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0]
NOISES = [0.3, 0.7, 1.0, 2.0, 8.0]
ORDERS = [2, 3, 4, 8, 17, 63]

rates = st.floats(1e-6, 1.0)
noises = st.floats(0.1, 1e4)
orders = st.integers(2, 64)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("noise", NOISES)
def test_cost_agrees_with_opacus_at_integer_orders(rate: float, noise: float) -> None:
    for order in ORDERS:
        theirs = compute_rdp(q=rate, noise_multiplier=noise, steps=7, orders=[order])[0]
        ours = renyi_cost(PoissonSubsampledGaussian(rate, noise, 7), order)
        # Opacus sums in floats near 1, so it keeps no more than ~1e-15 / cost relative digits.
        assert ours == pytest.approx(theirs, rel=1e-9, abs=7 * 2e-15)


def test_the_comparison_with_opacus_can_fail() -> None:
    theirs = compute_rdp(q=0.05, noise_multiplier=1.0 + 1e-8, steps=7, orders=[4])[0]
    assert renyi_cost(PoissonSubsampledGaussian(0.05, 1.0, 7), 4) != pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("noise", "order"), [(0.1, 2), (1.0, 3), (7.5, 63), (1e6, 256)])
def test_gaussian_sum_is_order_over_twice_the_variance(noise: float, order: int) -> None:
    assert renyi_cost(GaussianSum(noise), order) == pytest.approx(order / (2 * noise**2), rel=1e-14)
    assert renyi_cost(PoissonSubsampledGaussian(1.0, noise, 3), order) == pytest.approx(
        3 * order / (2 * noise**2), rel=1e-14
    )


def _admitted(plan: list[Event], order: int, epsilon: float = 8, delta: float = 1e-5) -> int:
    """Rounds admitted when the plan's events take turns."""
    filter_, rounds = RenyiFilter(order, cap_of(epsilon, delta, order)), 0
    while filter_.fits(charge := charge_of(plan[rounds % len(plan)], order)):
        filter_, rounds = filter_.charged(charge), rounds + 1
    return rounds


@pytest.mark.parametrize(
    ("plan", "order", "rounds"),
    [
        ([PoissonSubsampledGaussian(0.05, 1.0, 10)], 3, 44),
        ([PoissonSubsampledGaussian(0.02, 1.2, 20)], 4, 290),
        ([PoissonSubsampledGaussian(1.0, 8.0, 1)], 4, 157),
    ],
)
def test_admitted_rounds_of_the_lab_are_reproduced(plan: list[Event], order: int, rounds: int) -> None:
    assert best_order(plan, 8, 1e-5) == order
    assert _admitted(plan, order) == rounds


def test_nobody_asks_more_than_a_thousand_times_however_little_a_question_costs() -> None:
    cap, nearly_free = cap_of(8, 1e-5, 3), GaussianSum(1e6)
    filter_, asked = RenyiFilter(3, cap), 0
    while filter_.fits(charge := charge_at(nearly_free, 3, cap)):
        filter_, asked = filter_.charged(charge), asked + 1
    assert asked == 999  # the cap is no multiple of 1000, and a charge is rounded up
    assert cap // charge_of(nearly_free, 3) > 10**9  # what would fit without a least charge


@pytest.mark.parametrize(("cap", "least"), [(0, 1), (1, 1), (1000, 1), (1001, 2), (7_955_395_183, 7_955_396)])
def test_the_least_charge_is_a_thousandth_of_the_cap_rounded_up(cap: int, least: int) -> None:
    assert least_charge(cap) == least
    assert charge_at(GaussianSum(1e6), 3, cap) == least
    assert charge_at(GaussianSum(0.2), 3, cap) == charge_of(GaussianSum(0.2), 3)


def test_the_order_is_chosen_with_the_least_charge_counted() -> None:
    for plan in ([GaussianSum(1.0)], [GaussianSum(1.0)] + [GaussianSum(50.0)] * 300):
        found = best_order(plan, 8, 1e-5)

        def runs(order: int, plan: list[GaussianSum] = plan) -> float:
            cap = cap_of(8, 1e-5, order)
            return cap / sum(charge_at(event, order, cap) for event in plan)

        assert all(runs(found) >= 0.999 * runs(order) for order in range(2, 129))


def test_where_all_is_charged_the_least_the_order_is_the_one_at_which_the_events_cost_least() -> None:
    """Else rounding to whole nano-units would choose it."""
    cheap = [PoissonSubsampledGaussian(0.01, 10.0, 1)]
    found = best_order(cheap, 8, 1e-5)
    exact = {order: cap_of(8, 1e-5, order) / charge_of(cheap[0], order) for order in range(2, 129)}
    assert exact[found] >= 0.999 * max(exact.values())


def test_a_wrong_order_is_expensive() -> None:
    assert _admitted([PoissonSubsampledGaussian(0.05, 1.0, 10)], 8) <= 1


def test_cap_and_epsilon_are_inverse() -> None:
    for epsilon in (0.5, 1, 2, 8, 20):
        for delta in (1e-9, 1e-6, 1e-5):
            for order in (2, 3, 8, 40, 256):
                cap = renyi_cap(epsilon, delta, order)
                if cap > 0:
                    assert renyi_to_epsilon(cap, delta, order) == pytest.approx(epsilon, rel=1e-12)
                    assert cap_of(epsilon, delta, order) == math.floor(cap * NANO)
                else:
                    assert cap_of(epsilon, delta, order) == 0


def test_rounding_never_helps_the_spender() -> None:
    event = PoissonSubsampledGaussian(0.013, 0.97, 11)
    assert charge_of(event, 5) >= renyi_cost(event, 5) * NANO > charge_of(event, 5) - 1
    assert charge_of(PoissonSubsampledGaussian(1e-300, 1e6, 1), 2) == 1
    assert charge_of(GaussianSum(2.0), 3) == 375_000_000


@given(rates, noises, orders)
@settings(max_examples=60, deadline=None)
def test_more_noise_costs_less_and_more_steps_cost_more(rate: float, noise: float, order: int) -> None:
    one = charge_of(PoissonSubsampledGaussian(rate, noise, 1), order)
    assert charge_of(PoissonSubsampledGaussian(rate, noise * 1.5, 1), order) <= one
    assert charge_of(PoissonSubsampledGaussian(rate, noise, 9), order) <= 9 * one
    assert charge_of(PoissonSubsampledGaussian(rate, noise, 9), order) >= one


@given(rates, st.floats(0.1, 1.0), noises, orders)
@settings(max_examples=60, deadline=None)
def test_sampling_less_never_costs_more(rate: float, share: float, noise: float, order: int) -> None:
    less = renyi_cost(PoissonSubsampledGaussian(rate * share, noise, 1), order)
    full = renyi_cost(PoissonSubsampledGaussian(rate, noise, 1), order)
    assert 0 <= less <= full <= renyi_cost(GaussianSum(noise), order) * (1 + 1e-12)


@given(rates, noises, st.integers(2, 63))
@settings(max_examples=60, deadline=None)
def test_cost_grows_with_the_order(rate: float, noise: float, order: int) -> None:
    event = PoissonSubsampledGaussian(rate, noise, 3)
    assert renyi_cost(event, order) <= renyi_cost(event, order + 1)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 400))
@settings(deadline=None)
def test_the_filter_never_passes_its_cap(charges: list[int], cap: int) -> None:
    filter_, accepted = RenyiFilter(3, cap), 0
    for charge in charges:
        if filter_.fits(charge):
            filter_, accepted = filter_.charged(charge), accepted + charge
        else:
            assert accepted + charge > cap
            with pytest.raises(ValueError, match="does not fit"):
                filter_.charged(charge)
    assert filter_.spent == accepted <= cap


@pytest.mark.parametrize("order", [1, 0, 257, True, 2.0, 2.5])
def test_orders_outside_the_closed_form_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match="order is"):
        renyi_cost(GaussianSum(1.0), order)


def test_impossible_goals_are_refused() -> None:
    event = GaussianSum(1.0)
    with pytest.raises(ValueError, match="epsilon is"):
        renyi_cap(math.nan, 1e-5, 3)
    with pytest.raises(ValueError, match="delta is"):
        renyi_cap(1.0, 0.0, 3)
    with pytest.raises(ValueError, match="no budget"):
        best_order([event], 0.01, 1e-9)
    with pytest.raises(ValueError, match="empty"):
        best_order([], 1, 1e-5)
    with pytest.raises(ValueError, match="free"):
        RenyiFilter(3, 10).fits(0)


def test_choosing_an_order_costs_each_distinct_event_once_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    costed: Counter[tuple[Event, int]] = Counter()
    real = renyi.charge_of

    def counted(event: Event, order: int) -> int:
        costed[event, order] += 1
        return real(event, order)

    monkeypatch.setattr(renyi, "charge_of", counted)
    plan: list[Event] = [PoissonSubsampledGaussian(0.0123, 1.01, 20), GaussianSum(5.0)] * 100
    best_order(plan, 8, 1e-5)
    assert {event for event, _ in costed} == set(plan)
    assert set(costed.values()) == {1}
