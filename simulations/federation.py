"""Launches a federation on one machine, watches it, and says truthfully how it ended.

The engine (Flower's, with Ray, or one process) runs server and sites; this module prepares both, follows the
run's folder while they work, evaluates each round's checkpoint on held-out events, and writes what was found.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from client.app import SITES_FOLDER
from common.assets import home, language_model
from common.config import Plan
from common.events.cleaning import CleaningPolicy, CleaningReport
from common.models.build import BuiltModel, build_model, item_texts
from common.models.interface import InterestModel
from common.models.priors import make_priors
from server.aggregation import check_aggregation
from server.app import NODES_EXPECTED, REGISTRY_FOLDER, RUN_FOLDER
from server.registry import Registry
from server.runs import RunError, RunFolder, append_line
from simulations.baselines import popularity_scorer, train_without_privacy
from simulations.datasets import Dataset
from simulations.evaluation import HeldOut, Quality, evaluate, model_scorer
from simulations.partition import divide
from simulations.privacy_record import PrivacyRecord, epsilon_by_round, privacy_record
from simulations.sites import SimulatedSite, make_sites, whole_histories

FEDTIDE = "Fedtide"
"""The private model's row in tables."""

CONTENT, POPULARITY, OPEN = "content only", "popularity", "same model, no privacy"

Engine = Literal["flower", "inline"]


@dataclass(frozen=True)
class SimulationOptions:
    """How a federation is simulated; nothing here changes what a site does.

    Attributes:
        engine: "flower" for Flower's simulation engine, "inline" for one process.
        runs: where run folders go.
        sites_by, n_sites, alpha, seed: how users fall to sites.
        sites: folder of sites that outlive the run; None for new ones inside the run.
        site_budget: epsilon cap of new sites' ledgers; None for the smallest that admits the plan.
        baseline_epochs: of the same model without privacy; 0 for none.
        cpus: for Flower's engine.
    """

    engine: Engine = "flower"
    runs: Path = Path("runs")
    sites_by: str = "zip"
    n_sites: int = 10
    alpha: float = 0.5
    seed: int = 0
    sites: Path | None = None
    site_budget: float | None = None
    baseline_epochs: int = 15
    cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    offline: bool = False


@dataclass
class Watcher:
    """What the console is told while a run goes on; every hook does nothing unless it is replaced."""

    on_sites: Callable[[list[SimulatedSite], CleaningReport, Plan], None] = lambda sites, report, plan: None
    on_step: Callable[[int, int, int], None] = lambda round, done, of: None
    on_round: Callable[[dict[str, Any], Quality, float], None] = lambda record, quality, epsilon: None
    on_phase: Callable[[str], None] = lambda phase: None


@dataclass(frozen=True)
class Outcome:
    """What a finished simulation found.

    Attributes:
        run: its folder, finished.
        validation: quality after each round, from round 0 (the start).
        test: name -> quality, looked at once, at the end.
        privacy: events and epsilons of every site.
    """

    run: RunFolder
    plan: Plan
    sites: list[SimulatedSite]
    validation: list[Quality]
    baselines_validation: dict[str, Quality]
    test: dict[str, Quality]
    privacy: PrivacyRecord
    bytes_down: int
    bytes_up: int
    seconds: float
    notes: tuple[str, ...]


