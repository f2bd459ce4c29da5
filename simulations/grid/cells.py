"""The cells of the table, one file each: what is trained, on what, with which promise, from which seed.

A cell that is done is not done again, so that the table can be made in pieces. Settings are fixed here before any
test figure is seen; what was tried on validation data stands in `page.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.assets import home, language_model
from common.config import Plan, make_plan
from common.events.cleaning import CleaningPolicy
from common.events.histories import Histories
from common.models.build import BuiltModel, build_model, item_texts
from common.models.interface import InterestModel
from common.models.priors import make_priors
from common.planning import DEFAULT_SECTIONS
from simulations.datasets import Dataset, load_movielens_100k
from simulations.grid.learning import batch_of, learn, learn_without_privacy
from simulations.grid.protocols import (
    LAST_INVOICE,
    LEAVE_ONE_OUT,
    HeldOut,
    Judged,
    Protocol,
    Scorer,
    hold_out,
    judge,
)
from simulations.grid.sequential import SequentialSettings, train_sequential
from simulations.online_retail import load_online_retail
from simulations.partition import divide
from simulations.sites import histories_of_sites, whole_histories
from simulations.without_privacy import OpenTraining, exact_statistics

FAMILIES = ("recommend", "dual", "lstm-vae", "classifier", "ensemble", "lstm-lm")
PRIVATE = ("20", "8", "2")
NONE = "none"
CENTRAL, TEN = "central", "ten sites"
SEQUENTIAL_MODELS = ("gru4rec", "sasrec")
BASELINES = ("popularity", "content only", "item transitions", *SEQUENTIAL_MODELS)
STATISTICS, WHOLE, PRETRAINED, ALONE = "statistics alone", "all phases", "with pre-training", "DP-SGD alone"
DEMO = "as make demo"
"""All phases, by as many steps as `fedtide simulate` takes where nothing is said."""
DELTA = 1e-5


@dataclass(frozen=True)
class Bench:
    """A data set with a protocol."""

    data: str
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.data}, {self.protocol}"


BENCHES = (
    Bench("movielens-100k", LEAVE_ONE_OUT),
    Bench("online-retail", LAST_INVOICE),
    Bench("online-retail", LEAVE_ONE_OUT),
)


def _scorer(**values: float) -> dict[str, float]:
    return values


_SAMPLING = {
    "movielens-100k": (0.5, {CENTRAL: 800, TEN: 50}),
    "online-retail": (0.1, {CENTRAL: 3500, TEN: 350}),
}
"""Public sampling rate, and public lower bound of each site's users."""
_STATISTICS = {"popularity_share": 0.2, "transition_share": 0.7}
_EXACT = {
    BENCHES[0]: _scorer(gaps=10, lift_weight=1.0, lift_decay=0.8, pseudo_count=30.0, popularity_weight=1.0),
    BENCHES[1]: _scorer(gaps=20, lift_weight=0.8, lift_decay=0.98, pseudo_count=100.0, popularity_weight=3.0),
    BENCHES[2]: _scorer(gaps=20, lift_weight=1.25, lift_decay=0.9, pseudo_count=100.0, popularity_weight=1.5),
}
"""Of rows without privacy: exact counts want other weights than noisy ones, in a shop others than among films."""
_TRANSITIONS = {
    BENCHES[0]: _scorer(gaps=20, lift_weight=0.6, lift_decay=0.8, pseudo_count=30.0, popularity_weight=1.0),
    BENCHES[1]: _scorer(gaps=20, lift_weight=0.6, lift_decay=0.95, pseudo_count=100.0, popularity_weight=1.5),
    BENCHES[2]: _scorer(gaps=20, lift_weight=1.0, lift_decay=0.9, pseudo_count=100.0, popularity_weight=1.0),
}
"""Of the baseline that scores by exact counts alone."""


@dataclass(frozen=True)
class Cell:
    """One training, or one baseline.

    Attributes:
        model: a family, or a baseline's name.
        layout, epsilon, recipe: of a family; empty for a baseline.
        seed: of the model's start; noise and sampling have none.
    """

    bench: Bench
    model: str
    layout: str = ""
    epsilon: str = ""
    recipe: str = ""
    seed: int = 0

    @property
    def file_name(self) -> str:
        """Of its result."""
        parts = (self.bench.data, self.bench.protocol, self.model, self.layout, self.epsilon, self.recipe)
        return "_".join(part.replace(" ", "-") for part in parts if part) + f"_{self.seed}.json"


