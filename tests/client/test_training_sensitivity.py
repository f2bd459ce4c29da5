"""One user more or less moves a step by at most C; and each broken way to train is shown to move it by more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from client.opacus_gradients import clipped_sum
from client.self_test import rows_of_units
from client.training import prepare_histories, train_round
from common.models import batches
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.heads import next_item_loss
from common.privacy.noise import INFLATION
from tests.client.training_cases import (
    CLIP,
    ITEMS,
    ROWS,
    SETTINGS,
    Everyone,
    SeededGaussian,
    SeededSampler,
    a_model,
    batch_of,
    flat,
    item_vectors,
    moved,
    some_users,
    step_sum,
)

LONGEST, CATALOG = 1000, 150
QUIET = [4, 5]
LOUD = np.random.default_rng(11).integers(0, CATALOG, size=LONGEST).tolist()


def a_loud_model(kind: type[Recommend] = Recommend) -> Recommend:
    """Weights so far off that a user's gradient is many times the clip norm."""
    model = a_model(kind, items=CATALOG)
    moved(model, by=20.0)
    return model


def movement(
    step: Callable[[HistoryBatch], Tensor],
    others: list[list[int]],
    user: list[int],
    width: int,
    clip_norm: float = CLIP,
) -> float:
    """How far one user more moves a step's sum, in clip norms."""
    return float((step(batch_of([*others, user], width)) - step(batch_of(others, width))).norm()) / clip_norm


@pytest.mark.parametrize("others", [0, 1, 5, 40])
@pytest.mark.parametrize("user", [QUIET, LOUD], ids=["quiet", "loud"])
def test_one_user_more_moves_the_clipped_sum_by_at_most_c(others: int, user: list[int]) -> None:
    model = a_loud_model()
    moves = movement(lambda batch: step_sum(model, batch), some_users(others), user, LONGEST)
    assert moves <= 1 + 1e-6
    if user is LOUD:
        assert moves > 1 - 1e-6  # the bound is reached, so the test would see more
        assert movement(lambda batch: step_sum(model, batch, 1e4), [], user, LONGEST) > 10


def moves_before_others(core: str) -> float:
    """How far a user put before, among or after others moves a sum, at most, in clip norms; parameters far off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Recommend(item_vectors(), core=core, hidden_width=4, with_times=True)
    moved(model, by=100.0)
    user, most = np.random.default_rng(11).integers(0, ITEMS, size=14).tolist(), 0.0
    for others in (1, 3, 5, 7, 8, 12, 20):
        rows = some_users(others, seed=2)
        for place in {0, others // 2, others}:
            sums = [
                step_sum(model, batch_of(given, 14)) for given in (rows, [*rows[:place], user, *rows[place:]])
            ]
            most = max(most, float((sums[1] - sums[0]).norm()) / CLIP)
    return most


@pytest.mark.parametrize("core", ["lstm", "gru", "attention", "decay"])
def test_a_user_moves_the_clipped_sum_by_at_most_c_wherever_the_row_stands(core: str) -> None:
    assert 1 - 1e-6 < moves_before_others(core) <= 1 + 1e-6


def test_uneven_events_are_seen_to_move_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "EVEN_EVENTS", 1)
    moves = moves_before_others("attention")
    if moves <= 1 + 1e-6:
        pytest.skip("this machine's BLAS adds up alike at every place")
    assert moves > 1 + 1e-6


@pytest.mark.parametrize("others", [0, 1, 5, 40])
@pytest.mark.parametrize("user", [QUIET, LOUD], ids=["quiet", "loud"])
def test_one_user_more_moves_the_released_update_by_at_most_its_share(others: int, user: list[int]) -> None:
    rows = some_users(others)
    updates = []
    for batch in (batch_of(rows, LONGEST), batch_of([*rows, user], LONGEST)):
        noise = SeededGaussian(5)  # the same stream for both
        updates.append(flat(train_round(a_loud_model(), batch, SETTINGS, sampler=Everyone(), noise=noise)))
    share = SETTINGS.learning_rate * CLIP / SETTINGS.normaliser
    moves = float(np.linalg.norm(updates[1] - updates[0])) / share
    assert moves <= 1 + INFLATION
    assert np.linalg.norm(updates[0]) > share  # the noise is there
    if user is LOUD:
        assert moves > 1 - INFLATION


def test_removing_any_user_of_a_batch_in_any_place_moves_it_by_at_most_c() -> None:
    model = a_loud_model()
    rows = [QUIET, *some_users(6), LOUD[:60]]
    whole = step_sum(model, batch_of(rows, 60))
    for user in range(len(rows)):
        rest = step_sum(model, batch_of(rows[:user] + rows[user + 1 :], 60))
        assert float((whole - rest).norm()) <= CLIP * (1 + 1e-6)


def test_a_user_without_clipping_would_be_caught() -> None:
    model = a_loud_model()
    assert movement(lambda batch: step_sum(model, batch, 1e4), some_users(5), LOUD, LONGEST) > 10


def test_clipping_the_batch_instead_of_the_user_would_be_caught() -> None:
    model, clip_norm = a_model(), 1e-4
    moved(model)
    batch = batch_of(some_users(60, longest=4)[1:], 4)
    singles = torch.stack([step_sum(model, batch.rows(torch.tensor([user])), 1e2) for user in range(59)])
    pairs = singles.unsqueeze(0) + singles.unsqueeze(1)  # what two users add up to, unclipped
    as_one = torch.nn.functional.normalize(pairs, dim=-1) - torch.nn.functional.normalize(singles, dim=-1)
    assert float(as_one.norm(dim=-1).max()) > 1.05  # in clip norms
    user, other = divmod(int(as_one.norm(dim=-1).argmax()), 59)
    together = step_sum(model, batch.rows(torch.tensor([user, other])), clip_norm)
    alone = step_sum(model, batch.rows(torch.tensor([other])), clip_norm)
    assert float((together - alone).norm()) / clip_norm <= 1 + 1e-6


def split(user: list[int], parts: int) -> list[list[int]]:
    return [chunk.tolist() for chunk in np.array_split(np.array(user), parts)]


@pytest.mark.parametrize("rows", [2, 3])
def test_one_user_in_several_rows_would_be_caught(rows: int) -> None:
    model = a_loud_model()
    others = some_users(5)
    whole = step_sum(model, batch_of([*others, *split(LOUD[:90], rows)], 90))
    moves = float((whole - step_sum(model, batch_of(others, 90))).norm()) / CLIP
    assert 1.05 < moves <= rows * (1 + 1e-6)


def test_clipping_events_instead_of_users_would_be_caught() -> None:
    model = a_loud_model()
    others = some_users(5)
    events = [list(pair) for pair in pairwise(LOUD)]
    whole = step_sum(model, batch_of([*others, *events], 12))
    assert float((whole - step_sum(model, batch_of(others, 12))).norm()) / CLIP > 10


class InBatchNegatives(Recommend):
    """What must never be used: candidates that are the other users' items."""

    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        return next_item_loss(
            self.states(batch),
            batch.items,
            self.vectors,
            self.priors_of(len(batch)),
            negatives=batch.items[batch.items >= 0].unique(),
        )


