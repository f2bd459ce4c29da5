"""What nobody can vouch for is refused before any history is looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from client.bookkeeping import (
    RowsAreNotUsersError,
)
from client.opacus_gradients import UnvouchedLayerError, check_layers, per_user_gradients
from client.self_test import check_rows_are_users
from client.training import train_round
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.privacy.noise import SecureGaussian
from tests.client.training_cases import (
    RAGGED,
    SETTINGS,
    WIDTH,
    Everyone,
    a_model,
    assert_rows_are_users,
    batch_of,
    moved,
)


def extra(part: nn.Module) -> Recommend:
    """The family with one more part, which every user's states go through."""
    model = a_model()
    model.residual = nn.Sequential(model.residual, part)  # type: ignore[assignment]
    return model


class Shift(nn.Module):
    """A trainable parameter outside of any layer that we know."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Lookup(nn.Module):
    """Trainable position vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.table(torch.arange(x.shape[1]).unsqueeze(0))
        return y


class BatchNorm(nn.Module):
    def __init__(self, *, trainable: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=trainable)

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return normal


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH).to(torch.bfloat16)

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
        (lambda: nn.LayerNorm(WIDTH), "LayerNorm"),
        (Lookup, "Embedding"),
        (Shift, "Shift"),
        (lambda: BatchNorm(trainable=True), "mixes users"),
        (lambda: BatchNorm(trainable=False), "mixes users"),
        (Shared, "share a parameter"),
        (HalfPrecision, "only float32"),
        (lambda: Kin(WIDTH, WIDTH), "Kin"),
        (lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), "LSTM"),
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
    norm = nn.LayerNorm(WIDTH).requires_grad_(False)
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
        self.map = nn.Linear(1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1)
        y: Tensor = x + self.map(positions)
        return y


class PerEvent(nn.Module):
    """A Linear layer whose rows are events."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.map(x.flatten(0, 1)).view_as(x)
        return y


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

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
        self.map = nn.Linear(WIDTH, WIDTH)

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
