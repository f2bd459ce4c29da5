"""Per-user gradients of every trainable layer against plain autograd over one user at a time; and the guards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from client.bookkeeping import (
    RowsAreNotUsersError,
    _Factored,
    _held,
    clipped_sums,
)
from client.training import (
    UnvouchedLayerError,
    check_layers,
    check_rows_are_users,
    clipped_sum,
    per_user_gradients,
    train_round,
)
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.heads import beside
from common.models.history_encoder import HistoryEncoder
from common.models.interface import InterestModel
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
    SETTINGS,
    Everyone,
    a_model,
    batch_of,
    item_vectors,
    moved,
    some_users,
)
from tests.common.models.tiny_models import ARCHITECTURES, TEXTS, histories, tiny_language_model

RAGGED = [[1, 2, 3, 4, 9, 2], [5, 6], [7], [3, 3, 8, 11, 0], [10, 1, 10]]
"""One user with one event, one with an item twice."""


def one_at_a_time(model: InterestModel, batch: HistoryBatch) -> list[list[Tensor]]:
    """Each user's gradients from a batch of that user alone, without hooks: [users][parameters]."""
    parameters = list(model.trainable().values())
    return [
        list(torch.autograd.grad(model.per_user_loss(batch.rows(torch.tensor([user]))).sum(), parameters))
        for user in range(len(batch))
    ]


def assert_rows_are_users(model: InterestModel, batch: HistoryBatch, *, room: float) -> None:
    """Every trainable parameter's rows equal the loop's, and every parameter is really moved by someone."""
    batch = model.prepare(batch)
    with per_user_gradients(model) as gradients:
        rows = gradients(batch)
    expected = one_at_a_time(model, batch)
    for place, name in enumerate(model.trainable()):
        size = max(float(user[place].norm()) for user in expected)
        assert size > 1e-7, f"{name} has no gradient, so the comparison is empty"
        for user, own in enumerate(expected):
            assert float((rows[place][user] - own[place]).norm()) <= room * size, name
    assert_one_pass_gives_the_rows_sum(model, batch, expected)


def as_on_a_device(a: Tensor, g: Tensor, clip_norm: float) -> _Factored:
    return _Factored(a, g)


def assert_one_pass_gives_the_rows_sum(
    model: InterestModel, batch: HistoryBatch, expected: list[list[Tensor]]
) -> None:
    """A step's clipped sum is the loop's: every user clipped, some, none; on a CPU, and as a device does it."""
    flat = torch.stack([torch.cat([gradient.flatten() for gradient in user]) for user in expected]).double()
    norms = flat.norm(dim=1, keepdim=True)
    with clipped_sums(model) as clipped:
        for clip_norm in (0.5 * float(norms[norms > 0].min()), float(norms.median()), 2 * float(norms.max())):
            wanted = (flat * (clip_norm / norms.clamp(min=1e-12)).clamp(max=1)).sum(dim=0)
            for held in (_held, as_on_a_device):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("client.bookkeeping._held", held)
                    found = clipped(batch, clip_norm)
                assert float((found - wanted).norm()) <= 1e-4 * clip_norm
                assert found.dtype == torch.float64
    assert all(parameter.grad is None for parameter in model.parameters())


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
    monkeypatch.setattr("client.bookkeeping._AT_ONCE", at_once)
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


# Guards: what nobody can vouch for is refused before any history is looked at.


def extra(part: nn.Module) -> Recommend:
    """The family with one more part, which every user's states go through."""
    model = a_model()
    model.residual = nn.Sequential(model.residual, part)  # type: ignore[assignment]
    return model


class Shift(nn.Module):
    """A trainable parameter outside of any layer that we know."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Lookup(nn.Module):
    """Trainable position vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.table(torch.arange(x.shape[1]).unsqueeze(0))
        return y


class BatchNorm(nn.Module):
    def __init__(self, *, trainable: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=trainable)

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return normal


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.map(x.to(torch.bfloat16))
        return y.float()


