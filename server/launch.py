"""`fedtide server run`: begins a run or goes on with one, hands it to the server, and follows it to its end.

The truth is in the run's folder (its ending and its rounds) and in Flower's list of runs; an exit code tells neither.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.bundle import REGISTRY_DIR, RUN_DIR, bundle_data
from common.config import Plan, make_plan, read_plan
from server.aggregation import check_aggregation
from server.bundle_guard import want, want_no_more
from server.control import control
from server.deployment import Deployment, NotRunningError, open_locked
from server.fitting import Fit, fit_of_plan, fit_of_rest
from server.nodes import FlowerRun, flower_runs
from server.privacy_record import privacy_record
from server.registry import RegistryReader
from server.runs import INCOMPLETE, RunError, RunFolder, write_whole
from server.summary import write_summary

if TYPE_CHECKING:
    from common.events.catalog import CatalogFile

PRIVACY = "privacy.json"

_LOOK_SECONDS = 0.5
_FLOWER_SECONDS = 10.0
_SUBMIT_SECONDS = 60.0
_AFTER_ENDING_SECONDS = 20.0


class LaunchError(RuntimeError):
    """A run did not end well, or cannot be begun; the message says why and what to do."""


class DoesNotFitError(LaunchError):
    """The plan, or what remains of a run, cannot be finished with the budgets that sites have left."""

    def __init__(self, said: str, fit: Fit) -> None:
        super().__init__(said)
        self.fit = fit


class CutOffError(LaunchError):
    """The ServerApp ended without a word."""


@dataclass
class Watcher:
    """What a console is told; every hook does nothing unless it is replaced."""

    on_phase: Callable[[str], None] = lambda phase: None
    on_fit: Callable[[Fit], None] = lambda fit: None
    on_waiting: Callable[[int, int], None] = lambda round, more: None
    on_begin: Callable[[RunFolder, Plan, bool], None] = lambda run, plan, again: None
    on_round: Callable[[dict[str, Any]], None] = lambda record: None


def prepare_plan(server: Deployment, plan: Plan, expected_sites: int | None = None) -> Plan:
    """The calibrated plan, with the number of enrolled sites where it expects none.

    Raises:
        PlanError: it cannot be calibrated, or there are too few sites for it.
    """
    sites = sum(not site.shut_out for site in RegistryReader(server.registry).sites())
    if not sites:
        raise LaunchError("no site is enrolled: `fedtide server enroll` takes a site's enrolment file")
    check_aggregation(plan.server, sites)
    if plan.server.expected_sites is None:
        changed = plan.server.model_copy(update={"expected_sites": expected_sites or sites})
        plan = plan.model_copy(update={"server": changed})
    return plan.calibrated()


def unfinished_runs(server: Deployment, name: str) -> list[RunFolder]:
    """The runs of a plan's name that are not whole yet, oldest first."""
    folders = (path for path in server.runs.glob(f"*{INCOMPLETE}") if (path / "plan.json").is_file())
    runs = sorted(map(RunFolder, folders), key=lambda run: run.name)
    return [run for run in runs if _plan_name(run) == name]


def _plan_name(run: RunFolder) -> str:
    """The name in a run's plan, which another version may have written, with fields unknown here."""
    try:
        return str(json.loads((run.path / "plan.json").read_bytes())["name"])
    except (ValueError, KeyError, TypeError):
        return ""


def find_run(server: Deployment, plan: Plan | None, resume: str | None) -> RunFolder | None:
    """The unfinished run that a command goes on with, if there is one.

    Raises:
        LaunchError: the named run is not there or is whole; or it is not clear which run is meant.
        RunError: another version began it.
    """
    if resume is not None:
        path = server.runs / (Path(resume).name.removesuffix(INCOMPLETE) + INCOMPLETE)
        if not (path / "plan.json").is_file():
            raise LaunchError(
                f"{resume} is no unfinished run in {server.runs}: `fedtide server status {server.folder}` lists "
                "the runs"
            )
        return _of_this_version(RunFolder(path))
    if plan is None:
        raise LaunchError("give a plan, or --resume with the name of an unfinished run")
    found = unfinished_runs(server, plan.name)
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(run.name for run in found)
        raise LaunchError(
            f"several runs of plan {plan.name!r} are unfinished ({names}): choose one with --resume"
        )
    run = _of_this_version(found[0])
    begun = run.plan()
    if plan.catalog is None:
        plan = plan.model_copy(update={"catalog": begun.catalog})
    if prepare_plan(server, plan, begun.server.expected_sites).digest() != begun.digest():
        raise LaunchError(
            f"the unfinished run {run.name} has another plan of the name {plan.name!r}: `--resume {run.name}` goes on "
            "with it, and `--name` with another one begins a new run"
        )
    return run


def _of_this_version(run: RunFolder) -> RunFolder:
    """The run, unless it has still to be worked on and another version began it; see `RunFolder.check_version`."""
    ending = run.ending()
    if ending is None or ending["status"] != "completed":
        run.check_version()
    return run