def simulate(
    dataset: Dataset, plan: Plan, options: SimulationOptions, watcher: Watcher | None = None
) -> Outcome:
    """One simulated federation, from sites to a finished run folder.

    Raises:
        RunError: the run did not end well; its folder keeps the ending `.incomplete`.
        PlanError, SiteError, LogError, AssetError, LanguageModelError, ValueError: what was asked for is wrong.
    """
    began = time.monotonic()
    watcher = watcher or Watcher()
    if plan.server.expected_sites is None:  # public: the choice of statistics.top_items goes by it
        server = plan.server.model_copy(update={"expected_sites": options.n_sites})
        plan = plan.model_copy(update={"server": server})
    plan = plan.calibrated()
    watcher.on_phase("reading the log")
    policy = CleaningPolicy(minimum_events=5)
    whole, report = whole_histories(dataset, policy, options.seed)
    division = divide(
        dataset, options.sites_by, options.n_sites, options.seed, options.alpha, plan.privacy.users_per_site
    )
    check_aggregation(plan.server, int(division.max()) + 1)
    watcher.on_phase("reading the catalog's texts")
    built = build_model(
        plan.model,
        item_texts(dataset.catalog.texts, dataset.catalog.categories),
        language_model(plan.model.encoder, offline=options.offline),
        cache=home() / "item-vectors",
    )
    run = RunFolder.create(options.runs.resolve(), plan, dataset.catalog)
    watcher.on_phase("setting up the sites")
    root = options.sites.resolve() if options.sites else run.path / "sites"
    registry = Registry(root / "registry")
    # Sites that outlive the run keep a catalog of their own beside them.
    catalog_file = root / "catalog.jsonl"
    if not catalog_file.is_file():
        dataset.catalog.save(catalog_file)
    sites = make_sites(
        dataset,
        division,
        plan,
        policy,
        root,
        registry,
        catalog_file,
        budget=options.site_budget,
        seed=options.seed,
    )
    watcher.on_sites(sites, report, plan)
    held_out = HeldOut(whole=whole, max_events=plan.model.max_events)
    run.save_round(0, built.model.trainable_state())
    validation = _run_and_watch(run, plan, options, root, sites, built, held_out, watcher)
    watcher.on_phase("comparing with the baselines")
    items = len(dataset.catalog)
    return _conclude(
        run, plan, options, sites, registry, built, held_out, items, validation, began, dataset.notes
    )


def _run_and_watch(
    run: RunFolder,
    plan: Plan,
    options: SimulationOptions,
    root: Path,
    sites: list[SimulatedSite],
    built: BuiltModel,
    held_out: HeldOut,
    watcher: Watcher,
) -> list[Quality]:
    environment = {
        RUN_FOLDER: str(run.path),
        SITES_FOLDER: str(root),
        REGISTRY_FOLDER: str(root / "registry"),
        NODES_EXPECTED: str(len(sites)),
    }
    follower = _Follower(run, plan, sites, built, held_out, watcher)
    watcher.on_phase("training")
    with follower.following():
        if options.engine == "flower":
            _with_flower(run, environment, len(sites), options)
        else:
            _in_this_process(environment, sites)
    follower.catch_up()
    records = list(run.records())
    # The engine's exit code is not believed: what the run's folder holds is.
    rounds = len(plan.schedule())
    if len(records) != rounds or not (run.path / "model.safetensors").is_file():
        raise RunError(
            f"the run stopped after {len(records)} of {rounds} rounds; {run.path} is kept as "
            f"incomplete, and its engine.log says why"
        )
    return follower.qualities


def _in_this_process(environment: dict[str, str], sites: list[SimulatedSite]) -> None:
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.inline import run_inline

    with _environment(environment):
        configs = {number + 2: {"partition-id": number} for number in range(len(sites))}
        run_inline(server_app, client_app, configs, {"run-dir": environment[RUN_FOLDER]})


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _with_flower(run: RunFolder, environment: dict[str, str], nodes: int, options: SimulationOptions) -> None:
    """Runs Flower's engine in a process group of its own, and leaves none of it behind."""
    command = [
        sys.executable,
        "-m",
        "simulations.flower_engine",
        "--sites",
        str(nodes),
        "--cpus",
        str(options.cpus),
    ]
    with (run.path / "engine.log").open("wb") as log:
        engine = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            # Short naps, not one long wait: an interrupt must be seen at once, whichever thread it reaches.
            while (code := engine.poll()) is None:
                time.sleep(0.1)
        finally:
            _end_group(engine)
    if code != 0:
        said = (run.path / "engine.log").read_text(errors="replace").splitlines()
        ours = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        reason = ours[-1] if ours else f"Flower's engine ended with code {code}"
        raise RunError(f"{reason}; the run is kept as incomplete in {run.path}, with engine.log")


def _end_group(engine: subprocess.Popen[bytes]) -> None:
    """Ends every process of the engine's session: Ray starts daemons that would outlive it."""
    for sent, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        alive = _session_members(engine.pid)
        if not alive:
            break
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        end = time.monotonic() + patience
        while _session_members(engine.pid) and time.monotonic() < end:
            engine.poll()
            time.sleep(0.05)
    engine.wait()


def _session_members(session: int) -> list[int]:
    """Processes of a session, or below one, that still run (Ray's daemons keep the session of who started them)."""
    alive = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    alive.append(int(entry.name))
    return alive