def cells(bench: Bench, seeds: int) -> Iterator[Cell]:
    """All cells of a bench: seed after seed, what the table needs most coming first."""
    yield from (Cell(bench, name) for name in BASELINES if name not in SEQUENTIAL_MODELS)
    for seed in range(seeds):
        for layout in (TEN, CENTRAL):
            for epsilon in ("8", "2", "20"):
                yield Cell(bench, "recommend", layout, epsilon, STATISTICS, seed)
        if bench == BENCHES[0]:
            yield Cell(bench, "recommend", TEN, "8", DEMO, seed)
        for family in FAMILIES:
            if family != "lstm-lm":
                yield from _of_family(bench, family, seed)
    yield from (Cell(bench, name, seed=seed) for seed in range(seeds) for name in SEQUENTIAL_MODELS)
    for seed in range(seeds):  # last, as each step runs a language model forward and back
        yield from _of_family(bench, "lstm-lm", seed)


def _of_family(bench: Bench, family: str, seed: int) -> Iterator[Cell]:
    for recipe in (WHOLE, ALONE, PRETRAINED):
        yield Cell(bench, family, TEN, "8", recipe, seed)
    for layout in (TEN, CENTRAL):
        for epsilon in (NONE, *PRIVATE):
            if (layout, epsilon) != (TEN, "8"):
                yield Cell(bench, family, layout, epsilon, WHOLE, seed)


@dataclass(frozen=True)
class BenchData:
    """A bench's data set, what is held out of it, and the training histories of ten sites."""

    dataset: Dataset
    held_out: HeldOut
    ten: list[Histories]

    @property
    def items(self) -> int:
        return len(self.dataset.catalog)


@lru_cache(maxsize=1)
def data_of(bench: Bench, retail: Path | None) -> BenchData:
    """The data of a bench, divided by user."""
    dataset = load_movielens_100k() if bench.data == "movielens-100k" else load_online_retail(retail)
    whole, _ = whole_histories(dataset, CleaningPolicy(), seed=0)
    held_out = hold_out(whole, bench.protocol)
    sites = divide(dataset, "zip" if bench.data == "movielens-100k" else "hash", 10)
    ten = []
    for own in histories_of_sites(dataset, sites, CleaningPolicy(), seed=0):
        ten.append(held_out.training.select(np.flatnonzero(np.isin(held_out.training.users, own.users))))
    return BenchData(dataset, held_out, ten)


@lru_cache(maxsize=64)
def plan_of(bench: Bench, family: str, layout: str, epsilon: str, recipe: str) -> Plan:
    """The calibrated plan of a private cell, or the uncalibrated one of a cell without privacy."""
    rate, users = _SAMPLING[bench.data]
    alone = recipe == ALONE
    long = family == "lstm-lm"
    values: dict[str, dict[str, Any]] = {
        "model": {"family": family, "negatives": 256, "max_events": 20 if long else 50},
        "privacy": {
            "epsilon": 8.0 if epsilon == NONE else float(epsilon),
            "delta": DELTA,
            "sampling_rate": rate,
            "users_per_site": users[layout],
        },
        "training": {
            "rounds": 0 if recipe == STATISTICS else 6 if alone and not long else 3,
            "steps_per_round": 2 if long else 5,
            "learning_rate": 6.0 if alone else 0.3,
        },
        "server": {"expected_sites": 10 if layout == TEN else 1},
    }
    if recipe == DEMO:
        values["training"] = DEFAULT_SECTIONS["training"]
        del values["model"]["negatives"]
    if recipe == STATISTICS:
        values["statistics"] = {"popularity_share": 0.22, "transition_share": 0.78}
    elif not alone:
        values["statistics"] = _STATISTICS | (_EXACT[bench] if epsilon == NONE else {})
    if recipe == PRETRAINED:
        values["pretraining"] = {"histories": 1000, "epochs": 3}
    plan = make_plan(values)
    return plan if epsilon == NONE else plan.calibrated()


