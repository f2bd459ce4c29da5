"""Which run `fedtide server run` goes on with, and when it says that a run ended well; no Flower is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.ledger import Ledger
from common.config import Plan, PlanError
from common.events.catalog import CatalogFile
from common.privacy.mechanisms import GaussianSum
from server.cli import app
from server.deployment import Deployment, NotRunningError
from server.launch import (
    PRIVACY,
    CutOffError,
    LaunchError,
    Watcher,
    begin_run,
    conclude,
    find_run,
    follow,
    launch,
    prepare_plan,
)
from server.registry import Registry
from server.runs import RunFolder, append_line
from server.setup import make_server
from tests.tiny import own_cache, tiny_files, tiny_language_model, tiny_plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(tmp_path: Path) -> Deployment:
    made = Deployment(tmp_path / "server", "127.0.0.1")
    make_server(made)
    for name in ("north", "south"):
        with Ledger.create(
            tmp_path / name, epsilon=4.0, delta=1e-6, typical_plan=[GaussianSum(8.0)]
        ) as ledger:
            Registry(made.registry).enroll(name, ledger.entries()[0])
    return made


def begin(server: Deployment, plan: Plan, tmp_path: Path) -> RunFolder:
    _, catalog = tiny_files(tmp_path / "data")
    with own_cache(tmp_path / "cache"):
        return begin_run(server, plan, CatalogFile(catalog), offline=True)


def test_a_new_run_has_a_calibrated_plan_and_the_seeded_start(
    server: Deployment, model: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(model)
    assert find_run(server, plan, None) is None
    run = begin(server, plan, tmp_path)
    assert run.path.parent == server.runs
    assert run.plan().server.expected_sites == 2
    assert run.plan().privacy.noise_multiplier == 2.0
    assert run.plan().catalog == run.catalog().digest()
    with pytest.raises(PlanError, match="the same file, its items in the same order"):
        begin(server, plan.for_catalog("a" * 64), tmp_path)
    again = begin(server, plan, tmp_path)
    start, same = run.round_state(0), again.round_state(0)
    assert start.keys() == same.keys() != set()
    assert all(bool((start[name] == same[name]).all()) for name in start)


def test_the_same_command_goes_on_and_another_plan_of_that_name_is_refused(
    server: Deployment, model: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(model)
    run = begin(server, plan, tmp_path)
    assert find_run(server, plan, None) == run
    assert find_run(server, None, run.name) == run
    assert find_run(server, None, str(run.path)) == run
    # A site that was enrolled meanwhile changes no plan that was begun.
    with Ledger.create(tmp_path / "new", epsilon=4.0, delta=1e-6, typical_plan=[GaussianSum(8.0)]) as ledger:
        Registry(server.registry).enroll("new", ledger.entries()[0])
    assert find_run(server, plan, None) == run
    assert find_run(server, tiny_plan(model, name="other"), None) is None
    with pytest.raises(LaunchError, match=f"--resume {run.name}"):
        find_run(server, tiny_plan(model, training={"rounds": 3}), None)
    other = begin(server, plan, tmp_path)
    with pytest.raises(LaunchError, match=f"{run.name}, {other.name}"):
        find_run(server, plan, None)
    with pytest.raises(LaunchError, match="is no unfinished run"):
        find_run(server, plan, "nothing")
    with pytest.raises(LaunchError, match="give a plan"):
        find_run(server, None, None)


def test_too_few_sites_are_said_before_anything_is_made(
    server: Deployment, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"2 sites take part, but server.minimum_sites needs 3"):
        prepare_plan(server, tiny_plan(model, server={"minimum_sites": 3}))
    empty = Deployment(tmp_path / "empty", "h")
    make_server(empty)
    with pytest.raises(LaunchError, match="no site is enrolled"):
        prepare_plan(empty, tiny_plan(model))
    with pytest.raises(LaunchError, match="needs --catalog"):
        begin_run(server, tiny_plan(model), None, offline=True)
    assert list(server.runs.iterdir()) == []


def fill(run: RunFolder, rounds: int) -> None:
    for number in range(1, rounds + 1):
        append_line(
            run.rounds_file,
            {"round": number, "phase": "update", "admitted": [], "left_out": [], "missing": 0, "aggregated": True,
             "bytes_down": 0, "bytes_up": 0, "update_norm": 0.0, "seconds": 0.0},
        )  # fmt: skip


def test_only_the_runs_own_ending_and_rounds_make_it_whole(
    server: Deployment, model: Path, tmp_path: Path
) -> None:
    run = begin(server, tiny_plan(model), tmp_path)
    fill(run, 1)
    with pytest.raises(CutOffError, match=r"cut off after 1 of 2 rounds .*finished:completed"):
        conclude(server, run, "finished:completed")
    run.save_ending("failed", "the disk is full")
    with pytest.raises(LaunchError, match="the run ended early: the disk is full"):
        conclude(server, run, "finished:completed")
    run.save_ending("completed")
    with pytest.raises(LaunchError, match="has 1 of 2 rounds"):
        conclude(server, run, "finished:completed")
    assert run.path.is_dir()
    append_line(run.rounds_file, {"round": 2})
    run.save_model(run.round_state(0))
    done = conclude(server, run, "finished:failed")
    assert not done.path.name.endswith(".incomplete")
    assert json.loads((done.path / PRIVACY).read_bytes())["epsilon"] == 0.0  # nobody was charged here
    assert "there are no test figures" in (done.path / "summary.md").read_text()
    # Another command that follows the same run finds it whole.
    assert conclude(server, run, "finished:completed") == done
    assert follow(server, run, 1, Watcher()) == done
    done.path.rename(server.runs / "elsewhere")
    with pytest.raises(LaunchError, match="is gone"):
        conclude(server, run, "finished:completed")


def test_a_server_that_is_down_is_said_first(server: Deployment, model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(tiny_plan(model).to_json())
    with pytest.raises(NotRunningError, match="fedtide server up"):
        launch(server, plan, None, Watcher())
    for command in (["run", str(server.folder), str(plan)], ["run", str(server.folder), str(plan), "--stop"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code != 0
        assert isinstance(done.exception, NotRunningError | LaunchError)
    assert list(server.runs.iterdir()) == []
