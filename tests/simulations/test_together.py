"""Federations whose sites answer in one go: every site's ledger, receipts and refusals are as they are one by one."""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

import client.together
import simulations.answering
from client.ledger import Ledger
from server.runs import RunError
from simulations.audit.receipts import audit_receipts
from simulations.outcome import Outcome
from tests.tiny import SITES, tiny_run

FAST = {"noise_multiplier": 8.0, "sampling_rate": 1.0}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sites trained in each batch."""
    batches: list[int] = []
    right = client.together.train_together

    def counted(model, sites, *given, **named):  # type: ignore[no-untyped-def]
        batches.append(len(sites))
        return right(model, sites, *given, **named)

    monkeypatch.setattr(simulations.answering, "TOGETHER_FROM", 2)
    monkeypatch.setattr(client.together, "train_together", counted)
    return batches


def charged(outcome: Outcome) -> list[list[str]]:
    """Of each site what became of its reservations."""
    found = []
    for site in outcome.sites:
        with Ledger.open(site.folder / "ledger") as ledger:
            ledger.verify()
            found.append([charge.outcome for charge in ledger.status().charges])
    return found


def test_a_run_whose_sites_train_together_is_whole_and_its_receipts_hold(
    tmp_path: Path, together: list[int]
) -> None:
    outcome = tiny_run(tmp_path, plan={"privacy": FAST})
    assert together == [SITES, SITES]
    assert charged(outcome) == [["released"] * 2] * SITES
    assert not audit_receipts(outcome.run.path).lies
    updates = [
        np.concatenate([value.numpy().ravel() for value in outcome.run.update(1, line["key_id"]).values()])
        for line in outcome.run.receipts(1)
    ]
    correlations = np.corrcoef(np.stack(updates)) - np.eye(SITES)
    assert np.abs(correlations).max() < 0.9  # each site has noise of its own


def test_a_site_whose_histories_are_gone_fails_alone_and_stays_charged(
    tmp_path: Path, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = client.together.training_batch

    def damaged(charged_):  # type: ignore[no-untyped-def]
        if charged_.site.name == "site-1":
            (charged_.site.histories_folder / "items.npy").write_bytes(b"no array")
        return right(charged_)

    monkeypatch.setattr(client.together, "training_batch", damaged)
    outcome = tiny_run(tmp_path, plan={"privacy": FAST, "training": {"rounds": 1, "steps_per_round": 1}})
    assert together == [SITES - 1]
    (record,) = outcome.run.records()
    assert record["admitted"] == sorted(f"site-{place}" for place in range(SITES) if place != 1)
    assert [each["reason"] for each in record["left_out"]] == ["failed"]
    assert charged(outcome)[1] == ["burnt"]
    assert [each for place, each in enumerate(charged(outcome)) if place != 1] == [["released"]] * 3


def test_a_failed_batch_releases_nothing_and_burns_every_site(
    tmp_path: Path, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = client.together.train_together, []

    def failing(*given, **named):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("user 17 watched film 3")
        return right(*given, **named)

    monkeypatch.setattr(client.together, "train_together", failing)
    outcome = tiny_run(tmp_path, plan={"privacy": FAST})
    assert charged(outcome) == [["burnt", "released"]] * SITES
    assert [record["aggregated"] for record in outcome.run.records()] == [False, True]
    said = "".join(
        path.read_text(errors="replace")
        for path in outcome.run.path.rglob("*")
        if path.suffix in (".log", ".jsonl")
    )
    assert "user 17" not in said


def test_a_model_that_cannot_be_trained_together_is_trained_one_by_one(
    tmp_path: Path, together: list[int]
) -> None:
    outcome = tiny_run(tmp_path, plan={"privacy": FAST, "model": {"family": "lstm-vae"}})
    assert together == []  # its noise is a function of its weights
    assert charged(outcome) == [["released"] * 2] * SITES


def test_a_plan_may_ask_a_part_of_the_sites_each_round(tmp_path: Path, together: list[int]) -> None:
    plan = {
        "privacy": FAST,
        "training": {"rounds": 6, "steps_per_round": 1},
        "server": {"sites_per_round": 2},
    }
    outcome = tiny_run(tmp_path, plan=plan)
    records = list(outcome.run.records())
    assert [len(record["admitted"]) for record in records] == [2] * 6
    assert len({tuple(record["admitted"]) for record in records}) > 1  # fails once in 6^5 runs
    assert sum(len(each) for each in charged(outcome)) == 12  # who is not asked is not charged
    assert not audit_receipts(outcome.run.path).lies
    assert len(outcome.run.asked(1)) == 2


def test_sites_may_answer_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations.answering, "TOGETHER_FROM", 2)
    monkeypatch.setattr(simulations.forking, "WORKERS_FROM", 2)
    monkeypatch.setattr(simulations.answering.os, "cpu_count", lambda: 2)
    outcome = tiny_run(tmp_path, plan={"privacy": FAST})
    assert charged(outcome) == [["released"] * 2] * SITES
    assert not audit_receipts(outcome.run.path).lies


def test_a_worker_that_dies_ends_the_run_with_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations.answering, "TOGETHER_FROM", 2)
    monkeypatch.setattr(simulations.forking, "WORKERS_FROM", 2)
    monkeypatch.setattr(simulations.answering.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(simulations.answering, "_begin", os.abort)
    with pytest.raises(RunError, match="a worker of the simulation died"):
        tiny_run(tmp_path, plan={"privacy": FAST})


def test_so_does_one_that_died_before_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(simulations.forking, "WORKERS_FROM", 2)
    monkeypatch.setattr(simulations.answering.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(simulations.answering.ProcessPoolExecutor, "submit", broken)
    with (
        pytest.raises(RunError, match="a worker of the simulation died"),
        simulations.answering.answering(simulations.answering.TOGETHER_FROM),
    ):
        pass


def test_a_ledger_that_cannot_even_burn_keeps_no_other_site_from_answering(
    tmp_path: Path, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = client.together.training_batch

    def full(charged_):  # type: ignore[no-untyped-def]
        if charged_.site.name == "site-1":
            charged_.ledger.disconnect()  # as on a disk that fails: nothing more can be written
            raise OSError("user 17 watched film 3")
        return right(charged_)

    monkeypatch.setattr(client.together, "training_batch", full)
    outcome = tiny_run(tmp_path, plan={"privacy": FAST, "training": {"rounds": 1, "steps_per_round": 1}})
    (record,) = outcome.run.records()
    assert len(record["admitted"]) == SITES - 1
    assert charged(outcome)[1] == ["open"]  # charged all the same
