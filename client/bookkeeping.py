"""The clipped sum of per-user gradients from one backward pass, without a gradient for each user in memory.

Opacus' hooks make [users, *shape] of each weight. Here each trainable Linear layer keeps what went in, a, and what
came back, g: user u's gradient is the sum over places p of g_up a_up^T, and all that is asked of it is

    norm^2 = sum over p, q of (a_up . a_uq) (g_up . g_uq)     from Gram matrices, where they cost less than itself,
    sum over users of c_u gradient_u = (c g)^T a              one product for each weight; c: the clip factors.

Li et al. 2022 (arXiv:2110.05679) for the norms, Bu et al. 2023 (arXiv:2210.00038) for both in one pass; autograd's own
gradients of weights are never computed. Norms and products are float64, so that what one user adds to the sum is
that user's clipped gradient to 1e-12 of C, whoever else is there: in float32 the rounding of a long sum could exceed
what the noise's inflation covers (`private_sum`). Opacus' rows are what this is held against, before the first step of
each model (`training.check_rows_are_users`) and in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.witness import WITNESS

ClippedSum = Callable[[HistoryBatch, float], Tensor]
"""(batch, C) -> [coordinates] float64, the trainable parameters flattened one after the other."""


class RowsAreNotUsersError(RuntimeError):
    """A parameter's per-user gradient does not have one row a user: the step is refused."""


class _Recorded(torch.autograd.Function):
    """A Linear layer whose backward pass records (a, g) in place of the gradients of weight and bias.

    `tap` requires a gradient, so that the pass comes here where the layer's input requires none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: Tensor,
        calls: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.calls = calls
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.calls.append((x.detach(), grads[0]))
        return grads[0] @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


@dataclass
class _Layer:
    """A trainable Linear layer, and its calls of the present pass."""

    name: str
    module: nn.Linear
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def forward(self, tap: Tensor) -> Callable[[Tensor], Tensor]:
        weight, bias = self.module.weight.detach(), self.module.bias

        def recorded(x: Tensor) -> Tensor:
            found: Tensor = _Recorded.apply(  # type: ignore[no-untyped-call]
                x, weight, None if bias is None else bias.detach(), tap, self.calls
            )
            return found

        return recorded

    def taken(self, users: int, double: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """a [users, places, inputs] and g [users, places, outputs], float64, over all calls; they are forgotten here.

        Raises:
            RowsAreNotUsersError: the layer was not called, or a call's rows are not users.
        """
        if not self.calls:
            raise RowsAreNotUsersError(f"layer {self.name} got no gradient, so it has no row a user")
        for x, _ in self.calls:
            if x.ndim < 2 or x.shape[0] != users:
                raise RowsAreNotUsersError(
                    f"layer {self.name} was called on shape {tuple(x.shape)}, but must have one row a user"
                )
        joined = [
            tuple(double(each).reshape(users, -1, each.shape[-1]) for each in call) for call in self.calls
        ]
        self.calls.clear()
        a, g = zip(*joined, strict=True)
        return (a[0], g[0]) if len(a) == 1 else (torch.cat(a, dim=1), torch.cat(g, dim=1))


class _Doubles:
    """Tensors in float64, each made once: a recurrence's two maps get the same g."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.Size, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = (x.data_ptr(), x.shape, x.stride())
        if key not in self._made:
            self._made[key] = (x, x.double())  # x is kept, or its memory could be another's
        return self._made[key][1]


def squared_norms(a: Tensor, g: Tensor) -> Tensor:
    """[users]: the squared norm of each user's sum over places of g a^T.

    Args:
        a: [users, places, inputs] float64.
        g: [users, places, outputs] float64.
    """
    places, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
    if places == 1:
        return a.square().sum((1, 2)) * g.square().sum((1, 2))
    if places * (inputs + outputs) < inputs * outputs:
        return ((a @ a.transpose(1, 2)) * (g @ g.transpose(1, 2))).sum((1, 2)).clamp(min=0)
    return (g.transpose(1, 2) @ a).square().sum((1, 2))


@torch.no_grad()
def _clipped(
    layers: list[_Layer], users: int, clip_norm: float, like: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Name of weight or bias -> clipped sum, float64."""
    double = _Doubles()
    taken = {layer.name: layer.taken(users, double) for layer in layers}
    biased = {layer.name for layer in layers if layer.module.bias is not None}
    squared = torch.zeros(users, dtype=torch.float64, device=next(iter(like.values())).device)
    for name, (a, g) in taken.items():
        squared = squared + squared_norms(a, g)
        if name in biased:
            squared = squared + g.sum(dim=1).square().sum(dim=1)
    norms = squared.sqrt()
    factors = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    finite = norms.isfinite()
    if not bool(finite.all()):  # such a user contributes nothing: a contribution like any other
        factors = torch.where(finite, factors, 0.0)
        keep = finite.view(-1, 1, 1)
        taken = {
            name: (torch.where(keep, a, 0.0), torch.where(keep, g, 0.0)) for name, (a, g) in taken.items()
        }
    found = {}
    for name, (a, g) in taken.items():
        scaled = g * factors.view(-1, 1, 1)
        found[f"{name}.weight"] = scaled.flatten(0, 1).T @ a.flatten(0, 1)
        if name in biased:
            found[f"{name}.bias"] = scaled.sum((0, 1))
    return found


@contextmanager
def clipped_sums(model: InterestModel) -> Iterator[ClippedSum]:
    """Gives a function from a batch of users to the sum of their gradients, each clipped to C as a whole.

    The model is changed inside alone: its trainable Linear layers record. What else is trainable is refused.

    Raises:
        RowsAreNotUsersError: from the function: the loss or a layer's rows are not users, or a parameter got none.
    """
    layers = [
        _Layer(name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.requires_grad
    ]
    parameters = model.trainable()
    device = next(iter(parameters.values())).device
    tap = torch.zeros((), requires_grad=True, device=device)

    def total(batch: HistoryBatch, clip_norm: float) -> Tensor:
        users = len(batch)
        if users == 0:  # transformers cannot run on no rows; no user contributes nothing
            return torch.zeros(
                sum(p.numel() for p in parameters.values()), dtype=torch.float64, device=device
            )
        for layer in layers:
            layer.calls.clear()
        losses = model.per_user_loss(batch)
        if losses.shape != (users,):
            raise RowsAreNotUsersError(
                f"the loss has shape {tuple(losses.shape)}, but must be one number a user"
            )
        losses.sum().backward()
        found = _clipped(layers, users, clip_norm, parameters)
        if model.witness is not None:  # zero whatever the loss does: no user reaches it
            found[WITNESS] = torch.zeros(model.witness.shape, dtype=torch.float64, device=device)
        if set(found) != set(parameters):
            odd = ", ".join(sorted(set(found) ^ set(parameters))[:4])
            raise RowsAreNotUsersError(f"{odd} is trainable on one side only: no row a user")
        return torch.cat([found[name].flatten() for name in parameters])

    model.train()
    for layer in layers:
        layer.module.forward = layer.forward(tap)  # type: ignore[method-assign, assignment]
    try:
        yield total
    finally:
        for layer in layers:
            del layer.module.forward
            layer.calls.clear()
        for parameter in parameters.values():
            parameter.grad = None
