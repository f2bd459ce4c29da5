"""The row without privacy is the same recipe in its best form, and what is said of figures is true of their data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.assets import language_model
from common.events.cleaning import CleaningPolicy
from common.models.build import build_model, item_texts
from common.models.priors import make_priors
from common.sums import POPULARITY, TRANSITIONS, PairLayout
from simulations.baselines import without_privacy
from simulations.evaluation import HeldOut, evaluate, model_scorer
from simulations.outcome import OPEN, Outcome
from simulations.report import open_form, researcher_side, summary
from simulations.sites import whole_histories
from simulations.without_privacy import best_exact_priors, exact_statistics, without_noise
from tests.tiny import own_cache, tiny_dataset, tiny_run

PLAN = {
    "statistics": {"popularity_share": 0.3, "transition_share": 0.4},
    "privacy": {"noise_multiplier": None},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("open")
    return folder, tiny_run(folder, plan=PLAN, baseline_epochs=2)


def held_out(folder: Path, outcome: Outcome) -> HeldOut:
    whole, _ = whole_histories(tiny_dataset(folder / "data"), CleaningPolicy(minimum_events=5), 0)
    return HeldOut.of(whole, outcome.plan.model)


def test_the_recipe_without_privacy_has_its_statistics_exact_over_all_items(
    run: tuple[Path, Outcome],
) -> None:
    folder, outcome = run
    judged = held_out(folder, outcome)
    with own_cache(folder / "cache"):
        catalog = tiny_dataset(folder / "data").catalog
        built = build_model(
            outcome.plan.model,
            item_texts(catalog.texts, catalog.categories),
            language_model(outcome.plan.model.encoder, offline=True),
        )
    items = len(catalog)
    looks = []
    found = without_privacy(
        built.model, outcome.plan, judged, items, epochs=2, on_look=lambda: looks.append(1)
    )
    assert found.model.released is not None
    assert len(found.model.released.top) == items
    assert len(looks) == found.tried + 3  # and the start, and two epochs
    quality = evaluate(model_scorer(found.model), judged, "validation", items)
    assert quality.per_user.mean() == pytest.approx(outcome.final_validation[OPEN].per_user.mean(), abs=1e-12)
    # The old row, which had no statistics, was another one.
    found.model.set_released(None)
    without = evaluate(model_scorer(found.model), judged, "validation", items)
    assert without.per_user.mean() < quality.per_user.mean() - 0.01


def test_exact_sums_are_counts_that_anybody_can_make(run: tuple[Path, Outcome]) -> None:
    folder, outcome = run
    training = held_out(folder, outcome).training()
    items = 30
    plan = without_noise(outcome.plan.statistics, items)
    found = exact_statistics(training, items, plan)
    popularity, pairs = np.zeros(items), np.zeros((items, items))
    for row in range(len(training)):
        history = training.history(row)
        counts = np.bincount(history, minlength=items).astype(float)
        seen = (counts > 0).astype(float)
        popularity += seen / np.linalg.norm(seen)
    assert found[POPULARITY].numpy() == pytest.approx(popularity, rel=1e-5)
    table = PairLayout(items, plan.symmetric).matrix(found[TRANSITIONS].double())
    assert table.shape == pairs.shape
    assert float(table.sum()) > 0


def test_the_best_weights_are_kept_and_the_plans_own_are_among_them(run: tuple[Path, Outcome]) -> None:
    folder, outcome = run
    training = held_out(folder, outcome).training()
    tried: list[float] = []

    def score(priors: object) -> float:
        tried.append(0.0)
        return 1.0 if len(tried) == 1 else 0.0  # nothing is better than the plan's own

    found = best_exact_priors(training, 30, outcome.plan.statistics, score)  # type: ignore[arg-type]
    assert found.statistics == without_noise(outcome.plan.statistics, 30)
    assert found.tried == len(tried) > 20
    wanted = 0.8

    def likes(priors: object) -> float:
        return -abs(priors.decay - wanted)  # type: ignore[attr-defined]

    found = best_exact_priors(training, 30, outcome.plan.statistics, likes)  # type: ignore[arg-type]
    assert found.statistics.lift_decay == wanted
    again = make_priors(exact_statistics(training, 30, found.statistics), found.statistics, 30)
    assert torch.equal(again.lift, found.priors.lift)


def test_figures_of_ones_own_log_are_said_to_be_private_and_those_of_public_data_are_not(
    run: tuple[Path, Outcome],
) -> None:
    _, outcome = run
    assert not outcome.public
    own = researcher_side(outcome)
    assert "they are private" in own
    assert "public data" not in own
    assert own in summary(outcome)
    public = researcher_side(replace(outcome, public=True))
    assert "held-out events of public data" in public
    assert "they are private" not in public


def test_a_row_that_is_absent_is_not_explained(run: tuple[Path, Outcome]) -> None:
    _, outcome = run
    assert f"the best of {outcome.open_settings} weights" in summary(outcome)
    absent = replace(outcome, test={name: quality for name, quality in outcome.test.items() if name != OPEN})
    assert open_form(absent) == ""
    assert "No privacy" not in summary(absent)
