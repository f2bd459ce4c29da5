"""Launches a federation on one machine, watches it, and says truthfully how it ended.

The engine (Flower's, with Ray, or one process) runs server and sites; this module prepares both, follows the
run's folder while they work, evaluates each round's checkpoint on held-out events, and writes what was found.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

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
from simulations.baselines import popularity_scorer, without_privacy
from simulations.datasets import Dataset
from simulations.engines import run_in_this_process, run_with_flower
from simulations.evaluation import HeldOut, Scorer, evaluate, model_scorer
from simulations.follower import Follower, Watcher, load_checkpoint
from simulations.forking import begin_importing
from simulations.outcome import CONTENT, FEDTIDE, OPEN, POPULARITY, Outcome
from simulations.partition import divide
from simulations.quality import Quality
from simulations.report import write_report
from simulations.sites import SimulatedSite, make_sites, registry_folder, whole_histories
from simulations.splits import Fold, LeaveOneOut, Split, Temporal

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
    dataset: Dataset, plan: Plan, options: SimulationOptions, watcher: Watcher | None = None
) -> Outcome:
    """One simulated federation, from sites to a finished run folder.

    Raises:
        RunError: the run did not end well; its folder keeps the ending `.incomplete`.
        PlanError, SiteError, LogError, AssetError, LanguageModelError, ValueError: what was asked for is wrong.
    """
    began = time.monotonic()
    watcher = watcher or Watcher()
    if options.engine == "inline":
        begin_importing(options.n_sites)
    if plan.server.expected_sites is None:  # public: the choice of statistics.top_items goes by it
        server = plan.server.model_copy(update={"expected_sites": options.n_sites})
        plan = plan.model_copy(update={"server": server})
    plan = plan.for_catalog(dataset.catalog.digest()).calibrated()
    watcher.on_phase("reading the log")
    policy = CleaningPolicy(minimum_events=5)
    whole, report = whole_histories(dataset, policy, options.seed)
    split = _split(options, whole)
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
    run = RunFolder.create(options.runs.resolve(), plan, dataset.catalog)
    watcher.on_phase("setting up the sites")
    root = options.sites.resolve() if options.sites else run.path / "sites"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    registry = Registry(registry_folder(root))
    # Sites that outlive the run keep a catalog of their own beside them.
    catalog_file = root / "catalog.jsonl"
    if not catalog_file.is_file():
        dataset.catalog.save(catalog_file)
    elif (digest := Catalog.load(catalog_file).digest()) != plan.catalog:
        raise SiteError(
            f"the sites in {root} were made over the catalog {digest[:16]}, not this one ({str(plan.catalog)[:16]}): "
            "give the same catalog, its items in the same order, or choose another folder"
        )
    sites = make_sites(
        dataset,
        division,
        plan,
        policy,
        root,
        registry,
        catalog_file,
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
    run.save_round(0, built.model.trainable_state())
    follower = _run_and_watch(run, plan, options, root, sites, built, held_out, watcher)
    watcher.on_phase("comparing with the baselines")
    items = len(dataset.catalog)
    return _conclude(run, plan, options, sites, registry, built, held_out, items, follower, began, dataset)


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
    follower = Follower(run, plan, sites, built, held_out, watcher)
    watcher.on_phase("training")
    with follower.following():
        if options.engine == "flower":
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
            f"incomplete, and its engine.log says why"
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
) -> Outcome:
    """Baselines, the one look at the test split, the privacy record, plots and summary; then the run is whole."""
    from simulations.plots import training_curves

    model = built.model
    validation: dict[str, Quality] = {}
    test: dict[str, Quality] = {}

    def judge(name: str, scorer: Scorer) -> None:
        validation[name] = evaluate(scorer, held_out, "validation", items)
        if options.test:
            test[name] = evaluate(scorer, held_out, "test", items)

    judge(POPULARITY, popularity_scorer(held_out, items))
    load_checkpoint(model, run, plan, 0, items)
    judge(CONTENT, model_scorer(model, plan.model.task))
    tried = 0
    if options.baseline_epochs:
        best = without_privacy(model, plan, held_out, items, epochs=options.baseline_epochs)
        tried = best.tried
        training_curves(run.path / "training-curves.png", best.epochs)
        judge(OPEN, model_scorer(best.model, plan.model.task))
    baselines = dict(validation)
    load_checkpoint(model, run, plan, None, items)
    judge(FEDTIDE, model_scorer(model, plan.model.task))
    records, privacy = list(run.records()), privacy_record(run, plan, registry)
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
        notes=dataset.notes,
    )
    append_line(
        run.path / "metrics.jsonl",
        {"final": True, outcome.part: {name: quality.as_json() for name, quality in outcome.results.items()}},
    )
    (run.path / "privacy.json").write_text(json.dumps(outcome.privacy.as_json(), indent=2) + "\n")
    write_report(outcome)
    done = run.finish()
    if options.sites is None:  # the sites lie in the run's folder, which has another name now
        sites = [replace(site, folder=done.path / site.folder.relative_to(run.path)) for site in sites]
    return replace(outcome, run=done, sites=sites)
