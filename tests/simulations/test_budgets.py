"""Budgets over real federations: they outlive runs and models, and a run ends well without who has none left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.cli import app as site_app
from client.ledger import Ledger
from common.privacy.mechanisms import Event
from common.privacy.renyi import charge_at
from simulations.audit.cli import app as audit_app
from simulations.outcome import Outcome
from simulations.sites import registry_folder
from tests.tiny import tiny_run

POOR, WITHDRAWN = "00002", "00001"
PRIVACY = {"noise_multiplier": 3.0}


def plan_of(rounds: int, **model: Any) -> dict[str, Any]:
    return {"training": {"rounds": rounds, "steps_per_round": 1}, "privacy": PRIVACY, "model": model}


def charge_elsewhere(ledger: Ledger, number: int, event: Event) -> None:
    """Another federation's run on the same data: charged, and given up."""
    reservation = ledger.reserve(
        run="elsewhere",
        round=number,
        attempt=1,
        event=event,
        plan_hash="a" * 64,
        model_hash="b" * 64,
        nonce="c" * 32,
        clip_norm=1.0,
        normaliser=1.0,
        learning_rate=1.0,
    )
    ledger.burn(reservation)


def left_out(outcome: Outcome) -> list[list[tuple[str, bool]]]:
    return [
        [(each["reason"], each["refused"]) for each in record["left_out"]] for record in outcome.run.records()
    ]


def audited(outcome: Outcome, sites: Path) -> dict[str, Any]:
    arguments = ["receipts", str(outcome.run.path), "--registry", str(registry_folder(sites)), "--json"]
    result = CliRunner().invoke(audit_app, arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["epsilon"] == pytest.approx(outcome.privacy.epsilon, abs=1e-3)
    printed = json.loads((outcome.run.path / "privacy.json").read_text())
    assert found["epsilon"] == pytest.approx(printed["epsilon"], abs=1e-3)
    return found


def test_a_budget_that_ends_in_round_three_an_earlier_run_and_another_models_run(tmp_path: Path) -> None:
    sites = tmp_path / "sites"
    first = tiny_run(tmp_path, plan=plan_of(1), sites=sites, site_budget=6.0)
    assert left_out(first) == [[]]
    event = first.plan.round_event()
    with Ledger.open(sites / POOR / "ledger") as ledger:
        status = ledger.status()
        rounds_left = (status.cap - status.spent) // charge_at(event, status.genesis.order, status.cap)
        assert rounds_left > 10
        for number in range(rounds_left - 2):
            charge_elsewhere(ledger, number, event)
    # 1: in the middle of a run
    outcome = tiny_run(tmp_path, plan=plan_of(4), sites=sites)
    assert left_out(outcome) == [[], [], [("budget", True)], [("budget", True)]]
    assert [len(record["admitted"]) for record in outcome.run.records()] == [4, 4, 3, 3]
    assert all(record["aggregated"] for record in outcome.run.records())
    by_site = {site["site"]: site for site in audited(outcome, sites)["sites"]}
    assert {name: site["charges"] for name, site in by_site.items()} == {
        "site-0": 4,
        "site-1": 4,
        "site-2": 2,
        "site-3": 4,
    }
    assert by_site["site-2"]["figures"]["pld"] < by_site["site-0"]["figures"]["pld"]
    # 2: it ran out in an earlier run
    outcome = tiny_run(tmp_path, plan=plan_of(1), sites=sites)
    assert left_out(outcome) == [[("budget", True)]]
    assert {site["charges"] for site in audited(outcome, sites)["sites"]} == {0, 1}
    # 3: in another model's run
    outcome = tiny_run(tmp_path, plan=plan_of(1, hidden_width=8), sites=sites)
    assert left_out(outcome) == [[("budget", True)]]
    # 4: a site withdraws
    result = CliRunner().invoke(site_app, ["withdraw", str(sites / WITHDRAWN), "--yes"])
    assert result.exit_code == 0, result.output
    assert (sites / WITHDRAWN / "closing.json").is_file()
    outcome = tiny_run(tmp_path, plan=plan_of(1), sites=sites)
    assert sorted(left_out(outcome)[0]) == [("budget", True), ("closed", True)]
    assert sorted(next(iter(outcome.run.records()))["admitted"]) == ["site-0", "site-3"]
    audited(outcome, sites)
    # Whatever was refused, nothing is over its cap.
    for folder in sorted(sites.glob("0*")):
        with Ledger.open(folder / "ledger") as ledger:
            report = ledger.verify()
            assert report.spent <= report.cap
            assert report.open == 0


def test_a_site_that_served_one_server_serves_another_with_the_same_ledger(tmp_path: Path) -> None:
    sites = tmp_path / "sites"
    first = tiny_run(tmp_path, plan=plan_of(2), sites=sites, site_budget=20.0)
    registry_folder(sites).rename(tmp_path / "registry-of-the-first-server")
    second = tiny_run(tmp_path, plan=plan_of(2), sites=sites)  # a new registry, with a key of its own
    assert left_out(second) == [[], []]
    assert [len(record["admitted"]) for record in second.run.records()] == [4, 4]
    with Ledger.open(sites / POOR / "ledger") as ledger:
        status = ledger.status()
    assert [charge.reserve.run for charge in status.charges] == [first.run.name] * 2 + [second.run.name] * 2
    audited(second, sites)
