"""Launches a federation on one machine, watches it, and says truthfully how it ended.

The engine (Flower's, with Ray, or one process) runs server and sites; this module prepares both, follows the
run's folder while they work, evaluates each round's checkpoint on held-out events, and writes what was found. A run
that was interrupted goes on: its rounds stay as they are, and what was measured of them is measured again.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

from client.app import SITES_FOLDER
from client.policy import Performance
from client.site_folder import SiteError
from common.assets import home, language_model
from common.config import Plan
from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy
from common.events.histories import Histories
from common.models.build import BuiltModel, build_model, category_membership, item_texts
from server.aggregation import check_aggregation
from server.app import NODES_EXPECTED, REGISTRY_FOLDER, RUN_FOLDER
from server.privacy_record import privacy_record
from server.registry import Registry
from server.runs import RunError, RunFolder, append_line
from simulations import begun
from simulations.baselines import popularity_scorer, without_privacy
from simulations.by_user import save_by_user
from simulations.datasets import Dataset
from simulations.engines import run_in_this_process, run_with_flower
from simulations.evaluation import HeldOut, Scorer, evaluate, model_scorer
from simulations.follower import Follower, Watcher, load_checkpoint
from simulations.forking import begin_importing
from simulations.outcome import CONTENT, FEDTIDE, OPEN, POPULARITY, Outcome
from simulations.partition import divide
from simulations.quality import Quality
from simulations.report import write_report
from simulations.sites import (
    SimulatedSite,
    make_sites,
    registry_folder,
    simulated_secret,
    whole_histories,
)
from simulations.splits import Fold, LeaveOneOut, Part, Split, Temporal

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
        performance: how every site computes; None: new ones as by default, others as before.
        baseline_epochs: of the same recipe without privacy; 0 for no such comparison.
        split: which events are held out: "leave-one-out" or "temporal".
        fold: (number from 1, folds): leave-one-out over users of one fold, who are at no site; None for all users.
        test: whether to look at the test split at the end.
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
    performance: Performance | None = None
    baseline_epochs: int = 15
    split: Literal["leave-one-out", "temporal"] = "leave-one-out"
    fold: tuple[int, int] | None = None
    test: bool = True
    cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    offline: bool = False


def simulate(
    dataset: Dataset,
    plan: Plan,
    options: SimulationOptions,
    watcher: Watcher | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    unfinished: RunFolder | None = None,
) -> Outcome:
    """One simulated federation, from sites to a finished run folder.

    Args:
        plan: of an unfinished run it is the run's own.
        given: what the command was given, for the run to keep.
        unfinished: go on with this run, whose options were the same, in place of beginning one.

    Raises:
        RunError: the run did not end well, and its folder keeps the ending `.incomplete`; or an unfinished one cannot
            be gone on with: what it was begun with has changed, or another command is at work on it.
        PlanError, SiteError, LogError, AssetError, LanguageModelError, ValueError: what was asked for is wrong.
    """
    began = time.monotonic()
    watcher = watcher or Watcher()
    if options.engine == "inline":
        begin_importing(options.n_sites)
    if unfinished is None:
        if plan.server.expected_sites is None:  # public: the choice of statistics.top_items goes by it
            server = plan.server.model_copy(update={"expected_sites": options.n_sites})
            plan = plan.model_copy(update={"server": server})
        plan = plan.for_catalog(dataset.catalog.digest()).calibrated()
    watcher.on_phase("reading the log")
    policy = CleaningPolicy(minimum_events=5)
    whole, report = whole_histories(dataset, policy, options.seed)
    keys = begun.pairing_keys(dataset, whole.users, simulated_secret(options.seed))
    split = _split(options, whole)
    beginning = begun.Begun(
        data=begun.data_digest(whole, keys),
        plan=plan.digest(),
        split=split.name,
        fold=options.fold,
        settings=_settings(options),
        public=dataset.public,
        given=given or {},
    )
    if unfinished is not None:
        beginning = begun.check_same(unfinished, beginning, dataset.catalog.digest())
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
        categories=dataset.catalog.categories,
        witness_places=plan.privacy.witness_places,
    )
    run = unfinished or RunFolder.create(options.runs.resolve(), plan, dataset.catalog)
    beginning.save(run)
    with begun.alone_in(run):
        watcher.on_run(run)
        if unfinished is not None:
            begun.take_up(run)
        watcher.on_phase("setting up the sites")
        root = options.sites.resolve() if options.sites else run.path / "sites"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        registry = Registry(registry_folder(root))
        sites = make_sites(
            dataset,
            division,
            plan,
            policy,
            root,
            registry,
            _catalog_of_sites(root, dataset.catalog),
            split,
            budget=options.site_budget,
            seed=options.seed,
            performance=options.performance,
        )
        watcher.on_sites(sites, report, plan)
        held_out = HeldOut.of(
            whole,
            plan.model,
            vectors=built.vectors,
            membership=category_membership(dataset.catalog.categories)
            if plan.model.task == "next-category"
            else None,
            split=split,
        )
        if not run.has_round(0):
            run.save_round(0, built.model.trainable_state())
        follower = _run_and_watch(run, plan, options, root, sites, built, held_out, watcher)
        notes = (*dataset.notes, *_interruptions(run, beginning))
        items = len(dataset.catalog)
        outcome = _conclude(
            run,
            plan,
            options,
            sites,
            registry,
            built,
            held_out,
            items,
            follower,
            began,
            dataset,
            notes,
            watcher,
        )
        found: dict[Part, Mapping[str, Quality]] = {"validation": outcome.final_validation}
        if outcome.test:
            found["test"] = outcome.test
        save_by_user(run, dict(zip(whole.users.tolist(), keys.tolist(), strict=True)), found)
        return _finished(outcome, options)


def _catalog_of_sites(root: Path, catalog: Catalog) -> Path:
    """Where sites find their catalog: those that outlive the run keep one of their own beside them.

    Raises:
        SiteError: theirs is another.
    """
    file = root / "catalog.jsonl"
    if not file.is_file():
        catalog.save(file)
    elif (digest := Catalog.load(file).digest()) != catalog.digest():
        raise SiteError(
            f"the sites in {root} were made over the catalog {digest[:16]}, not this one ({catalog.digest()[:16]}): "
            "give the same catalog, its items in the same order, or choose another folder"
        )
    return file


def _settings(options: SimulationOptions) -> dict[str, Any]:
    """What a reader of a comparison wants to know of how a federation was simulated."""
    named = ("engine", "sites_by", "n_sites", "alpha", "seed", "site_budget", "baseline_epochs", "split")
    return {name: getattr(options, name) for name in named}


def _interruptions(run: RunFolder, beginning: begun.Begun) -> list[str]:
    """What a reader must know of a run that was interrupted."""
    if not beginning.resumed:
        return []
    times = "once" if beginning.resumed == 1 else f"{beginning.resumed} times"
    lost = [str(record["round"]) for record in run.records() if not record["aggregated"]]
    said = f"The run was interrupted and went on, {times}; wall times are of its last part."
    if lost:
        said += (
            f" Nothing came of round {', '.join(lost)}, which the epsilon counts: what a site was charged for is never "
            "trained on again."
        )
    return [said]


def _split(options: SimulationOptions, whole: Histories) -> Split:
    if options.fold is not None:
        if options.split != "leave-one-out" or options.sites is not None or options.test:
            raise ValueError(
                "folds of users are for validation by leave-one-out, and each has sites of its own: give neither "
                "--split temporal nor --sites, and no look at the test split"
            )
        return Fold.of(whole, *options.fold, options.seed)
    return Temporal.of(whole) if options.split == "temporal" else LeaveOneOut()


def _run_and_watch(
    run: RunFolder,
    plan: Plan,
    options: SimulationOptions,
    root: Path,
    sites: list[SimulatedSite],
    built: BuiltModel,
    held_out: HeldOut,
    watcher: Watcher,
) -> Follower:
    environment = {
        RUN_FOLDER: str(run.path),
        SITES_FOLDER: str(root),
        REGISTRY_FOLDER: str(registry_folder(root)),
        NODES_EXPECTED: str(len(sites)),
    }
    import_module("opacus")  # here, and not by a site and the follower at once, which Python calls a deadlock
    follower = Follower(run, plan, sites, built, held_out, watcher)
    watcher.on_phase("measuring the rounds that are done")
    follower.catch_up()
    watcher.on_phase("training")
    with follower.following():
        if begun.is_trained(run):
            pass  # an interrupted run whose rounds are over
        elif options.engine == "flower":
            run_with_flower(run, environment, len(sites), options.cpus)
        else:
            run_in_this_process(environment, sites)
    follower.catch_up()
    records = list(run.records())
    # The engine's exit code is not believed: what the run's folder holds is.
    rounds = len(plan.schedule())
    if len(records) != rounds or not (run.path / "model.safetensors").is_file():
        raise RunError(
            f"the run stopped after {len(records)} of {rounds} rounds; {run.path} is kept as "
            "incomplete, and its engine.log says why"
        )
    return follower


def _conclude(
    run: RunFolder,
    plan: Plan,
    options: SimulationOptions,
    sites: list[SimulatedSite],
    registry: Registry,
    built: BuiltModel,
    held_out: HeldOut,
    items: int,
    follower: Follower,
    began: float,
    dataset: Dataset,
    notes: tuple[str, ...],
    watcher: Watcher,
) -> Outcome:
    """Baselines, the one look at the test split, the privacy record, plots and summary."""
    from simulations.plots import training_curves

    model = built.model
    validation: dict[str, Quality] = {}
    test: dict[str, Quality] = {}

    def judge(name: str, scorer: Scorer) -> None:
        for part, of in (("validation", validation), ("test", test))[: 2 if options.test else 1]:
            watcher.on_phase(f"{part} of {name}")
            of[name] = evaluate(scorer, held_out, cast(Part, part), items, watcher.on_progress)

    judge(POPULARITY, popularity_scorer(held_out, items))
    load_checkpoint(model, run, plan, 0, items)
    judge(CONTENT, model_scorer(model, plan.model.task))
    tried = 0
    if options.baseline_epochs:
        looks = itertools.count(1)
        watcher.on_phase("training without privacy: looks at validation data")
        best = without_privacy(
            model,
            plan,
            held_out,
            items,
            epochs=options.baseline_epochs,
            on_look=lambda: watcher.on_progress(next(looks), None),
        )
        tried = best.tried
        training_curves(run.path / "training-curves.png", best.epochs)
        judge(OPEN, model_scorer(best.model, plan.model.task))
    baselines = dict(validation)
    load_checkpoint(model, run, plan, None, items)
    judge(FEDTIDE, model_scorer(model, plan.model.task))
    watcher.on_phase("recomputing what each site was charged")
    records, privacy = list(run.records()), privacy_record(run, plan, registry, watcher.on_progress)
    outcome = Outcome(
        run=run,
        plan=plan,
        sites=sites,
        validation=follower.qualities,
        epsilons=[*follower.epsilons[:-1], privacy.epsilon],  # with charges that nothing came of
        baselines_validation=baselines,
        final_validation=validation,
        test=test,
        open_settings=tried,
        split=held_out.split.words,
        public=dataset.public,
        privacy=privacy,
        bytes_down=sum(record["bytes_down"] for record in records),
        bytes_up=sum(record["bytes_up"] for record in records),
        seconds=time.monotonic() - began,
        notes=notes,
    )
    append_line(
        run.path / "metrics.jsonl",
        {"final": True, "validation": _figures(validation)} | ({"test": _figures(test)} if test else {}),
    )
    watcher.on_phase("writing summary and plots")
    (run.path / "privacy.json").write_text(json.dumps(outcome.privacy.as_json(), indent=2) + "\n")
    write_report(outcome)
    return outcome


def _figures(qualities: Mapping[str, Quality]) -> dict[str, Any]:
    return {name: quality.as_json() for name, quality in qualities.items()}


def _finished(outcome: Outcome, options: SimulationOptions) -> Outcome:
    """The run is whole from now on."""
    run, done = outcome.run, outcome.run.finish()
    sites = outcome.sites
    if options.sites is None:  # the sites lie in the run's folder, which has another name now
        sites = [replace(site, folder=done.path / site.folder.relative_to(run.path)) for site in sites]
    return replace(outcome, run=done, sites=sites)
