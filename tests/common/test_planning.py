"""The planner: keeps the promise it is given, reads nothing but public numbers, writes what the reader reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.config import PlanError, read_plan
from common.planning import Federation, plan_toml, propose, smallest_budget
from common.planning_cli import app
from common.privacy.accountants import epsilon_pld
from common.privacy.mechanisms import GaussianSum, PoissonSubsampledGaussian
from common.privacy.renyi import RenyiFilter, cap_of, charge_at

TEN = Federation(users_per_site=50, sites=10)


@pytest.mark.parametrize("epsilon", [1.0, 8.0, 20.0])
@pytest.mark.parametrize("rounds", [0, 4])
@pytest.mark.parametrize("metrics", [False, True])
def test_the_plan_keeps_the_promise(epsilon: float, rounds: int, metrics: bool) -> None:
    found = propose(replace(TEN, epsilon=epsilon, rounds=rounds, metrics=metrics))
    assert 0.95 * epsilon < epsilon_pld(found.plan.events(), 1e-5) <= epsilon
    assert found.epsilon == epsilon_pld(found.plan.events(), 1e-5)
    assert found.plan.training.rounds == rounds
    assert bool(found.plan.metrics.share) == metrics


@pytest.mark.parametrize("rounds", [0, 6])
def test_the_ledger_that_it_names_admits_the_plan_and_a_smaller_one_does_not(rounds: int) -> None:
    found = propose(replace(TEN, rounds=rounds))

    def admits(epsilon: float) -> bool:
        filter_ = RenyiFilter(found.order, cap_of(epsilon, 1e-5, found.order))
        for event in found.plan.events():
            charge = charge_at(event, found.order, filter_.cap)
            if not filter_.fits(charge):
                return False
            filter_ = filter_.charged(charge)
        return True

    assert admits(found.budget)
    assert not admits(found.budget - 0.2)


def test_the_smallest_budget_of_one_sum_is_a_little_above_its_epsilon() -> None:
    events = [GaussianSum(0.7), PoissonSubsampledGaussian(0.1, 2.0, 20)]
    budget, _ = smallest_budget(events, 1e-5)
    assert epsilon_pld(events, 1e-5) < budget < 1.25 * epsilon_pld(events, 1e-5) + 0.5


def test_the_smallest_budget_counts_the_least_charge_of_each_request() -> None:
    dear, nearly_free = [GaussianSum(0.7)], [GaussianSum(1e4)]
    alone, _ = smallest_budget(dear, 1e-5)
    budget, order = smallest_budget(dear + nearly_free * 500, 1e-5)
    cap = cap_of(budget, 1e-5, order)
    assert cap >= 500 * -(-cap // 1000) + charge_at(dear[0], order, cap) > cap_of(budget - 0.2, 1e-5, order)
    assert budget > 1.5 * alone
    smallest_budget(nearly_free * 999, 1e-5)


def test_more_requests_than_any_ledger_admits_are_refused_in_one_sentence() -> None:
    with pytest.raises(PlanError, match=r"asks a site 1001 times, which no ledger .* Take fewer rounds"):
        smallest_budget([GaussianSum(1e4)] * 1001, 1e-5)


def test_more_users_buy_more_of_everything() -> None:
    few, many = (propose(replace(TEN, users_per_site=users, rounds=2)) for users in (50, 800))
    assert (few.plan.statistics.top_items or 0) < (many.plan.statistics.top_items or 0)
    by_phase = {each.phase: each.signal_to_noise for each in few.expectations}
    for each in many.expectations:
        if each.phase != "transitions":  # there the gain is taken in more items
            assert each.signal_to_noise > by_phase[each.phase]


def test_a_plan_written_as_toml_is_the_plan_read(tmp_path: Path) -> None:
    plan = propose(TEN).plan
    for each in (plan, plan.for_catalog("a" * 64)):
        (tmp_path / "plan.toml").write_text(plan_toml(each))
        assert read_plan(tmp_path / "plan.toml") == each


def test_the_command_writes_a_plan_and_says_what_to_expect(tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    arguments = ["--users-per-site", "50", "--sites", "10", "--rounds", "0", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["plan"] == json.loads(read_plan(out).to_json())
    assert [each["phase"] for each in said["expectations"]] == ["popularity", "transitions"]
    assert said["epsilon"] <= 8.0 <= said["ledger_epsilon"]


@pytest.mark.parametrize(
    "wrong", [{"users_per_site": 0}, {"sites": 0}, {"rounds": -1}, {"epsilon": -1.0}, {"delta": 0.5}]
)
def test_numbers_that_make_no_sense_are_refused_in_words(wrong: dict[str, float]) -> None:
    with pytest.raises((PlanError, ValueError), match=r"but must|greater than|delta is|vouch for no less"):
        propose(replace(TEN, **wrong))  # type: ignore[arg-type]