def named(plan: Plan, name: str | None) -> Plan:
    """The plan under another name, where one is given.

    Raises:
        PlanError: it is none.
    """
    return plan if name is None else make_plan(plan.model_dump() | {"name": name})


def discard(server: Deployment, name: str) -> Path:
    """Puts an unfinished run away; where it lies then.

    Raises:
        LaunchError: there is no such run, or the server is at work on it.
        RunError: a process is at work in its folder.
    """
    name = Path(name).name.removesuffix(INCOMPLETE)
    run = RunFolder(server.runs / (name + INCOMPLETE))
    if not (run.path / "plan.json").is_file():
        raise LaunchError(
            f"{name} is no unfinished run in {server.runs}: `fedtide server status {server.folder}` lists the runs"
        )
    active = flower_run(server, run)
    if server.running() and active is not None and active.active:
        raise LaunchError(
            f"the server is at work on {name}: `fedtide server run {server.folder} --resume {name} --stop` ends that"
        )
    want_no_more(run.path)
    return run.discard()


def begin_run(
    server: Deployment,
    plan: Plan,
    catalog_file: CatalogFile | None,
    *,
    offline: bool,
    say: Callable[[str], None] = lambda _: None,
) -> RunFolder:
    """A new run's folder, with the model's seeded start.

    Args:
        say: told what is to be known of the catalog's file.

    Raises:
        LaunchError: no catalog is given.
        PlanError, LogError, AssetError, LanguageModelError, RunError: what was given is wrong.
    """
    from common.assets import home, language_model
    from common.models.build import build_model, item_texts

    if catalog_file is None:
        raise LaunchError("a new run needs --catalog: the public catalog that the sites have, too")
    catalog = catalog_file.read(say)
    plan = prepare_plan(server, plan.for_catalog(catalog.digest()))
    built = build_model(
        plan.model,
        item_texts(catalog.texts, catalog.categories),
        language_model(plan.model.encoder, offline=offline),
        cache=home() / "item-vectors",
        categories=catalog.categories,
        witness_places=plan.privacy.witness_places,
    )
    run = RunFolder.create(server.runs, plan, catalog)
    run.save_round(0, built.model.trainable_state())
    return run


def flower_run(server: Deployment, run: RunFolder) -> FlowerRun | None:
    """The latest that Flower made of a run, if anything."""
    found = [each for each in flower_runs(server) if os.path.normpath(each.run_dir) == str(run.path)]
    return found[-1] if found else None


def submit(server: Deployment, run: RunFolder) -> tuple[int, bool]:
    """Hands a run to the server, unless it is at work on it; Flower's number of it, and whether it is a new one.

    Raises:
        NotRunningError, DeploymentError: the server is down or refuses.
        LaunchError: another command does not let go of the server.
    """
    with open_locked(server.folder / "submit.lock", _SUBMIT_SECONDS) as mine:
        if not mine:
            raise LaunchError(
                "another `fedtide server run` is beginning and does not come to an end: look at it"
            )
        return _submit(server, run)


def _submit(server: Deployment, run: RunFolder) -> tuple[int, bool]:
    active = flower_run(server, run)
    if active is not None and active.active:
        return active.run_id, False
    run.ending_file.unlink(missing_ok=True)
    want_no_more(run.path)
    with control(server) as asked:
        config = {RUN_DIR: str(run.path), REGISTRY_DIR: str(server.registry)}
        flower_id = asked.start(bundle_data(), config)
        want(run.path, flower_id)
        return flower_id, True


def stop(server: Deployment, run: RunFolder) -> bool:
    """Ends the server's work on a run, whose folder stays as it is; whether there was any."""
    want_no_more(run.path)
    active = flower_run(server, run)
    if active is None or not active.active:
        return False
    with control(server) as asked:
        asked.stop(active.run_id)
    return True


def follow(server: Deployment, run: RunFolder, flower_id: int, watcher: Watcher) -> RunFolder:
    """Tells of each round until the run ends, and gives its folder under its final name.

    Raises:
        LaunchError: the run did not end well, or the server went down.
    """
    seen, look, waiting = 0, time.monotonic() + _FLOWER_SECONDS, None
    ended_at: float | None = None
    while True:
        for record in list(run.records())[seen:]:
            seen += 1
            watcher.on_round(record)
        if not run.path.is_dir():  # whoever else followed it was quicker
            return _whole(run)
        if (now_waiting := run.waiting()) != waiting:
            waiting = now_waiting
            if waiting is not None:
                watcher.on_waiting(waiting["round"], waiting["more"])
        if run.ending() is not None:
            ended_at = ended_at or time.monotonic()
        now = time.monotonic()
        if ended_at or now > look:
            look = now + _FLOWER_SECONDS
            status, details = _flower_says(server, flower_id)
            ended = status.startswith("finished")
            if ended or (ended_at and now - ended_at > _AFTER_ENDING_SECONDS):
                for record in list(run.records())[seen:]:
                    watcher.on_round(record)
                return conclude(server, run, f"{status} {details}".strip())
        time.sleep(_LOOK_SECONDS)


