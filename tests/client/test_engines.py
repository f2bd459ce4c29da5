"""Both engines give the same sums at every shape, and every property that a step promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.bookkeeping import clipped_sums
from client.opacus_gradients import opacus_sums
from client.self_test import Engine
from client.training import train_round
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.interface import InterestModel
from common.models.names import FAMILIES
from simulations.audit.conformance.subjects import a_subject
from simulations.audit.conformance.subjects import some_users as rows_of
from tests.client.training_cases import (
    CLIP,
    ITEMS,
    SETTINGS,
    Everyone,
    SeededGaussian,
    a_model,
    batch_of,
    flat,
    item_vectors,
    moved,
    some_users,
)

ENGINES: tuple[Engine, ...] = ("fast", "opacus")
AGREE = 1e-4
"""Of C, for all users of a batch together: what float32 and the grid leave."""


def apart(model: InterestModel, batch: HistoryBatch, clip_norm: float, rows: int) -> float:
    """How far the engines' sums are apart, in C."""
    with opacus_sums(model, rows) as of_opacus:
        reference = of_opacus(batch, clip_norm)
    with clipped_sums(model, rows) as own:
        return float((own(batch, clip_norm) - reference).norm()) / clip_norm


@pytest.mark.parametrize("core", ["lstm", "gru", "attention", "decay"])
@pytest.mark.parametrize(("width", "hidden", "events"), [(8, 4, 3), (16, 64, 12), (64, 16, 40), (128, 32, 5)])
@pytest.mark.parametrize("users", [1, 5, 24])
def test_sums_agree_to_rounding_at_every_shape(
    core: str, width: int, hidden: int, events: int, users: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Recommend(item_vectors(width=width), core=core, hidden_width=hidden, with_times=True)
    moved(model, by=0.1)
    batch = batch_of(some_users(users, longest=events), events)
    for clip_norm in (1e-3, CLIP, 10.0):
        assert apart(model, batch, clip_norm, 24) <= AGREE * users


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["vectors", "lora"])
def test_sums_agree_for_every_family_and_mode(family: str, mode: str, tmp_path: Path) -> None:
    subject = a_subject(tmp_path, family, mode, "cpu")
    model = subject.rewound()
    batch = model.prepare(subject.batch(rows_of(9, subject.items)))
    assert apart(model, batch, CLIP, 24) <= 9 * AGREE


def test_an_engine_that_clips_otherwise_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model()
    moved(model)
    batch = batch_of(some_users(5), 12)
    assert apart(model, batch, CLIP, 24) <= 5 * AGREE
    real = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *given, **named: 0.9 * real(*given, **named))
    assert apart(model, batch, CLIP, 24) > 0.05


def test_a_round_is_the_same_by_either_engine() -> None:
    updates = []
    for engine in ENGINES:
        model = a_model()
        moved(model)
        settings = replace(SETTINGS, steps=4, engine=engine)
        batch = batch_of(some_users(60), 12)
        updates.append(flat(train_round(model, batch, settings, sampler=Everyone(), noise=SeededGaussian(1))))
    share = SETTINGS.learning_rate * CLIP / SETTINGS.normaliser
    assert float(np.linalg.norm(updates[0] - updates[1])) <= 0.01 * share
    assert float(np.linalg.norm(updates[0])) > share


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("others", [0, 5, 23, 24, 47])
def test_one_user_more_moves_a_round_by_at_most_its_share_by_either_engine(
    engine: Engine, others: int
) -> None:
    user = np.random.default_rng(11).integers(0, ITEMS, size=60).tolist()
    updates, settings = [], replace(SETTINGS, engine=engine, micro_batch=24)
    for rows in (some_users(others), [*some_users(others), user]):
        model = a_model()
        moved(model, by=20.0)
        batch = batch_of(rows, 60)
        updates.append(flat(train_round(model, batch, settings, sampler=Everyone(), noise=SeededGaussian(5))))
    share = SETTINGS.learning_rate * CLIP / SETTINGS.normaliser
    assert 0.999 < float(np.linalg.norm(updates[1] - updates[0])) / share <= 1.001


@pytest.mark.parametrize("engine", ENGINES)
def test_a_user_whose_gradient_is_not_finite_adds_nothing_by_either_engine(engine: Engine) -> None:
    class Poisoned(Recommend):
        def per_user_loss(self, batch: HistoryBatch) -> torch.Tensor:
            return super().per_user_loss(batch) * torch.where(batch.items[:, 0] == 7, torch.inf, 1.0)

    model = a_model(Poisoned)
    moved(model)
    clean = [[1, 2, 3], [4, 5, 6]]
    sums = clipped_sums if engine == "fast" else opacus_sums
    with sums(model, 24) as clipped:
        with_one, without = (clipped(batch_of(rows, 3), CLIP) for rows in ([*clean, [7, 8, 9]], clean))
    assert torch.equal(with_one, without)
    assert bool(with_one.any())
