"""A real federation with one site that lies differently each round: the run ends well and names it."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord

import client.app
from client.ledger import Ledger
from common.wire import Update, answer_from_records, answer_to_records
from server.registry import RegistryReader
from simulations.audit.receipts import audit_receipts
from simulations.sites import registry_folder
from tests.tiny import tiny_run

FAST = {"noise_multiplier": 8.0, "sampling_rate": 1.0}  # accountants are quick where nobody is sampled
Lie = Callable[[Message], object]


def _changed(value: float) -> Lie:
    def lie(reply: Message) -> None:
        answer = answer_from_records(reply.content)
        assert isinstance(answer, Update)
        first = min(answer.state)
        state = {**answer.state, first: torch.full_like(answer.state[first], value)}
        reply.content["update"] = answer_to_records(Update.of(state, b""))["update"]

    return lie


def _raise(reply: Message) -> None:
    raise RuntimeError("user 17 watched film 3")


LIES: list[tuple[str, Lie]] = [
    ("wrong_digest", _changed(float("nan"))),
    ("malformed", lambda reply: reply.content.pop("receipt")),
    ("malformed", lambda reply: reply.content.update({"m": MetricRecord({"num-examples": 1042})})),
    ("malformed_json", lambda reply: reply.content["receipt"].update({"entries": b"junk"})),
    ("node_error", _raise),
    ("malformed", lambda reply: reply.content.update({"update": ConfigRecord({"a": 1})})),
]


def test_one_lying_site_is_left_out_by_name_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, lies = client.app.app, itertools.chain((lie for _, lie in LIES), itertools.repeat(None))

    def lying(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        lie = next(lies) if context.node_config["partition-id"] == 1 else None
        if lie is not None:
            lie(reply)
        return reply

    monkeypatch.setattr(client.app, "app", lying)
    rounds = len(LIES) + 1
    outcome = tiny_run(
        tmp_path,
        plan={"training": {"rounds": rounds, "steps_per_round": 1}, "privacy": FAST},
        site_budget=20.0,
    )
    records = list(outcome.run.records())
    assert [len(record["left_out"]) for record in records] == [1] * len(LIES) + [0]
    assert [record["left_out"][0]["reason"] for record in records[:-1]] == [reason for reason, _ in LIES]
    assert all(record["aggregated"] for record in records)
    assert all(record["admitted"] == ["site-0", "site-2", "site-3"] for record in records[:-1])
    # Back to honesty: what it reserved and released meanwhile extends its chain, and is charged.
    assert sorted(records[-1]["admitted"]) == ["site-0", "site-1", "site-2", "site-3"]
    assert "film 3" not in (outcome.run.path / "rounds.jsonl").read_text()
    found = audit_receipts(outcome.run.path)
    assert not found.lies, found.lies
    lied = next(site for site in found.sites if site.site == "site-1")
    assert (lied.charges, lied.receipts) == (rounds, 1)
    assert {site.charges for site in found.sites} == {rounds}


def copied(ledger: Path) -> dict[str, bytes]:
    """What a backup of a ledger's folder keeps, while nothing is at work there."""
    return {path.name: path.read_bytes() for path in ledger.iterdir() if path.is_file()}


def restored(ledger: Path, backup: dict[str, bytes]) -> None:
    """Puts a copy of the ledger's files back."""
    for name, data in backup.items():
        (ledger / name).write_bytes(data)


def charges(site: Path) -> int:
    with Ledger.open(site / "ledger") as ledger:
        return len(ledger.status().charges)


def test_a_site_restored_from_an_old_backup_is_told_at_a_runs_first_request_and_spends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sites = tmp_path / "sites"
    fast = {"training": {"rounds": 1, "steps_per_round": 1}, "privacy": FAST}
    tiny_run(tmp_path, plan=fast, sites=sites, site_budget=20.0)
    ledger = sites / "00002" / "ledger"
    backup = copied(ledger)
    tiny_run(tmp_path, plan=fast, sites=sites)
    newest = copied(ledger)
    restored(ledger, backup)
    before = charges(sites / "00002")
    with caplog.at_level(logging.WARNING, "fedtide.site"):
        third = tiny_run(tmp_path, plan=fast, sites=sites)
    (record,) = third.run.records()
    assert [(each["node"], each["reason"]) for each in record["left_out"]] == [("4", "policy")]
    assert len(record["admitted"]) == 3
    assert charges(sites / "00002") == before
    assert copied(ledger) == backup
    assert "restored from an old backup" in caplog.text
    assert "put the newest whole copy of the ledger's folder back" in caplog.text
    assert not any(site.barred for site in RegistryReader(registry_folder(sites)).sites())
    restored(ledger, newest)
    fourth = tiny_run(tmp_path, plan=fast, sites=sites)
    (record,) = fourth.run.records()
    assert len(record["admitted"]) == 4
    assert charges(sites / "00002") == before + 2


def test_a_site_that_goes_on_with_an_old_ledger_is_barred_and_the_runs_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = tmp_path / "sites"
    fast = {"training": {"rounds": 1, "steps_per_round": 1}, "privacy": FAST}
    tiny_run(tmp_path, plan=fast, sites=sites, site_budget=20.0)
    ledger = sites / "00002" / "ledger"
    backup = copied(ledger)
    tiny_run(tmp_path, plan=fast, sites=sites)
    restored(ledger, backup)
    monkeypatch.setattr(Ledger, "anchor", lambda *_: None)  # its code does not ask what the server has seen
    third = tiny_run(tmp_path, plan=fast, sites=sites)
    (record,) = third.run.records()
    assert [(each["site"], each["reason"]) for each in record["left_out"]] == [("site-2", "fork")]
    fourth = tiny_run(tmp_path, plan=fast, sites=sites)
    (record,) = fourth.run.records()
    assert (record["left_out"], record["missing"]) == ([], 0)  # it was not asked
    assert record["admitted"] == ["site-0", "site-1", "site-3"]
    reader = RegistryReader(registry_folder(sites))
    barred = next(site for site in reader.sites() if site.barred)
    (proof,) = reader.proofs(barred.key_id)
    proof.verify(reader.chain(barred.key_id).genesis.public_key)
    found = audit_receipts(fourth.run.path, registry_folder(sites))
    assert not found.lies, found.lies
    assert json.dumps(found.as_json())
    assert [site.barred for site in found.sites] == [False, False, True, False]
