"""Sweeps: every epsilon with every seed, a curve, what was looked at; interrupted, they go on where they stopped."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cli import main
from server.runs import RunFolder
from simulations import sweep_cli
from simulations.outcome import FEDTIDE
from simulations.sweep import Row, Sweep
from tests.tiny import own_cache, tiny_files, tiny_language_model


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    log, catalog = tiny_files(folder)
    return [
        *(
            "--log",
            str(log),
            "--catalog",
            str(catalog),
            "--encoder",
            str(tiny_language_model(folder / "model")),
        ),
        *("--users-per-site", "10", "--n-sites", "3", "--engine", "inline", "--rounds", "1", "--steps", "1"),
        *("--set", "model.width=8", "--baseline-epochs", "1", "--delta", "1e-4", "--offline"),
    ]


def sweep(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str, code: int = 0
) -> tuple[str, str]:
    with own_cache(tmp_path / "cache"), pytest.raises(SystemExit) as end:
        main(["sweep", "--runs", str(tmp_path / "runs"), *arguments])
    said = capsys.readouterr()
    assert end.value.code == code, said.err
    return said.out, said.err


def test_a_sweep_has_every_epsilon_with_every_seed_a_curve_and_a_statement(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = sweep(capsys, tmp_path, "--epsilon", "2,0.5", "--seeds", "2", *options)
    lines = [line for line in out.splitlines() if " on validation" in line]
    assert [line.partition(":")[0] for line in lines] == [f"{number} of 4" for number in range(1, 5)]
    plain = " ".join(out.split())
    assert (
        "2 settings were looked at, in 4 runs. Choosing the best of 2 by the test figures flatters" in plain
    )
    (folder,) = (tmp_path / "runs").iterdir()
    told = json.loads((folder / "results.json").read_bytes())
    assert told["settings_looked_at"] == 2
    assert [(row["epsilon"], row["seed"]) for row in told["rows"]] == [(2, 0), (0.5, 0), (2, 1), (0.5, 1)]
    for row in told["rows"]:
        assert row["spent"] <= row["epsilon"] + 1e-6
        run = RunFolder.finished(folder / "runs" / row["run"])
        assert run.plan().privacy.epsilon == row["epsilon"]
        assert ("no privacy" in row["test"]) == (row["epsilon"] == 2)  # once a seed
    for part in ("validation", "test"):
        for point in told["curve"][part]:
            values = [
                row[part][FEDTIDE]["NDCG@10"] for row in told["rows"] if row["epsilon"] == point["epsilon"]
            ]
            assert point["mean"] == pytest.approx(statistics.mean(values))
            assert point["standard_deviation"] == pytest.approx(statistics.stdev(values))
    assert (folder / "privacy-utility.png").read_bytes().startswith(b"\x89PNG")
    assert "| epsilon 0.5 |" in (folder / "summary.md").read_text()
    # A sweep that is done says the same again, and runs nothing.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    out, _ = sweep(capsys, tmp_path, "--resume", folder.name, "--json")
    assert json.loads(out) == told
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")} == before


def test_a_sweep_that_looks_at_no_test_says_so(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = sweep(capsys, tmp_path, "--epsilon", "1", "--seeds", "1", *options, "--no-test", "--json")
    told = json.loads(out)
    assert set(told["curve"]) == {"validation"}
    assert told["curve"]["validation"][0]["standard_deviation"] is None
    assert "nobody looked at the test split" in told["statement"]
    assert "test" not in told["rows"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--epsilon None must list different numbers above 0, such as 1,2,4,8"),
        (["--epsilon", "1,one"], "--epsilon '1,one' must list"),
        (["--epsilon", "1,1.0"], "must list different numbers"),
        (["--epsilon", "0,1"], "above 0"),
        (["--epsilon", "1", "--seeds", "0"], "--seeds is 0, but must be at least 1"),
        (["--epsilon", "1", "--seed", "3"], "--seed is no option of a sweep's runs: --seeds says how many"),
        (["--epsilon", "1", "--folds", "3"], "--folds is no option of a sweep's runs"),
        (["--epsilon", "1", "--sites", "s"], "each run has sites of its own"),
        (["--epsilon", "1", "--name", "n"], "named by epsilon and seed"),
        (["--epsilon", "1", "--family", "oracle"], "family 'oracle' is unknown"),
        (["--epsilon", "1", "--log", "nowhere.csv"], "nowhere.csv"),
        (["--resume", "nowhere"], "there is no sweep nowhere"),
        (["--resume", "nowhere", "--epsilon", "2"], "leave --epsilon and simulate's options out"),
        (["--resume", "nowhere", "--n-sites", "2"], "leave --epsilon and simulate's options out"),
    ],
)
def test_what_a_sweep_cannot_take_is_one_line_and_leaves_no_folder(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = sweep(capsys, tmp_path, *arguments, code=2)
    assert words in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True


def test_an_option_that_no_simulation_knows_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = sweep(capsys, tmp_path, "--epsilon", "1", "--colour", "red", code=2)
    assert "--colour" in err
    assert not (tmp_path / "runs").exists()


def test_names_of_rows_are_names_of_plans_and_tell_rows_apart() -> None:
    from common.config import make_plan

    rows = [Row(epsilon, seed) for epsilon in (1.0, 0.1, 10.0, 1.5, 15.0, 1e-5, 1e9) for seed in (0, 1, 11)]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert all(make_plan({"name": name}).name == name for name in names)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on_where_it_stopped(
    sent: signal.Signals, options: list[str], tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "FEDTIDE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(sweep_cli.__file__).parent.parent),
    }
    command = [sys.executable, "-m", "common.cli", "sweep", "--epsilon", "2,8", "--seeds", "1", "--json"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*command, *options, "--runs", "here"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    end = time.monotonic() + 200
    second = "here/*-sweep/runs/*epsilon-8-seed-0.incomplete/rounds.jsonl"
    while process.poll() is None and time.monotonic() < end and not list(tmp_path.glob(second)):
        time.sleep(0.02)
    process.send_signal(sent)
    _, err = process.communicate(timeout=100)
    (folder,) = (tmp_path / "here").iterdir()
    if sent == signal.SIGINT:
        assert process.returncode == 130, err[-3000:]
        assert "interrupted: 1 of 2 runs are done, and stay so; to go on:" in err
        line = err.splitlines()[-1]
    else:
        line = f"{sys.executable} -m common.cli sweep --resume {folder}"
    (whole,) = (path for path in (folder / "runs").iterdir() if not path.name.endswith(".incomplete"))
    kept = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    again = subprocess.run(
        f"{line} --json",
        shell=True,
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(again.stdout)["runs"] == 2
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == kept
    assert Sweep.found(str(folder), tmp_path).run_of(Row(8.0, 0)) is not None
    (other,) = (path for path in (folder / "runs").iterdir() if path != whole)
    assert "interrupted and went on, once" in (other / "summary.md").read_text()
