"""Before a run begins: what it costs each site, whether it can be finished, and what would fit where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.ledger import Ledger
from common.config import Plan, PlanError, make_plan
from common.privacy.mechanisms import PoissonSubsampledGaussian
from server import runs
from server.cli import app
from server.deployment import Deployment, open_locked
from server.fitting import fit_of_plan, fit_of_rest
from server.launch import (
    DoesNotFitError,
    LaunchError,
    Watcher,
    discard,
    find_run,
    launch,
    named,
    prepare_plan,
)
from server.overview import overview
from server.registry import Registry, RegistryReader
from server.runs import RunError, RunFolder
from server.setup import make_server
from tests.server.test_launch import begin, fill, model
from tests.tiny import tiny_plan

__all__ = ["model"]

TYPICAL = [PoissonSubsampledGaussian(sampling_rate=0.5, noise_multiplier=4.0, steps=100)]
SMALL = {"privacy": {"users_per_site": 100}, "training": {"rounds": 10}}
"""A plan that states no noise of its own."""


@pytest.fixture
def server(tmp_path: Path) -> Deployment:
    """Two sites, of which south has spent nearly all of its budget."""
    made = Deployment(tmp_path / "server", "127.0.0.1")
    make_server(made)
    registry = Registry(made.registry)
    for name in ("north", "south"):
        with Ledger.create(tmp_path / name, epsilon=12.0, delta=1e-5, typical_plan=TYPICAL) as ledger:
            chain = registry.chain(registry.enroll(name, ledger.entries()[0]).key_id)
            if name == "south":
                event = PoissonSubsampledGaussian(sampling_rate=0.5, noise_multiplier=4.0, steps=150)
                ledger.reserve(
                    run="before", round=1, attempt=1, nonce="0" * 32, event=event,
                    plan_hash="a" * 64, model_hash="b" * 64,
                    clip_norm=1.0, normaliser=50.0, learning_rate=0.1,
                )  # fmt: skip
                registry.accept(chain.extended(ledger.entries()[1:]))
    return made


def fits(server: Deployment, plan: Plan) -> tuple[int, dict[str, object]]:
    file = server.folder.parent / "plan.json"
    file.write_text(plan.to_json())
    done = CliRunner().invoke(app, ["fits", str(server.folder), str(file), "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.output)


def test_a_plan_that_enough_sites_can_pay_for_is_said_to_fit_with_what_each_has_left(
    server: Deployment,
) -> None:
    code, found = fits(server, make_plan({**SMALL, "server": {"minimum_sites": 1}}))
    assert (code, found["fits"], found["rounds"], found["sites_that_can_pay"]) == (0, True, 10, 1)
    north, south = found["sites"]  # type: ignore[misc]
    assert north["fits"]
    assert north["left"] == 1.0
    assert not south["fits"]
    assert 0 <= south["rounds_that_fit"] < 10
    assert found["would_fit"] == {"epsilon": None, "training_rounds": None, "noise_multiplier": None}


def test_what_would_fit_fits(server: Deployment) -> None:
    plan = make_plan({**SMALL, "server": {"minimum_sites": 2}})
    code, found = fits(server, plan)
    assert (code, found["fits"], found["sites_that_can_pay"]) == (1, False, 1)
    would = found["would_fit"]
    assert isinstance(would, dict)
    smaller = plan.model_dump()
    smaller["privacy"]["epsilon"] = would["epsilon"]
    assert fits(server, make_plan(smaller))[0] == 0
    fewer = plan.model_dump()
    fewer["privacy"]["noise_multiplier"] = would["noise_multiplier"]
    fewer["training"]["rounds"] = would["training_rounds"]
    assert fits(server, make_plan(fewer))[0] == 0
    fewer["training"]["rounds"] += 1
    assert fits(server, make_plan(fewer))[0] == 1
    said = (
        CliRunner().invoke(app, ["fits", str(server.folder), str(server.folder.parent / "plan.json")]).output
    )
    assert "does not fit" in said
    assert "It cannot be finished" in said


def test_more_requests_than_a_budget_admits_fit_at_no_noise(server: Deployment) -> None:
    written = make_plan(
        {"privacy": {"noise_multiplier": 1e5}, "training": {"rounds": 1001, "steps_per_round": 1}}
    )
    found = fit_of_plan(prepare_plan(server, written), written, RegistryReader(server.registry))
    assert not found.fits
    assert found.epsilon is None
    assert found.most_rounds == 999  # the thousandth is rounded up


def test_a_run_that_cannot_be_finished_is_refused_before_anything_is_made(
    server: Deployment, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(make_plan({**SMALL, "server": {"minimum_sites": 2}}).to_json())
    seen: list[bool] = []
    watcher = Watcher()
    watcher.on_fit = lambda fit: seen.append(fit.fits)
    with open_locked(server.folder / "up.lock") as mine:  # as if it were up
        assert mine
        with pytest.raises(
            DoesNotFitError, match=r"10 rounds fit the budgets of 1 of 2 sites, .*what would fit: priv"
        ):
            launch(server, file, None, watcher)
        done = CliRunner().invoke(app, ["run", str(server.folder), str(file), "--json"])
    assert seen == [False]
    assert isinstance(done.exception, DoesNotFitError)
    assert json.loads(done.stdout)["status"] == "refused"
    assert list(server.runs.iterdir()) == []


def test_the_rest_of_a_run_does_not_count_what_is_paid(server: Deployment, tmp_path: Path) -> None:
    plan = make_plan(
        {**SMALL, "privacy": {"users_per_site": 100, "noise_multiplier": 4.0, "sampling_rate": 0.5}}
    )
    schedule = plan.schedule()
    reader = RegistryReader(server.registry)
    before = {each.site: each.cost for each in fit_of_rest(plan, schedule, "before", reader).budgets}
    other = {each.site: each.cost for each in fit_of_rest(plan, schedule, "another", reader).budgets}
    assert before["north"] == other["north"]
    assert before["south"] == other["south"] * 9 // 10


# --- names, versions, and runs that are given up


def test_another_name_begins_another_run(server: Deployment, model: Path, tmp_path: Path) -> None:
    plan = tiny_plan(model)
    run = begin(server, plan, tmp_path)
    assert find_run(server, plan, None) == run
    assert find_run(server, named(plan, "second"), None) is None
    assert named(plan, None) == plan
    with pytest.raises(PlanError, match="name"):
        named(plan, "No Name")


def test_an_unfinished_run_of_another_version_is_refused_in_one_sentence_before_anything_is_recorded(
    server: Deployment, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.server.test_app import nobody, start

    plan = tiny_plan(model)
    run = begin(server, plan, tmp_path)
    before = sorted(path.name for path in run.path.rglob("*"))
    said = json.loads(run.version_file.read_bytes())
    for note in (
        json.dumps({**said, "code": "f" * 64}),
        "",
        None,
    ):  # another; damaged; from before there were notes
        run.version_file.write_text(note) if note is not None else run.version_file.unlink()
        for go_on in (
            lambda: find_run(server, plan, None),
            lambda: find_run(server, None, run.name),
            lambda: start(nobody(), **{"run-dir": str(run.path)}),
        ):
            with pytest.raises(RunError, match="begun by another version of Fedtide") as caught:
                go_on()
            assert f"`fedtide server discard {server.folder} {run.name}`" in str(caught.value)
            assert "\n" not in str(caught.value)
        assert run.ending() is None
    run.version_file.write_text(json.dumps(said))
    assert sorted(path.name for path in run.path.rglob("*") if path.name != ".lock") == before
    assert find_run(server, plan, None) == run
    monkeypatch.setattr(runs, "installed_version", lambda: {"code": "e" * 64, "version": "9"})
    with pytest.raises(RunError, match="this one is 9"):
        find_run(server, plan, None)
    run.save_ending("completed")  # nothing is left to be asked
    assert find_run(server, None, run.name) == run


def test_a_plan_of_another_version_keeps_no_other_plan_from_its_runs(
    server: Deployment, model: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(model)
    old, run = begin(server, plan, tmp_path), begin(server, named(plan, "second"), tmp_path)
    file = old.path / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"of_later": 1}))
    old.version_file.unlink()
    assert find_run(server, named(plan, "second"), None) == run
    with pytest.raises(RunError, match="another version"):
        find_run(server, plan, None)


def test_a_discarded_run_is_never_taken_up_again_and_its_receipts_stay(
    server: Deployment, model: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(model)
    run = begin(server, plan, tmp_path)
    run.receipts_file.write_text("{}\n")
    with run.at_work(), pytest.raises(RunError, match="another process is at work"):
        discard(server, run.name)
    done = CliRunner().invoke(app, ["discard", str(server.folder), run.name])
    assert "stays charged, and its receipts are kept" in " ".join(done.output.split())
    away = server.runs / f"{run.name}.discarded"
    assert (away / "receipts.jsonl").read_text() == "{}\n"
    assert find_run(server, plan, None) is None
    (line,) = overview(server).runs
    assert (line.name, line.state) == (run.name, "discarded")
    for again in (lambda: find_run(server, None, run.name), lambda: discard(server, run.name)):
        with pytest.raises(
            LaunchError, match=f"is no unfinished run in .* `fedtide server status {server.folder}`"
        ):
            again()
    with pytest.raises(RunError, match="did not end well"):
        RunFolder.finished(away)


def test_a_run_whose_rounds_are_over_is_not_said_to_go_on(
    server: Deployment, model: Path, tmp_path: Path
) -> None:
    from server.launch import conclude

    run = begin(server, tiny_plan(model), tmp_path)
    fill(run, 1)
    run.save_ending("failed", "no round was aggregated")
    with pytest.raises(LaunchError, match="the same command goes on where it stopped"):
        conclude(server, run, "finished:failed")
    run.rounds_file.unlink()
    fill(run, 2)
    with pytest.raises(
        LaunchError, match=f"`fedtide server discard {server.folder} {run.name}` puts it away"
    ):
        conclude(server, run, "finished:failed")
