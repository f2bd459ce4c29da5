"""The clipped sum of per-user gradients from one backward pass, without a gradient for each user in memory.

Opacus' hooks make [users, *shape] of each weight. Here each trainable Linear layer keeps what went in, a, and what
came back, g: user u's gradient is the sum over places p of g_up a_up^T, and all that is asked of it is

    norm^2 = sum over p, q of (a_up . a_uq) (g_up . g_uq)     from Gram matrices, where the gradient itself is large,
    sum over users of c_u gradient_u = (c g)^T a              one product for each weight; c: the clip factors.

Li et al. 2022 (arXiv:2110.05679) for the norms, Bu et al. 2023 (arXiv:2210.00038) for both in one pass; autograd's own
gradients of weights are never computed. Where a gradient is small beside a and g, it is made after all, user by user
in float32, as Opacus does, and the rest is the same.

What one user adds to the sum must be that user's clipped gradient, whoever else is there. So norms and sums are
float64 (see `_rounding`); in float32 the rounding of a long sum could exceed what the noise's inflation covers
(`private_sum`), and no bound on it that holds for every batch is near that. And a and g, which are float32, must not
depend on how many others there are: BLAS takes other kernels for few rows than for many, and parameters far off
(which a server may send) make that rounding as large as it gets: a fourth user was seen to move a sum by 3.6 C. So
batches run evened out (`HistoryBatch.evened`). Opacus' rows are what all of this is held against, before the first
step of each model (`training.check_rows_are_users`) and in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.models.batches import HistoryBatch
from common.models.heads import moving_part
from common.models.interface import InterestModel
from common.models.own_weights import gradient_through, linear_of_sites
from common.witness import WITNESS

_AT_ONCE = 32
"""Users whose part is made in float64 at once on a CPU, so that its caches hold it."""

ClippedSum = Callable[[HistoryBatch, float], Tensor]
"""(batch, C) -> [coordinates] float64, the trainable parameters flattened one after the other."""


class RowsAreNotUsersError(RuntimeError):
    """A parameter's per-user gradient does not have one row a user: the step is refused."""


class Recorded(torch.autograd.Function):
    """A Linear layer whose backward pass records (a, g) in place of the gradients of weight and bias.

    The weight is [out, in], or [sites, out, in] for rows of several sites. `tap` requires a gradient, so that the pass
    comes here where the layer's input requires none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        moving: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: Tensor,
        calls: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        # moving: the first columns of x, or all: the part that a gradient goes through
        ctx.save_for_backward(x, weight)
        ctx.columns, ctx.calls = moving.shape[-1], calls
        return linear_of_sites(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.calls.append((x, grads[0]))
        through = gradient_through(grads[0], weight, ctx.columns) if ctx.needs_input_grad[1] else None
        return None, through, None, None, None, None


@dataclass
class _Layer:
    """A trainable Linear layer, and its calls of the present pass."""

    name: str
    module: nn.Linear
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def forward(self, tap: Tensor) -> Callable[[Tensor], Tensor]:
        weight, bias = self.module.weight.detach(), self.module.bias

        def recorded(x: Tensor) -> Tensor:
            found: Tensor = Recorded.apply(  # type: ignore[no-untyped-call]
                x.detach(), moving_part(x), weight, None if bias is None else bias.detach(), tap, self.calls
            )
            return found

        return recorded

    def taken(self, rows: int, users: int) -> tuple[Tensor, Tensor]:
        """a [users, places, inputs] and g [users, places, outputs] over all calls; they are forgotten here.

        Args:
            rows: of the batch; those after the users' are dropped.

        Raises:
            RowsAreNotUsersError: the layer was not called, or a call's rows are not users.
        """
        if not self.calls:
            raise RowsAreNotUsersError(f"layer {self.name} got no gradient, so it has no row a user")
        for x, _ in self.calls:
            if x.ndim < 2 or x.shape[0] != rows:
                raise RowsAreNotUsersError(
                    f"layer {self.name} was called on shape {tuple(x.shape)}, but must have one row a user"
                )
        joined = [
            tuple(each[:users].reshape(users, -1, each.shape[-1]) for each in call) for call in self.calls
        ]
        self.calls.clear()
        a, g = zip(*joined, strict=True)
        return (a[0], g[0]) if len(a) == 1 else (torch.cat(a, dim=1), torch.cat(g, dim=1))


class _Shared:
    """What is made of a tensor, made once: a recurrence's two maps get the same g."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._made: dict[tuple[int, torch.Size, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = (x.data_ptr(), x.shape, x.stride())
        if key not in self._made:
            self._made[key] = (x, self._make(x))  # x is kept, or its memory could be another's
        return self._made[key][1]


