"""Per-user gradients of every trainable layer against plain autograd over one user at a time; and the guards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from client.bookkeeping import (
    clipped_sums,
)
from client.opacus_gradients import UnvouchedLayerError, clipped_sum, per_user_gradients
from client.self_test import check_rows_are_users
from client.training import train_round
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.heads import beside
from common.models.history_encoder import HistoryEncoder
from common.models.item_vectors import item_vectors as embed
from common.models.language_model import LanguageModel
from common.models.names import CORES
from common.models.sequence import Reading
from common.models.tasks.interest import Interest
from common.models.tasks.next_category import NextCategory
from common.models.tasks.task import Task
from common.privacy.noise import SecureGaussian
from tests.client.training_cases import (
    CLIP,
    RAGGED,
    SETTINGS,
    Everyone,
    a_model,
    assert_one_pass_gives_the_rows_sum,
    assert_rows_are_users,
    batch_of,
    item_vectors,
    moved,
    one_at_a_time,
    some_users,
)
from tests.common.models.tiny_models import ARCHITECTURES, TEXTS, histories, tiny_language_model


def lora_model(
    lm: LanguageModel,
    texts: list[str],
    *,
    train_down: bool,
    most_tokens: int = 20,
    precision: torch.dtype = torch.float32,
) -> Recommend:
    public = embed(lm, texts, 6)
    encoder = HistoryEncoder(
        lm,
        texts,
        public.projection,
        top_layers=2,
        rank=2,
        train_down=train_down,
        most_tokens=most_tokens,
        seed=3,
        precision=precision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Recommend(public.vectors, core="lstm", hidden_width=4, encoder=encoder)
    moved(model)
    return model


@pytest.mark.parametrize("at_once", [1, 2, 32])
@pytest.mark.parametrize("item_prior", [True, False])
def test_rows_are_users_with_frozen_item_vectors(
    item_prior: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.grid_sums._AT_ONCE", at_once)
    model = a_model(item_prior=item_prior)
    moved(model)
    assert_rows_are_users(model, batch_of(RAGGED, 7), room=1e-5)
    layers = {name.rsplit(".", 1)[0] for name in model.trainable()}
    wanted = {"core.input_map", "core.state_map", "residual"} | ({"item_prior"} if item_prior else set())
    assert layers == wanted


def next_category(vectors: Tensor) -> Task:
    member = torch.zeros(len(vectors), 4, dtype=torch.bool)
    member[torch.arange(len(vectors)), torch.arange(len(vectors)) % 4] = True
    return NextCategory(vectors, member)


@pytest.mark.parametrize("task", [None, Interest, next_category], ids=["item", "interest", "category"])
@pytest.mark.parametrize("core", CORES)
def test_rows_are_users_with_every_core_and_task(core: str, task: Callable[[Tensor], Task] | None) -> None:
    vectors = item_vectors()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Recommend(
            vectors,
            core=core,
            hidden_width=4,
            task=None if task is None else task(vectors),
            with_times=True,
        )
    moved(model)
    batch = batch_of(RAGGED, 7)
    chance = torch.rand(batch.items.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.where(batch.mask & (chance < 0.8), (chance < 0.4).float(), float("nan"))
    assert_rows_are_users(model, replace(batch, labels=labels), room=2e-5)
    check_rows_are_users(model)


@pytest.mark.parametrize("train_down", [False, True], ids=["up", "up and down"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_users_with_adapters(architecture: str, train_down: bool) -> None:
    model = lora_model(tiny_language_model(architecture, dropout=0.5), TEXTS, train_down=train_down)
    adapters = [name for name in model.trainable() if name.startswith("encoder.")]
    per_layer = 1 if architecture == "gpt2" else 2  # GPT-2 has query, key and value in one projection
    assert len(adapters) == 2 * per_layer * (2 if train_down else 1)
    assert all(".lora_up." in name or (train_down and ".lora_down." in name) for name in adapters)
    assert_rows_are_users(model, HistoryBatch(*histories(RAGGED)), room=2e-5)
    check_rows_are_users(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_users_over_a_frozen_part_in_bfloat16(architecture: str) -> None:
    lm = tiny_language_model(architecture)
    model = lora_model(lm, TEXTS, train_down=True, precision=torch.bfloat16)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    assert_rows_are_users(model, HistoryBatch(*histories(RAGGED)), room=2e-5)
    check_rows_are_users(model)


def test_rows_are_users_with_the_default_language_model() -> None:
    assets = pytest.importorskip("common.assets")
    from common.models.language_model import load_language_model

    try:
        folder = assets.language_model("all-MiniLM-L6-v2", offline=True)
    except assets.AssetError:
        pytest.skip("the default language model is not in the cache: `fedtide data fetch default`")
    lm = load_language_model(folder)
    titles = ["Toy Story (1995)", "Heat (1995)", "千と千尋の神隠し", "Alien", "", "The Third Man (1949)"]
    model = lora_model(lm, titles, train_down=True, most_tokens=40)
    assert_rows_are_users(model, batch_of([[0, 1, 2, 4], [3, 5], [5]], 4), room=2e-5)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_micro_batches_give_the_same_sum_through_a_language_model(architecture: str) -> None:
    model = lora_model(tiny_language_model(architecture), TEXTS, train_down=True)
    batch = model.prepare(batch_of(some_users(24, longest=6, items=12), 6))
    with per_user_gradients(model) as gradients:
        whole = clipped_sum(gradients(batch), CLIP)
        parts = torch.zeros_like(whole)
        for start, users in ((0, 7), (7, 1), (8, 16)):
            parts += clipped_sum(gradients(batch.rows(torch.arange(start, start + users))), CLIP)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5 * CLIP)


def test_a_layer_that_is_called_twice_gives_both_calls_gradient() -> None:
    class Twice(Recommend):
        def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
            found = super().read(vectors, batch)
            return Reading(found.residual + super().read(0.5 * vectors, batch).residual)

    model = a_model(Twice)
    moved(model)
    batch = batch_of(RAGGED, 7)
    assert_one_pass_gives_the_rows_sum(model, batch, one_at_a_time(model, batch))


def test_a_model_that_is_wrong_about_which_inputs_are_trained_through_is_refused() -> None:
    class Lying(Recommend):
        """Says that another part than the first one is trained through."""

        def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
            h = self.core(vectors)
            joined = torch.cat([vectors, h, vectors], dim=-1)
            joined.moving_part = h  # type: ignore[attr-defined]
            return Reading(self.residual(joined))

    class Honest(Recommend):
        def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
            return Reading(self.residual(beside(self.core(vectors), vectors, vectors)))

    check_rows_are_users(a_model(Honest))
    with pytest.raises(UnvouchedLayerError, match="clipped sum is not that of its users"):
        check_rows_are_users(a_model(Lying))


@pytest.mark.parametrize("small", [True, False], ids=["made", "factored"])
def test_a_user_whose_gradient_is_not_finite_adds_nothing_in_one_pass(
    small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.bookkeeping._is_small", lambda a, g: small)

    class Spoilt(Recommend):
        def per_user_loss(self, batch: HistoryBatch) -> Tensor:
            spoilt = torch.where(batch.items[:, 0] == RAGGED[1][0], float("inf"), 1.0)
            return super().per_user_loss(batch) * spoilt

    model, honest = a_model(Spoilt), a_model()
    moved(model)
    moved(honest)
    with clipped_sums(model) as clipped:
        found = clipped(batch_of(RAGGED, 7), CLIP)
    with clipped_sums(honest) as clipped:
        wanted = clipped(batch_of(RAGGED[:1] + RAGGED[2:], 7), CLIP)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * CLIP)


def test_no_rows_are_gradients_of_no_users() -> None:
    model = lora_model(tiny_language_model("bert"), TEXTS, train_down=False)
    empty = model.prepare(batch_of([], 5))
    with per_user_gradients(model) as gradients:
        rows = gradients(empty)
    assert [tuple(row.shape) for row in rows] == [(0, *p.shape) for p in model.trainable().values()]
    assert float(clipped_sum(rows, CLIP).norm()) == 0
    update = train_round(model, batch_of([], 5), SETTINGS, sampler=Everyone(), noise=SecureGaussian())
    assert all(float(change.norm()) > 0 for change in update.values())
