"""Whole federations: both engines agree, epsilons can be recomputed, and what did not end well never looks whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution

from common.config import read_plan
from server.runs import INCOMPLETE, RunError, RunFolder
from simulations.outcome import CONTENT, FEDTIDE, POPULARITY, Outcome
from tests.tiny import SITES, own_cache, tiny_files, tiny_language_model, tiny_run


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return tiny_run(tmp_path_factory.mktemp("inline"), baseline_epochs=1)


def recomputed_epsilon(events: list[dict[str, str]], delta: float) -> float:
    """dp-accounting's PLD of recorded events, by none of our code."""
    composed = None
    for event in events:
        assert event["mechanism"] == "poisson_subsampled_gaussian"
        step = privacy_loss_distribution.from_gaussian_mechanism(
            float(event["noise_multiplier"]),
            value_discretization_interval=1e-3,
            sampling_prob=float(event["sampling_rate"]),
        ).self_compose(int(event["steps"]))
        composed = step if composed is None else composed.compose(step)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


def test_the_epsilon_of_a_run_is_dp_accountings_recomputed_from_its_recorded_events(inline: Outcome) -> None:
    record = json.loads((inline.run.path / "privacy.json").read_text())
    assert len(record["sites"]) == SITES
    for site in record["sites"]:
        assert [event["round"] for event in site["events"]] == [1, 2]
        epsilon = recomputed_epsilon(site["events"], site["delta"])
        assert site["epsilon_pld"] == pytest.approx(epsilon, abs=1e-9)
        assert epsilon <= site["epsilon_prv"] <= epsilon + 0.02 + 0.001 * epsilon
        assert epsilon <= site["epsilon_rdp"]
        assert epsilon <= site["budget_epsilon"]
    assert inline.privacy.epsilon == pytest.approx(record["epsilon"])
    # The check can fail: one event less is another epsilon.
    assert recomputed_epsilon(record["sites"][0]["events"][:1], 1e-5) < inline.privacy.epsilon - 0.01


def test_a_finished_run_holds_plan_model_metrics_privacy_plots_and_summary(inline: Outcome) -> None:
    folder = inline.run.path
    assert not folder.name.endswith(INCOMPLETE)
    assert read_plan(folder / "plan.json") == inline.plan
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("round") for line in lines] == [1, 2, None]
    assert set(lines[-1]["test"]) >= {FEDTIDE, CONTENT, POPULARITY}
    for plot in ("quality-by-round.png", "epsilon-by-round.png", "privacy-utility.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    summary = (folder / "summary.md").read_text()
    assert "Site-level DP" in summary
    assert "from this run, against everyone outside" in summary
    assert "epsilon over all runs of a site's ledger (this run alone)" in summary
    assert "they are private" in summary
    assert len((folder / "receipts.jsonl").read_text().splitlines()) == 2 * SITES
    assert RunFolder.finished(folder).model_state().keys() == inline.run.round_state(0).keys()


def test_rounds_record_nothing_that_a_site_did_not_release(inline: Outcome) -> None:
    allowed = {
        *("round", "admitted", "left_out", "missing", "aggregated", "bytes_down", "bytes_up", "update_norm"),
        *("seconds", "phase", "metrics"),
    }
    for record in inline.run.records():
        assert set(record) <= allowed
        assert sorted(record["admitted"]) == [f"site-{number}" for number in range(SITES)]


def test_flowers_engine_and_one_process_agree_on_sites_steps_and_epsilon(
    inline: Outcome, tmp_path: Path
) -> None:
    flower = tiny_run(tmp_path, engine="flower")
    assert [(s.name, s.users, s.events) for s in flower.sites] == [
        (s.name, s.users, s.events) for s in inline.sites
    ]
    assert flower.plan.steps == inline.plan.steps
    assert flower.privacy.epsilon == inline.privacy.epsilon
    assert [len(record["admitted"]) for record in flower.run.records()] == [SITES, SITES]
    assert processes_with(str(tmp_path)) == []


def processes_with(marker: str) -> list[int]:
    """Processes other than this one whose environment or command names `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                zombie = b") Z " in (entry / "stat").read_bytes()
            except OSError:
                continue
            if marker.encode() in text and not zombie:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("engine", ["inline", "flower"])
def test_an_interrupted_run_says_so_looks_unfinished_and_leaves_no_process(
    tmp_path: Path, engine: str
) -> None:
    model = tiny_language_model(tmp_path / "model")
    log, catalog = tiny_files(tmp_path / "data")
    command = [
        *(sys.executable, "-m", "common.cli", "simulate", "--log", str(log), "--catalog", str(catalog)),
        *(
            "--encoder",
            str(model),
            "--users-per-site",
            "10",
            "--n-sites",
            "4",
            "--engine",
            engine,
            "--offline",
        ),
        *("--rounds", "500", "--steps", "1", "--baseline-epochs", "0", "--runs", str(tmp_path / "runs")),
        *("--set", "model.width=8", "--epsilon", "50", "--site-budget", "400"),
    ]
    environment = {**os.environ, "FEDTIDE_HOME": str(tmp_path / "cache")}
    # A runner in the background may ignore interrupts, and its children would with it.
    handler_before = signal.signal(signal.SIGINT, signal.default_int_handler)
    run = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, handler_before)
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(tmp_path.glob("runs/*/rounds.jsonl")) and run.poll() is None:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith(INCOMPLETE)
    assert not (folder / "summary.md").exists()
    with pytest.raises(RunError, match="did not end well"):
        RunFolder.finished(folder)
    end = time.monotonic() + 10  # what was killed may take a moment to go
    while processes_with(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_with(str(tmp_path)) == []


def test_recommend_prints_ten_titles_for_a_history(
    inline: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.cli import main

    titles = inline.run.catalog().texts
    home = inline.run.path.parent.parent / "cache"
    with own_cache(home), pytest.raises(SystemExit) as end:
        main(
            [
                *("recommend", "--run", str(inline.run.path), "--json", "--offline"),
                *("--history", f"{titles[0]}; {titles[3].upper()}; a golden bicycle on a mountain road"),
            ]
        )
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [event["exact"] for event in found["history"]] == [True, True, False]
    assert len(found["items"]) == 10
    assert not {titles[0], titles[3]} & {item["text"] for item in found["items"]}