def _flower_says(server: Deployment, flower_id: int) -> tuple[str, str]:
    try:
        with control(server) as asked:
            return asked.run_says(flower_id)
    except NotRunningError as error:
        if server.running():  # SuperLink is being restarted
            return "unknown", ""
        raise LaunchError(
            f"the server went down; start it with `fedtide server up {server.folder}`, and run the same command again: "
            "the run goes on where it stopped"
        ) from error


def conclude(server: Deployment, run: RunFolder, flower: str) -> RunFolder:
    """The whole run's folder with its privacy record, if its rounds and its ending say that it is whole.

    Args:
        flower: what Flower says of it, for the message.

    Raises:
        LaunchError: it did not end well.
    """
    if not run.path.is_dir():
        return _whole(run)
    ending, rounds, planned = run.ending(), len(list(run.records())), len(run.plan().schedule())
    again = "the same command goes on where it stopped"
    if rounds >= planned:  # nothing is left to be asked, so it would fail again
        again = (
            f"as all its rounds are over, `fedtide server discard {server.folder} {run.name}` puts it away, and the "
            "same command begins a new run"
        )
    if ending is None:
        raise CutOffError(
            f"the run was cut off after {rounds} of {planned} rounds (Flower says: {flower}); {again}; "
            f"{run.path} is kept"
        )
    if ending["status"] != "completed":
        raise LaunchError(f"the run ended early: {ending['reason']}; {run.path} is kept, and {again}")
    if rounds != planned or not (run.path / "model.safetensors").is_file():
        raise LaunchError(
            f"the run says that it is complete, but has {rounds} of {planned} rounds; {run.path} is kept as it is"
        )
    record = privacy_record(run, run.plan(), RegistryReader(server.registry))
    try:
        write_whole(run.path / PRIVACY, json.dumps(record.as_json(), indent=2).encode() + b"\n")
        write_summary(run, run.plan(), record)
        return run.finish()
    except (OSError, RunError):
        if run.path.is_dir():
            raise
        return _whole(run)  # another command that follows it was quicker


def _whole(run: RunFolder) -> RunFolder:
    try:
        return RunFolder.finished(run.path.with_name(run.name))
    except RunError as error:
        raise LaunchError(f"the folder {run.path} is gone: was it moved?") from error


def launch(
    server: Deployment,
    plan_file: Path | None,
    catalog_file: CatalogFile | None,
    watcher: Watcher,
    *,
    resume: str | None = None,
    name: str | None = None,
    offline: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> RunFolder:
    """Begins a run or goes on with one, and follows it to its end.

    Args:
        name: of the plan, in place of its own.
        say: told what is to be known of the catalog's file.

    Raises:
        DoesNotFitError: it could not be finished with the budgets that sites have left; nothing was begun or asked.
        LaunchError: the run did not end well, or it is not clear what is meant.
        NotRunningError, DeploymentError, PlanError, RunError: the server is down, or what was given is wrong.
    """
    if not server.running():
        raise NotRunningError(f"the server is not up: start it with `fedtide server up {server.folder}`")
    plan = None if plan_file is None else named(read_plan(plan_file), name)
    run = find_run(server, plan, resume)
    again = run is not None
    if run is None:
        assert plan is not None
        _check_fits(fit_of_plan(prepare_plan(server, plan), plan, RegistryReader(server.registry)), watcher)
        watcher.on_phase("building the model's start")
        run = begin_run(server, plan, catalog_file, offline=offline, say=say)
    elif (ending := run.ending()) is not None and ending["status"] == "completed":
        return conclude(server, run, "finished")
    elif not (run.path / "rounds" / "00000.safetensors").is_file():
        raise LaunchError(
            f"{run.path} was cut off before its start was written: delete it, nothing was asked yet"
        )
    if again:
        rest = run.plan().schedule()[len(list(run.records())) :]
        _check_fits(fit_of_rest(run.plan(), rest, run.name, RegistryReader(server.registry)), watcher, run)
    watcher.on_begin(run, run.plan(), again)
    watcher.on_phase("handing the run to the server")
    flower_id, new = submit(server, run)
    watcher.on_phase("waiting for the sites")
    try:
        return follow(server, run, flower_id, watcher)
    except CutOffError:
        if new:
            raise
        # It was killed before this command began, which Flower notices a minute later.
        watcher.on_phase("it had been cut off: handing the run to the server again")
        return follow(server, run, submit(server, run)[0], watcher)


def _check_fits(fit: Fit, watcher: Watcher, run: RunFolder | None = None) -> None:
    watcher.on_fit(fit)
    if fit.fits:
        return
    if run is None:
        raise DoesNotFitError(f"the plan cannot be finished, and is not begun: its {fit.why_not()}", fit)
    raise DoesNotFitError(
        f"the run {run.name} cannot be finished, and nobody is asked more: its remaining {fit.why_not()}; `fedtide "
        f"server discard {run.path.parent.parent} {run.name}` puts it away",
        fit,
    )