def _double(x: Tensor) -> Tensor:
    return x.to(torch.float64, memory_format=torch.contiguous_format)


def _gram(x: Tensor) -> Tensor:
    """x x^T for each user; on CPU by numpy, whose BLAS makes one half and mirrors it."""
    if x.device.type != "cpu":
        return x @ x.mT
    rows = x.numpy()
    with np.errstate(all="ignore"):  # or a warning would tell of a user whose numbers are none
        return torch.from_numpy(rows @ rows.swapaxes(1, 2))


def _gram_of(users: slice, x: Tensor) -> Tensor:
    """These users' Gram matrices, float64."""
    return _gram(_double(x[users]))


def _scaled(users: slice, factors: Tensor, g: Tensor) -> Tensor:
    """These users' g times their factors, float64."""
    return g[users] * factors[users].view(-1, 1, 1)


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total += first^T second; on CPU by numpy, whose BLAS is the faster one in float64."""
    if total.device.type != "cpu":
        total.addmm_(first.T, second)
    else:
        into = total.numpy()  # the same memory
        into += first.numpy().T @ second.numpy()


def _rounding(places: int, inputs: int, outputs: int) -> float:
    """How far Gram sums in float64 may be off, in (sum over places of |a_p| |g_p|)^2, and more.

    Sums of n terms are off by at most n 2^-53 of the terms' sizes, whatever their order (Higham 2002, section 3).
    1e-10 covers that up to 600 places, takes no more than 1e-8 from a clip factor unless a user's places cancel to a
    tenth, and bounds what any user's rounding does to a sum: the factor is at most 1e5 C / sum |a_p| |g_p|, so
    a product of 2,000 rows is off by at most 2e-8 C a user.
    """
    return max(1e-10, 2.0**-52 * (inputs + outputs + places**2 + 8))


def squared_norms(a: Tensor, g: Tensor) -> Tensor:
    """[users]: the squared norm of each user's sum over places of g a^T from Gram matrices, and never less than it.

    Args:
        a: [users, places, inputs] float64.
        g: [users, places, outputs] float64.
    """
    return _from_grams(_gram(a), _gram(g), _rounding(a.shape[1], a.shape[2], g.shape[2]))


def _from_grams(of_a: Tensor, of_g: Tensor, rounding: float) -> Tensor:
    """As `squared_norms`. Where places cancel, what is left is rounding, or even zero: its bound is added."""
    sizes = (of_a.diagonal(dim1=1, dim2=2) * of_g.diagonal(dim1=1, dim2=2)).sqrt().sum(dim=1)
    return (of_a * of_g).sum((1, 2)).clamp(min=0) + rounding * sizes.square()


class _Gradients:
    """Each user's gradient of one weight, made: [users, inputs * outputs] float32."""

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self.turned = g.shape[2] > a.shape[2]  # the product whose result has the longer rows is faster
        first, second = (a, g) if self.turned else (g, a)
        made = first.transpose(1, 2) @ second
        self.shape = made.shape[1:]
        self.flat = made.flatten(1)

    def squared_norms(self, users: slice, gram: Callable[[Tensor], Tensor]) -> Tensor:
        """[users] float64."""
        return self.flat[users].double().square_().sum(dim=1)

    def add_to(
        self, total: Tensor, users: slice, factors: Tensor, scaled: Callable[[Tensor], Tensor]
    ) -> None:
        """Adds these users' weighted sum to [outputs, inputs] float64."""
        found = (factors @ self.flat[users].double()).view(self.shape)
        total += found.T if self.turned else found

    def forget(self, keep: Tensor) -> None:
        """Sets to zero the users that are not kept: zero times what is no number is none."""
        self.flat = torch.where(keep.unsqueeze(1), self.flat, 0.0)


@dataclass
class _Factored:
    """Each user's gradient of one weight as its two factors, float32."""

    a: Tensor
    g: Tensor

    def squared_norms(self, users: slice, gram: Callable[[Tensor], Tensor]) -> Tensor:
        """[users] float64; `gram` gives these users' matrices of a or g, from float64."""
        room = _rounding(self.a.shape[1], self.a.shape[2], self.g.shape[2])
        return _from_grams(gram(self.a), gram(self.g), room)

    def add_to(
        self, total: Tensor, users: slice, factors: Tensor, scaled: Callable[[Tensor], Tensor]
    ) -> None:
        """Adds these users' weighted sum to [outputs, inputs] float64; `scaled` gives their g times factors."""
        _add_product(total, scaled(self.g).flatten(0, 1), _double(self.a[users]).flatten(0, 1))

    def forget(self, keep: Tensor) -> None:
        """Sets to zero the users that are not kept."""
        self.a, self.g = (torch.where(keep.view(-1, 1, 1), each, 0.0) for each in (self.a, self.g))


