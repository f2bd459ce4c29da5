"""A run with every phase, in one process: what is asked, charged, admitted, recorded, and what it all comes to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger import Ledger
from client.site_folder import Site
from common.config import Plan, PlanError, make_plan
from common.events.histories import Histories
from common.phases import Phase
from common.privacy.accountants import epsilon_pld
from common.privacy.mechanisms import GaussianSum, PoissonSubsampledGaussian, event_from_fields
from common.privacy.receipts import Receipt, check_receipt_alone
from common.sums import METRICS, POPULARITY, SITES, TRANSITIONS
from common.wire import (
    Reason,
    Refusal,
    Request,
    SignedRequest,
    Update,
    request_from_records,
    request_to_records,
    state_to_bytes,
)
from server.metrics import estimate
from server.runs import RunError
from simulations.outcome import Outcome
from tests.asking import answer
from tests.tiny import ITEMS, own_cache, tiny_run
from tests.tiny import SITES as N_SITES

ALL_PHASES: dict[str, Any] = {
    "privacy": {"noise_multiplier": None, "epsilon": 8.0},
    "statistics": {"popularity_share": 0.1, "transition_share": 0.4, "top_items": 10},
    "metrics": {"share": 0.1},
    "pretraining": {"histories": 20, "epochs": 1, "events": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phases")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    return tiny_run(folder, plan=ALL_PHASES)


def receipts(run: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.run.receipts_file.read_text().splitlines()]


def test_every_phase_is_a_round_of_its_own(outcome: Outcome) -> None:
    records = list(outcome.run.records())
    assert [record["phase"] for record in records] == [
        "popularity",
        "transitions",
        "update",
        "update",
        "metrics",
    ]
    assert all(record["aggregated"] and len(record["admitted"]) == N_SITES for record in records)


def test_the_run_keeps_its_promise_and_uses_most_of_it(outcome: Outcome) -> None:
    assert 7.9 < outcome.privacy.epsilon <= outcome.plan.privacy.epsilon


def test_the_printed_epsilon_is_that_of_the_recorded_events_alone(outcome: Outcome) -> None:
    """By dp-accounting itself, from receipts.jsonl, without any of our own composition."""
    from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation

    for site in outcome.privacy.sites:
        accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
        for line in receipts(outcome):
            if line["site"] != site.site:
                continue
            event = event_from_fields(line["event"])
            gaussian: DpEvent = GaussianDpEvent(event.noise_multiplier)
            if isinstance(event, GaussianSum):
                accountant.compose(gaussian)
            else:
                accountant.compose(PoissonSampledDpEvent(event.sampling_rate, gaussian), event.steps)
        # Five coarse compositions instead of our two: each adds its discretisation.
        assert accountant.get_epsilon(1e-5) == pytest.approx(site.published.epsilon, abs=0.02)


def test_every_release_has_a_receipt_that_verifies_alone(outcome: Outcome) -> None:
    lines = receipts(outcome)
    assert len(lines) == 5 * N_SITES
    contents = {1: "statistics", 2: "statistics", 3: "update", 4: "update", 5: "metrics"}
    for line in lines:
        receipt = Receipt.from_bytes(line["receipt"].encode())
        update = outcome.run.update_file(line["round"], line["key_id"]).read_bytes()
        reserve = check_receipt_alone(receipt, update)
        assert receipt.release.content == contents[line["round"]]
        sums = isinstance(reserve.event, GaussianSum)
        assert sums == (line["round"] in (1, 2, 5))
        assert not sums or (reserve.clip_norm, reserve.normaliser, reserve.learning_rate) == (1.0, 1.0, None)


def test_what_was_released_is_kept_for_serving(outcome: Outcome) -> None:
    released = outcome.run.released_state()
    assert set(released) == {POPULARITY, POPULARITY + SITES, TRANSITIONS, TRANSITIONS + SITES}
    assert float(released[POPULARITY + SITES]) == N_SITES
    assert set(outcome.run.released_state(1)) == {POPULARITY, POPULARITY + SITES}
    assert outcome.run.released_state(0) == {}
    total = sum(
        torch.tensor(0.0) if line["round"] != 1 else torch_state(outcome, line)[POPULARITY]
        for line in receipts(outcome)
    )
    torch.testing.assert_close(released[POPULARITY], total)


def torch_state(outcome: Outcome, line: dict[str, Any]) -> dict[str, torch.Tensor]:
    from common.wire import state_from_bytes

    return state_from_bytes(outcome.run.update_file(line["round"], line["key_id"]).read_bytes())


def test_released_metrics_have_an_interval(outcome: Outcome) -> None:
    lines = [json.loads(line) for line in outcome.run.metrics_file.read_text().splitlines()]
    (released,) = [line for line in lines if line.get("released")]
    for figure in released["metrics"].values():
        assert 0 <= figure["low_95"] <= figure["value"] <= figure["high_95"] <= 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(3)
    users, rate, noise, sites, inside = 2000, 0.2, 2.0, 10, 0
    for _ in range(300):
        hits = float((torch.rand(users, generator=generator) < rate).sum())
        true = torch.tensor([users, hits, hits / 2], dtype=torch.float64) / math.sqrt(3)
        noisy = true + noise * math.sqrt(sites) * torch.randn(3, generator=generator, dtype=torch.float64)
        found = estimate(noisy, noise, sites).hit_rate
        inside += found.low <= rate <= found.high
    assert 0.91 <= inside / 300 <= 0.99


def test_too_few_users_for_the_noise_say_nothing() -> None:
    found = estimate(torch.tensor([1.0, 0.5, 0.2]), 10.0, 10)
    assert (found.hit_rate.low, found.hit_rate.high) == (0.0, 1.0)


# What a site does with one request


@pytest.fixture
def site(outcome: Outcome, folder: Path, tmp_path: Path) -> Iterator[Site]:
    """A site of the finished run, its ledger new."""
    old = Site.load(outcome.run.path / "sites" / "00000")
    ledger = tmp_path / "ledger"
    Ledger.create(ledger, epsilon=9.0, delta=1e-5, typical_plan=outcome.plan.events()).disconnect()
    (tmp_path / "histories").symlink_to(outcome.run.path / "sites" / "00000" / "histories")
    catalog = outcome.run.path / "sites" / "catalog.jsonl"
    with own_cache(folder / "cache"):
        yield replace(old, folder=tmp_path, catalog=catalog)


def request(plan: Plan, round: int, phase: Phase, **values: Any) -> Request:
    fields: dict[str, Any] = {
        "run": "r",
        "round": round,
        "attempt": 1,
        "nonce": "ab" * 16,
        "plan": plan.model_dump_json(),
        "state": {},
        "phase": phase,
    }
    return Request(**{**fields, **values})


def charged(site: Site) -> int:
    with Ledger.open(site.ledger_folder) as ledger:
        return sum(entry.kind == "reserve" for entry in ledger.entries(0))


def test_the_cost_is_reserved_before_the_data_is_opened(
    site: Site, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def opened(folder: Path) -> Any:
        seen.append(charged(site))
        raise RuntimeError("the disk broke")

    monkeypatch.setattr(Histories, "load", opened)
    found = answer(site, request(outcome.plan, 1, Phase.POPULARITY))
    assert found == Refusal(Reason.FAILED)
    assert seen == [1]
    with Ledger.open(site.ledger_folder) as ledger:
        assert [entry.kind for entry in ledger.entries(0)] == ["genesis", "reserve", "burnt"]


def test_a_retry_sends_the_same_bytes_and_costs_nothing(site: Site, outcome: Outcome) -> None:
    first, second = (answer(site, request(outcome.plan, 1, Phase.POPULARITY)) for _ in range(2))
    assert isinstance(first, Update)
    assert isinstance(second, Update)
    assert state_to_bytes(first.state) == state_to_bytes(second.state)
    assert first.receipt == second.receipt
    assert charged(site) == 1


@pytest.mark.parametrize(
    ("round", "phase"), [(2, Phase.POPULARITY), (1, Phase.UPDATE), (9, Phase.METRICS), (2, Phase.TRANSITIONS)]
)
def test_what_the_plan_does_not_foresee_is_refused_and_free(
    site: Site, outcome: Outcome, round: int, phase: Phase
) -> None:
    """The last: transitions before any popularity was released."""
    assert answer(site, request(outcome.plan, round, phase)) == Refusal(Reason.PLAN)
    assert charged(site) == 0


def test_metrics_are_refused_unless_the_sites_policy_allows_them(site: Site, outcome: Outcome) -> None:
    state = outcome.run.model_state()
    asked = request(outcome.plan, 5, Phase.METRICS, state=state, released=outcome.run.released_state())
    assert answer(replace(site, metrics=False), asked) == Refusal(Reason.POLICY)
    assert charged(site) == 0
    given = answer(site, asked)
    assert isinstance(given, Update)
    assert given.state[METRICS].shape == (3,)


def test_a_site_without_budget_refuses_a_sum(site: Site, outcome: Outcome) -> None:
    loud = {
        **ALL_PHASES["statistics"],
        "popularity_noise_multiplier": 0.1,
        "transition_noise_multiplier": 5.0,
    }
    plan = make_plan({**outcome.plan.model_dump(), "statistics": loud})
    assert answer(site, request(plan, 1, Phase.POPULARITY)) == Refusal(Reason.BUDGET)
    assert charged(site) == 0


def test_a_request_travels_with_its_phase_and_what_was_released(outcome: Outcome) -> None:
    asked = request(outcome.plan, 2, Phase.TRANSITIONS, released=outcome.run.released_state(1))
    signed = SignedRequest.of(replace(asked, site="ab" * 32), Ed25519PrivateKey.generate(), expires=2**31)
    found = request_from_records(request_to_records(signed)).request()
    assert found.phase is Phase.TRANSITIONS
    assert found.model_digest == asked.model_digest
    assert found.model_digest != replace(asked, released={}).model_digest


# Plans


def test_statistics_alone_make_a_model(folder: Path) -> None:
    plan = {
        "privacy": {"noise_multiplier": None},
        "training": {"rounds": 0},
        "statistics": {"popularity_share": 0.2, "transition_share": 0.8},
    }
    done = tiny_run(folder, plan=plan)
    assert [record["phase"] for record in done.run.records()] == ["popularity", "transitions"]
    assert done.privacy.epsilon <= 8.0
    start, end = done.run.round_state(0), done.run.model_state()
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_a_run_that_no_sites_can_pay_for_to_its_end_asks_nobody_anything(folder: Path) -> None:
    """The ledgers would admit popularity, and no more."""
    with pytest.raises(
        RunError, match="fit the budgets of 0 sites, and each needs 1: it ends before round 1"
    ):
        tiny_run(folder, plan={**ALL_PHASES, "name": "poor"}, site_budget=4.0)
    (path,) = (folder / "runs").glob("*poor.incomplete")
    assert not (path / "rounds.jsonl").exists()
    ledgers = list((path / "sites").glob("*/ledger"))
    assert ledgers
    for folder_of_ledger in ledgers:
        with Ledger.open(folder_of_ledger) as ledger:
            assert not ledger.status().charges


def test_a_plan_that_promises_less_than_its_noise_costs_is_refused() -> None:
    plan = make_plan({"privacy": {"noise_multiplier": 1.0, "epsilon": 1.0}})
    with pytest.raises(PlanError, match=r"privacy.epsilon is 1"):
        plan.calibrated()


@pytest.mark.parametrize("epsilon", [2.0, 8.0, 20.0])
@pytest.mark.timeout(120)  # a search that begins at the largest noise takes far longer
@pytest.mark.parametrize(
    "shares", [(0.1, 0.9, 0.0, 0), (0.05, 0.5, 0.05, 6), (0.3, 0.0, 0.0, 3), (0.2, 0.7, 0.0, 4)]
)
def test_all_events_of_a_plan_together_keep_the_promise(
    epsilon: float, shares: tuple[float, float, float, int]
) -> None:
    popularity, transitions, metrics, rounds = shares
    plan = make_plan(
        {
            "privacy": {"epsilon": epsilon},
            "training": {"rounds": rounds},
            "statistics": {"popularity_share": popularity, "transition_share": transitions},
            "metrics": {"share": metrics},
        }
    ).calibrated()
    spent = epsilon_pld(plan.events(), plan.privacy.delta)
    assert 0.97 * epsilon < spent <= epsilon
    assert len(plan.events()) == plan.rounds
    assert plan.calibrated() == plan


def test_a_plan_of_updates_alone_charges_what_it_always_did() -> None:
    plan = make_plan({"privacy": {"noise_multiplier": 3.0}})
    assert plan.events() == [PoissonSubsampledGaussian(0.5, 3.0, 10)] * 6


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"statistics": {"transition_share": 0.5}}, "popularity_share"),
        ({"statistics": {"popularity_share": 0.5, "transition_share": 0.5}}, "below 1"),
        ({"training": {"rounds": 0}}, "nothing would be learned"),
        ({"statistics": {"popularity_share": 0.1, "top_items": 1}}, "top_items"),
    ],
)
def test_a_plan_that_makes_no_sense_says_why(values: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make_plan(values)


def test_more_items_than_one_release_holds_are_refused() -> None:
    values = {"statistics": {"popularity_share": 0.1, "transition_share": 0.1, "top_items": 5000}}
    with pytest.raises(PlanError, match="one release holds"):
        make_plan(values).calibrated()


def test_the_catalog_of_the_tiny_federation_is_as_small_as_thought(outcome: Outcome) -> None:
    assert outcome.run.released_state()[POPULARITY].shape == (ITEMS,)