def _load_checkpoint(
    model: InterestModel, run: RunFolder, plan: Plan, number: int | None, items: int
) -> None:
    """Parameters and priors after a round, or of the finished run."""
    model.load_trainable(run.model_state() if number is None else run.round_state(number))
    model.set_released(make_priors(run.released_state(number), plan.statistics, items))


class _Follower:
    """Follows a run's folder: steps, rounds, and the quality of each checkpoint."""

    def __init__(
        self,
        run: RunFolder,
        plan: Plan,
        sites: list[SimulatedSite],
        built: BuiltModel,
        held_out: HeldOut,
        watcher: Watcher,
    ) -> None:
        self._run, self._plan, self._sites = run, plan, sites
        self._built, self._held_out, self._watcher = built, held_out, watcher
        self._epsilons = epsilon_by_round(plan)
        self._seen = 0
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.qualities: list[Quality] = [self._quality(0)]

    def _quality(self, number: int) -> Quality:
        model = self._built.model
        _load_checkpoint(model, self._run, self._plan, number, len(self._built.vectors))
        return evaluate(model_scorer(model), self._held_out, "validation", len(self._built.vectors))

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            if self._failure is not None:
                raise self._failure

    def _follow(self) -> None:
        try:
            while not self._stop.wait(0.3):
                self._report_steps()
                self.catch_up()
        except BaseException as error:  # handed to the main thread by `following`
            self._failure = error

    def _report_steps(self) -> None:
        current, done = self._seen + 1, 0
        for site in self._sites:
            with contextlib.suppress(OSError, ValueError):
                number, step, _ = (site.folder / "progress").read_text().split()
                done += int(step) if int(number) == current else 0
        self._watcher.on_step(current, done, len(self._sites) * self._plan.training.steps_per_round)

    def catch_up(self) -> None:
        """Evaluates and reports the rounds that were finished meanwhile."""
        for record in list(self._run.records())[self._seen :]:
            quality = self._quality(record["round"])
            epsilon = self._epsilons[record["round"]]
            self.qualities.append(quality)
            self._seen += 1
            append_line(
                self._run.path / "metrics.jsonl",
                {
                    "round": record["round"],
                    "epsilon": epsilon,
                    "delta": self._plan.privacy.delta,
                    "validation": quality.as_json(),
                },
            )
            self._watcher.on_round(record, quality, epsilon)


def _conclude(
    run: RunFolder,
    plan: Plan,
    options: SimulationOptions,
    sites: list[SimulatedSite],
    registry: Registry,
    built: BuiltModel,
    held_out: HeldOut,
    items: int,
    validation: list[Quality],
    began: float,
    notes: tuple[str, ...],
) -> Outcome:
    """Baselines, the one look at the test split, the privacy record, plots and summary; then the run is whole."""
    from simulations.report import write_report

    model = built.model
    popular = popularity_scorer(held_out, items)
    baselines = {POPULARITY: evaluate(popular, held_out, "validation", items), CONTENT: validation[0]}
    test = {POPULARITY: evaluate(popular, held_out, "test", items)}
    _load_checkpoint(model, run, plan, 0, items)
    test[CONTENT] = evaluate(model_scorer(model), held_out, "test", items)
    if options.baseline_epochs:
        open_model = train_without_privacy(model, held_out, items, epochs=options.baseline_epochs)
        baselines[OPEN] = evaluate(model_scorer(open_model), held_out, "validation", items)
        test[OPEN] = evaluate(model_scorer(open_model), held_out, "test", items)
    _load_checkpoint(model, run, plan, None, items)
    test[FEDTIDE] = evaluate(model_scorer(model), held_out, "test", items)
    records = list(run.records())
    outcome = Outcome(
        run=run,
        plan=plan,
        sites=sites,
        validation=validation,
        baselines_validation=baselines,
        test=test,
        privacy=privacy_record(run, plan, registry),
        bytes_down=sum(record["bytes_down"] for record in records),
        bytes_up=sum(record["bytes_up"] for record in records),
        seconds=time.monotonic() - began,
        notes=notes,
    )
    append_line(
        run.path / "metrics.jsonl",
        {"final": True, "test": {name: quality.as_json() for name, quality in test.items()}},
    )
    (run.path / "privacy.json").write_text(json.dumps(outcome.privacy.as_json(), indent=2) + "\n")
    write_report(outcome)
    return replace(outcome, run=run.finish())