def test_negatives_from_the_batch_would_be_caught_and_public_ones_are_not() -> None:
    others = [[0, 1]] * 40  # alone, they have no candidate but the target, and so no gradient
    broken, right, clip_norm = a_model(InBatchNegatives), a_model(), 1e-3
    assert movement(lambda batch: step_sum(broken, batch, clip_norm), others, [2, 3], 2, clip_norm) > 5
    assert movement(lambda batch: step_sum(right, batch, clip_norm), others, [2, 3], 2, clip_norm) <= 1 + 1e-6


def test_a_normaliser_counted_from_the_data_would_be_caught() -> None:
    rows = some_users(5)
    share = SETTINGS.learning_rate * CLIP / SETTINGS.normaliser
    updates = []
    for batch in (batch_of(rows, 12), batch_of([*rows, QUIET], 12)):
        counted = replace(SETTINGS, normaliser=float(len(batch)))
        noise = SeededGaussian(5)
        updates.append(flat(train_round(a_loud_model(), batch, counted, sampler=Everyone(), noise=noise)))
    assert float(np.linalg.norm(updates[1] - updates[0])) / share > 1.5


def test_a_user_whose_gradient_is_not_finite_contributes_nothing() -> None:
    rows = [torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 2)]
    rows[0][1, 2] = float("nan")
    broken = [rows[0].clone(), rows[1].clone()]
    broken[0][1, 2] = float("inf")
    kept = [row[[0, 2]] for row in rows]
    assert torch.equal(clipped_sum(rows, CLIP), clipped_sum(kept, CLIP))
    assert torch.equal(clipped_sum(broken, CLIP), clipped_sum(kept, CLIP))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e20, 1e30])
def test_a_row_of_any_size_is_clipped_to_c_and_no_further(scale: float) -> None:
    row = scale * torch.randn(1, 300_000, generator=torch.Generator().manual_seed(0))
    norm = float(clipped_sum([row], CLIP).norm())
    assert norm == pytest.approx(min(CLIP, float(row.double().norm())), rel=1e-9)


def test_users_are_clipped_over_all_parameters_together() -> None:
    rows = [torch.full((1, 4), 10.0), torch.full((1, 4), 10.0)]
    assert float(clipped_sum(rows, CLIP).norm()) == pytest.approx(CLIP)


def movements_by_one_more(model: Recommend, batch: HistoryBatch, rows: int | None = ROWS) -> list[float]:
    """How far each user of a batch moves the sum over those before it, in clip norms."""
    sums = [
        step_sum(model, batch.rows(torch.arange(users)), rows=rows if users else ROWS)
        for users in range(len(batch) + 1)
    ]
    return [float((after - before).norm()) / CLIP for before, after in pairwise(sums)]