class Kin(nn.Linear):
    """A Linear layer with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (lambda: nn.LayerNorm(6), "LayerNorm"),
        (Lookup, "Embedding"),
        (Shift, "Shift"),
        (lambda: BatchNorm(trainable=True), "mixes users"),
        (lambda: BatchNorm(trainable=False), "mixes users"),
        (Shared, "share a parameter"),
        (HalfPrecision, "only float32"),
        (lambda: Kin(6, 6), "Kin"),
        (lambda: nn.LSTM(6, 6, batch_first=True), "LSTM"),
    ],
)
def test_a_trainable_layer_that_nobody_vouches_for_is_refused(
    part: Callable[[], nn.Module], said: str
) -> None:
    model = extra(part())
    with pytest.raises(UnvouchedLayerError, match=said):
        check_layers(model)
    with pytest.raises(UnvouchedLayerError, match=said):
        train_round(model, batch_of(RAGGED, 7), SETTINGS, sampler=Everyone(), noise=SecureGaussian())


def test_a_frozen_layer_of_any_kind_that_keeps_users_apart_is_accepted() -> None:
    norm = nn.LayerNorm(6).requires_grad_(False)
    model = extra(norm)
    moved(model)
    assert_rows_are_users(model, batch_of(RAGGED, 7), room=1e-5)
    check_rows_are_users(extra(norm))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(UnvouchedLayerError, match="no trainable parameter"):
        check_layers(a_model().requires_grad_(False))


class PositionInput(nn.Module):
    """A Linear layer that sees positions once for all users."""

    def __init__(self, events: int = 5) -> None:
        super().__init__()
        self.map = nn.Linear(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1)
        y: Tensor = x + self.map(positions)
        return y


class PerEvent(nn.Module):
    """A Linear layer whose rows are events."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.map(x.flatten(0, 1)).view_as(x)
        return y


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x


class MeanOverUsers(nn.Module):
    """Centres states over the batch: no parameter, no batch norm, and yet users are mixed."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)


class OthersAttended(nn.Module):
    """Rows are users in shape alone: the layer runs over a batch turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.map(x.flip(0)).flip(0)
        return y


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (PositionInput, "one row a user"),
        (PerEvent, "one row a user"),
        (Unused, "one row a user"),
        (MeanOverUsers, "another gradient in a batch than alone"),
        (OthersAttended, "another gradient in a batch than alone"),
        (Random, "another gradient in a batch than alone"),
    ],
)
def test_a_model_whose_rows_are_not_users_is_refused_on_made_up_histories(
    part: Callable[[], nn.Module], said: str
) -> None:
    model = extra(part())
    start = model.trainable_state()
    with pytest.raises(UnvouchedLayerError, match=said):
        check_rows_are_users(model)
    assert all(torch.equal(value, start[name]) for name, value in model.trainable_state().items())
    untouchable = batch_of([[999_999]], 1)  # looking at it would fail in another way
    with pytest.raises(UnvouchedLayerError, match=said):
        train_round(model, untouchable, SETTINGS, sampler=Everyone(), noise=SecureGaussian())


class MixedLoss(Recommend):
    """A loss that looks at the other users."""

    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        own = super().per_user_loss(batch)
        return own * own.mean()


class WholeLoss(Recommend):
    """A loss that is one number for all."""

    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        return super().per_user_loss(batch).mean()


def test_a_loss_that_mixes_users_is_refused() -> None:
    with pytest.raises(UnvouchedLayerError, match="another gradient in a batch than alone"):
        check_rows_are_users(a_model(MixedLoss))
    with pytest.raises(UnvouchedLayerError, match="one number a user"):
        check_rows_are_users(a_model(WholeLoss))


@pytest.mark.parametrize("part", [PositionInput, PerEvent, Unused])
def test_rows_that_are_not_users_are_refused_at_a_step_too(part: Callable[[], nn.Module]) -> None:
    model = extra(part())
    with per_user_gradients(model) as gradients, pytest.raises(RowsAreNotUsersError, match="one row a user"):
        gradients(batch_of(RAGGED, 7))


def test_the_check_passes_and_leaves_the_model_as_it_was_and_runs_once() -> None:
    calls = 0

    class Counted(Recommend):
        def per_user_loss(self, batch: HistoryBatch) -> Tensor:
            nonlocal calls
            calls += 1
            return super().per_user_loss(batch)

    model = a_model(Counted)
    start = model.trainable_state()
    check_rows_are_users(model)
    assert calls == 7  # four users together, as rows and as a clipped sum twice, and each alone
    check_rows_are_users(model)
    assert calls == 7
    assert all(torch.equal(value, start[name]) for name, value in model.trainable_state().items())
    model.item_prior = None  # another set of parameters is another model
    check_rows_are_users(model)
    assert calls == 14


def test_hooks_are_gone_after_a_failure() -> None:
    model = a_model(MixedLoss)

    def fail() -> None:
        with per_user_gradients(model) as gradients:
            gradients(batch_of(RAGGED, 7))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not hasattr(parameter, "grad_sample")