def _is_small(a: Tensor, g: Tensor) -> bool:
    """Whether a user's gradient is made: it takes little beside a and g in float64, and then is faster, too."""
    places, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
    return inputs * outputs <= 2 * places * (inputs + outputs)


@torch.no_grad()
def _add_clipped(
    taken: dict[str, tuple[Tensor, Tensor]], biased: set[str], clip_norm: float, into: dict[str, Tensor]
) -> None:
    """Adds the clipped sums of weights and biases, from (a, g) of each layer, which are given up here.

    Args:
        into: name of weight or bias -> float64, of its shape.
    """
    users, device = next((len(g), g.device) for _, g in taken.values())
    biases = {name: taken[name][1].sum(dim=1, dtype=torch.float64) for name in biased}  # [users, outputs]
    weights = {
        name: _Gradients(a, g) if _is_small(a, g) else _Factored(a, g) for name, (a, g) in taken.items()
    }
    taken.clear()
    at_once = _AT_ONCE if device.type == "cpu" else users
    parts = [slice(first, min(first + at_once, users)) for first in range(0, users, at_once)]

    squared = torch.zeros(users, dtype=torch.float64, device=device)
    for bias in biases.values():
        squared += bias.square().sum(dim=1)
    for part in parts:
        gram = _Shared(partial(_gram_of, part))
        for weight in weights.values():
            squared[part] += weight.squared_norms(part, gram)
    norms = squared.sqrt()
    factors = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    finite = norms.isfinite()
    if not bool(finite.all()):  # such a user contributes nothing: a contribution like any other
        factors = torch.where(finite, factors, 0.0)
        biases = {name: torch.where(finite.unsqueeze(1), bias, 0.0) for name, bias in biases.items()}
        for weight in weights.values():
            weight.forget(finite)

    for part in parts:
        scaled = _Shared(partial(_scaled, part, factors))
        for name, weight in weights.items():
            weight.add_to(into[f"{name}.weight"], part, factors[part], scaled)
    for name, bias in biases.items():
        into[f"{name}.bias"].add_(factors @ bias)


def _named_parts(flat: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Views of a flat vector, of the parameters' shapes."""
    parts = flat.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}


@contextmanager
def clipped_sums(model: InterestModel, at_once: int = 0) -> Iterator[ClippedSum]:
    """Gives a function from a batch of users to the sum of their gradients, each clipped to C as a whole.

    The model is changed inside alone: its trainable Linear layers record. What else is trainable is refused.

    Args:
        at_once: users of the largest batch, see `HistoryBatch.evened`.

    Raises:
        RowsAreNotUsersError: something else than recording layers' weights and biases is trainable; or, from the
            function: the loss or a layer's rows are not users, or a parameter got none.
    """
    layers = [
        _Layer(name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.requires_grad
    ]
    biased = {layer.name for layer in layers if layer.module.bias is not None}
    parameters = model.trainable()
    coordinates = sum(parameter.numel() for parameter in parameters.values())
    recorded = {f"{layer.name}.{part}" for layer in layers for part, _ in layer.module.named_parameters()}
    if recorded != set(parameters) - {WITNESS}:
        odd = ", ".join(sorted(recorded ^ (set(parameters) - {WITNESS}))[:4])
        raise RowsAreNotUsersError(f"{odd} is trainable on one side only: no row a user")
    device = next(iter(parameters.values())).device
    tap = torch.zeros((), requires_grad=True, device=device)

    def total(batch: HistoryBatch, clip_norm: float) -> Tensor:
        users = len(batch)
        if users == 0:  # transformers cannot run on no rows; no user contributes nothing
            return torch.zeros(coordinates, dtype=torch.float64, device=device)
        for layer in layers:
            layer.calls.clear()
        batch = batch.evened(at_once)
        losses = model.per_user_loss(batch)
        if losses.shape != (len(batch),):
            raise RowsAreNotUsersError(
                f"the loss has shape {tuple(losses.shape)}, but must be one number a user"
            )
        losses.sum().backward()
        taken = {layer.name: layer.taken(len(batch), users) for layer in layers}
        found = torch.zeros(coordinates, dtype=torch.float64, device=device)
        _add_clipped(taken, biased, clip_norm, _named_parts(found, parameters))  # the witness stays zero
        return found

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