def a_touchy_model(kind: type[Recommend] = Recommend) -> tuple[Recommend, HistoryBatch]:
    """Parameters that make the rounding of a sum in float32 a gradient's direction, and twelve users."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vectors = torch.nn.functional.normalize(torch.randn(300, 384), dim=-1)
        model = kind(vectors, core="lstm", hidden_width=128, with_times=True)
    moved(model, by=100.0)
    return model, batch_of([[(7 * user + 3 * event) % 300 for event in range(32)] for user in range(12)], 32)


@pytest.mark.parametrize("at_once", [5, 32])
def test_a_user_moves_the_sum_by_c_however_many_others_there_are_and_whatever_was_broadcast(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BLAS takes other kernels for one row, for three and for many: seen to move other users' gradients by 2.6 C."""
    monkeypatch.setattr("client.grid_sums._AT_ONCE", at_once)
    moves = movements_by_one_more(*a_touchy_model())
    assert max(moves) <= 1 + 1e-6
    assert min(moves) >= 1 - 1e-4  # what room for rounding takes from a norm


def test_a_users_rounding_that_depends_on_how_many_others_there_are_would_be_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FewRowsKernel(Recommend):
        """Event vectors come out a rounding apart where there are few rows: what BLAS does, on any machine."""

        def event_vectors(self, batch: HistoryBatch) -> Tensor:
            return super().event_vectors(batch) * (1.0 if len(batch) >= 4 else 1.0 + 2**-22)

    model, batch = a_touchy_model(FewRowsKernel)
    assert max(movements_by_one_more(model, batch)) <= 1 + 1e-6
    assert max(movements_by_one_more(model, batch, None)) > 1.5


def test_kernels_that_go_by_shape_see_one_shape() -> None:
    """What a GPU's libraries do: another number of rows, another rounding, which parameters far off make large."""

    class ShapesKernel(Recommend):
        def event_vectors(self, batch: HistoryBatch) -> Tensor:
            return super().event_vectors(batch) * (1.0 + len(batch) * 2**-22)

    model, batch = a_touchy_model(ShapesKernel)
    assert max(movements_by_one_more(model, batch)) <= 1 + 1e-6
    assert max(movements_by_one_more(model, batch, None)) > 1.5


@pytest.mark.parametrize("users", [0, 1, 60])
def test_every_step_has_units_of_one_shape_whoever_was_drawn(users: int) -> None:
    seen: list[int] = []

    class Noting(Recommend):
        def per_user_loss(self, batch: HistoryBatch) -> Tensor:
            seen.append(len(batch))
            return super().per_user_loss(batch)

    model, settings = a_model(Noting), replace(SETTINGS, sampling_rate=0.5, steps=6, micro_batch=ROWS)
    rows_of_units(model, ROWS, 12)  # made-up users
    seen.clear()
    train_round(
        model, batch_of(some_users(users), 12), settings, sampler=SeededSampler(4), noise=SeededGaussian(1)
    )
    assert set(seen) == {ROWS}
    assert len(seen) == 6  # of nobody, too


def test_what_frozen_layers_say_of_a_user_does_not_depend_on_how_many_others_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counts(Recommend):
        """Lower layers that tell how many rows they ran on."""

        def prepare(self, batch: HistoryBatch) -> HistoryBatch:
            return replace(batch, token_states=torch.full((len(batch), 1, 1), float(len(batch))))

    def said(users: int) -> list[float]:
        prepared = prepare_histories(a_model(Counts), batch_of(some_users(users), 12), 8)
        assert prepared.token_states is not None
        assert len(prepared) == users
        assert torch.equal(prepared.items, batch_of(some_users(users), 12).items)
        return prepared.token_states.flatten().tolist()

    assert said(18) == [8.0] * 18
    assert said(3) == [8.0] * 3
    monkeypatch.setattr(HistoryBatch, "unit", lambda batch, rows: batch)
    assert said(19)[:18] != said(18)


def test_micro_batches_are_for_memory_alone() -> None:
    model = a_loud_model()
    batch = batch_of(some_users(24), 12)
    whole = step_sum(model, batch)
    parts = sum(
        (
            step_sum(model, batch.rows(torch.arange(start, start + users)))
            for start, users in ((0, 7), (7, 1), (8, 16))
        ),
        torch.zeros_like(whole),
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6 * CLIP)
    updates = []
    for micro_batch in (24, 7, 1):
        settings = replace(SETTINGS, micro_batch=micro_batch)
        noise = SeededGaussian(1)
        updates.append(flat(train_round(a_loud_model(), batch, settings, sampler=Everyone(), noise=noise)))
    np.testing.assert_allclose(updates[1], updates[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(updates[2], updates[0], rtol=0, atol=2e-6)