@lru_cache(maxsize=2)
def built_for(bench: Bench, retail: Path | None, plan_model: str, seed: int) -> BuiltModel:
    """The model of a plan's part of that name, as JSON, at its seeded start."""
    plan = make_plan({"model": {**json.loads(plan_model), "seed": seed}}).model
    catalog = data_of(bench, retail).dataset.catalog
    return build_model(
        plan,
        item_texts(catalog.texts, catalog.categories),
        language_model(plan.encoder),
        cache=home() / "item-vectors",
        categories=catalog.categories,
    )


def run_cell(cell: Cell, retail: Path | None) -> dict[str, Any]:
    """Trains and judges one cell; JSON: [users] of both splits."""
    began = time.monotonic()
    data = data_of(cell.bench, retail)
    if cell.model in BASELINES:
        scorer, max_events = _baseline(cell, data, retail)
    else:
        plan = plan_of(cell.bench, cell.model, cell.layout, cell.epsilon, cell.recipe)
        scorer, max_events = _family(cell, plan, data, retail).scores, plan.model.max_events
    validation = judge(scorer, data.held_out.validation, data.items, max_events)
    test = judge(scorer, data.held_out.test, data.items, max_events)
    return {
        "cell": asdict(cell),
        "seconds": time.monotonic() - began,
        "validation": _numbers(validation),
        "test": _numbers(test),
    }


def _numbers(judged: Judged) -> dict[str, list[float]]:
    return {"ndcg": judged.ndcg.round(6).tolist(), "hits": judged.hits.tolist()}


def _validation(data: BenchData, max_events: int) -> Any:
    def score(model: Any) -> float:
        found: npt.NDArray[np.float64] = judge(
            model.scores, data.held_out.validation, data.items, max_events
        ).ndcg
        return float(found.mean())

    return score


def _family(cell: Cell, plan: Plan, data: BenchData, retail: Path | None) -> InterestModel:
    built = built_for(cell.bench, retail, plan.model.model_dump_json(), cell.seed)
    training = data.held_out.training
    if cell.epsilon == NONE and cell.layout == CENTRAL:
        epochs = 2 if cell.model == "lstm-lm" else 8
        settings = OpenTraining(epochs=epochs, patience=2)
        score = _validation(data, plan.model.max_events)
        return learn_without_privacy(built, training, plan, settings, score, cell.seed)
    sites = data.ten if cell.layout == TEN else [training]
    return learn(built, sites, plan, open=cell.epsilon == NONE)


def _baseline(cell: Cell, data: BenchData, retail: Path | None) -> tuple[Scorer, int]:
    training, items = data.held_out.training, data.items
    longest = 50
    if cell.model in SEQUENTIAL_MODELS:
        model = train_sequential(
            cell.model,  # type: ignore[arg-type]
            batch_of(training, longest),
            items,
            SEQUENTIAL[cell.bench, cell.model],
            _validation(data, longest),
            cell.seed,
        )
        return model.scores, longest
    plan = plan_of(cell.bench, "recommend", CENTRAL, NONE, WHOLE)
    if cell.model == "content only":
        return built_for(cell.bench, retail, plan.model.model_dump_json(), 0).model.scores, longest
    statistics = plan.statistics.model_copy(update={"top_items": items, **_TRANSITIONS[cell.bench]})
    priors = make_priors(exact_statistics(training, items, statistics), statistics, items)
    if cell.model == "popularity":
        return (lambda batch: priors.log_popularity.expand(len(batch), -1)), longest
    return (lambda batch: priors.after_last(batch.items)), longest


SEQUENTIAL = {
    (BENCHES[0], "gru4rec"): SequentialSettings(epochs=60, patience=3, batch_size=256, learning_rate=5e-3),
    (BENCHES[0], "sasrec"): SequentialSettings(epochs=40, patience=3, layers=2),
    (BENCHES[1], "gru4rec"): SequentialSettings(epochs=40, patience=3, negatives=1024, dropout=0.5),
    (BENCHES[1], "sasrec"): SequentialSettings(epochs=40, patience=3, negatives=1024, layers=2),
    (BENCHES[2], "gru4rec"): SequentialSettings(epochs=40, patience=3, negatives=1024),
    (BENCHES[2], "sasrec"): SequentialSettings(epochs=40, patience=3, negatives=1024),
}
"""The best of each bench by its own validation data."""
