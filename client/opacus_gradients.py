"""Per-user gradients by Opacus' hooks, and the clipped sum that is made of them: the reference for every other way.

Opacus gives each trainable weight a gradient of [users, *shape]; clipping, the grid and the noise are Fedtide's own. A
site may train so (`engine = "opacus"` in its policy), and every site holds the faster way (`bookkeeping.py`) against
this before a step (`self_test.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from client.bookkeeping import ClippedSum, RowsAreNotUsersError, Seen, nobody_sees
from client.grid_sums import sum_rows_on_grid
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.privacy.noise import LARGEST_DIMENSION
from common.witness import WITNESS

VOUCHED_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear,)
"""Layers whose per-user gradients are tested against a loop over users. Others are refused at the start."""


class UnvouchedLayerError(ValueError):
    """The model has a trainable layer whose per-user gradients nobody here has checked."""


def check_layers(model: nn.Module) -> None:
    """Refuses a model with a trainable layer outside VOUCHED_LAYERS, one that mixes users, or too large a one.

    Raises:
        UnvouchedLayerError: names the layer and its type.
    """
    seen: dict[int, str] = {}
    witness = getattr(model, WITNESS, None)
    coordinates = 0 if witness is None else witness.numel()
    if witness is not None and witness.requires_grad:
        raise UnvouchedLayerError(
            "the witness would be trained, but holds noise alone: leave its requires_grad at False"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnvouchedLayerError(
                f"layer {name} is a {type(module).__name__}, which mixes users: remove it"
            )
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and type(module) not in VOUCHED_LAYERS:
            raise UnvouchedLayerError(
                f"trainable layer {name or 'model'} is a {type(module).__name__}; per-user gradients are vouched for "
                f"{', '.join(t.__name__ for t in VOUCHED_LAYERS)} only: freeze it, or build it from those"
            )
        for parameter in own:
            if parameter.dtype != torch.float32:
                raise UnvouchedLayerError(
                    f"trainable layer {name} is {parameter.dtype}; only float32 is clipped and noised"
                )
            if id(parameter) in seen:
                raise UnvouchedLayerError(
                    f"layers {seen[id(parameter)]} and {name} share a parameter; give each its own"
                )
            seen[id(parameter)] = name
            coordinates += parameter.numel()
    if not seen:
        raise UnvouchedLayerError("the model has no trainable parameter")
    if coordinates > LARGEST_DIMENSION:
        raise UnvouchedLayerError(
            f"the model has {coordinates} trainable coordinates, but the noise vouches for {LARGEST_DIMENSION}: "
            "lower width, hidden_width or lora_rank"
        )


@contextmanager
def per_user_gradients(model: InterestModel) -> Iterator[Callable[[HistoryBatch], list[Tensor]]]:
    """Gives a function from a batch to per-user gradients, one [users, *shape] a trainable parameter, in order.

    Opacus' hooks do the work on the model as it is (no wrapper), and are removed at the end.
    """
    from opacus.grad_sample import GradSampleHooks

    check_layers(model)
    model.train()
    parameters = list(model.trainable().values())
    hooks = GradSampleHooks(model, loss_reduction="sum")

    def gradients(batch: HistoryBatch) -> list[Tensor]:
        users = len(batch)
        if users == 0:  # transformers cannot run on no rows; no user contributes nothing
            return [p.new_zeros(0, *p.shape) for p in parameters]
        for parameter in parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        losses = model.per_user_loss(batch)
        if losses.shape != (users,):
            raise RowsAreNotUsersError(
                f"the loss has shape {tuple(losses.shape)}, but must be one number a user"
            )
        with warnings.catch_warnings():
            # Inputs of first layers need no gradient; the hooks do what they must all the same (tested).
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        rows: list[Tensor] = []
        for name, parameter in model.trainable().items():
            if parameter is model.witness:  # zero whatever the loss does: no user reaches it
                rows.append(parameter.new_zeros(users, *parameter.shape))
                continue
            sample = parameter.grad_sample  # type: ignore[attr-defined]
            if not isinstance(sample, Tensor) or sample.shape != (users, *parameter.shape):
                found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
                raise RowsAreNotUsersError(
                    f"parameter {name} has per-user gradients of shape {found}, but must have one row a user"
                )
            rows.append(sample)
        return rows

    try:
        yield gradients
    finally:
        hooks.remove_hooks()
        for parameter in parameters:
            parameter.grad = None
            for attribute in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)


def clipped_sum(rows: list[Tensor], clip_norm: float) -> Tensor:
    """Sum over users of each user's whole gradient, scaled to norm at most `clip_norm`.

    A user whose gradient is not finite contributes nothing: a contribution like any other, and no failure that
    an outsider could observe.

    Args:
        rows: one [users, *shape] float32 a parameter.

    Returns:
        [coordinates] float64, the parameters flattened one after the other.
    """
    flat = torch.cat([sample.flatten(1) for sample in rows], dim=1)  # [users, coordinates]
    # In float64: a float32 norm of many coordinates can be off by more than what the noise's inflation covers.
    norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    factors = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    finite = norms.isfinite()
    if not bool(finite.all()):
        flat = torch.where(finite.unsqueeze(1), flat, 0.0)
        factors = torch.where(finite, factors, 0.0)
    # Summed in float64: rounding in a long float32 sum could exceed what the noise's inflation covers.
    total: Tensor = factors @ flat.double()
    return total


@contextmanager
def opacus_sums(
    model: InterestModel, rows: int | None = None, seen: Seen = nobody_sees
) -> Iterator[ClippedSum]:
    """Gives a function from a batch of users to the sum of their gradients, each clipped to C as a whole.

    Does what `bookkeeping.clipped_sums` does, from [rows, coordinates] of Opacus' per-user gradients in memory.

    Args:
        rows: of a unit (`HistoryBatch.unit`), the same in every pass; None: as many as a batch has users.
        seen: told each row's gradient and clip factor.

    Raises:
        UnvouchedLayerError: a layer that nobody here has checked.
        RowsAreNotUsersError: from the function: the loss or a parameter's rows are not users.
    """
    with per_user_gradients(model) as gradients:

        def total(batch: HistoryBatch, clip_norm: float) -> Tensor:
            users = len(batch)
            unit = batch.unit(rows or users)
            flat = torch.cat([sample.flatten(1) for sample in gradients(unit)], dim=1)  # [rows, coordinates]
            norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
            factors = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
            seen({"gradients": flat, "factors": factors})
            counts = norms.isfinite()  # a user whose gradient is not finite contributes nothing
            counts[users:] = False
            return sum_rows_on_grid(flat, torch.where(counts, factors, 0.0), clip_norm)

        yield total
