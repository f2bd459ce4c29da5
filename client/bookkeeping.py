"""The clipped sum of per-user gradients from one backward pass, without a gradient for each user in memory.

Opacus' hooks make [users, *shape] of each weight. Here each trainable Linear layer keeps what went in, a, and what
came back, g: user u's gradient is the sum over places p of g_up a_up^T, and all that is asked of it is

    norm^2 = sum over p, q of (a_up . a_uq) (g_up . g_uq)     from Gram matrices, where the gradient itself is large,
    sum over users of c_u gradient_u = (c g)^T a              one product for each weight; c: the clip factors.

Li et al. 2022 (arXiv:2110.05679) for the norms, Bu et al. 2023 (arXiv:2210.00038) for both in one pass; autograd's own
gradients of weights are never computed. Where a gradient is small beside a and g, a CPU makes it after all, user by
user in float32, as Opacus does, and the rest is the same.

What one user adds to the sum is that user's clipped gradient, the same to the bit whoever else is there. So norms are
never underrated (see `_rounding`), and every user's part is rounded to the noise's grid by itself, so that sums are
exact in any order (`grid_sums.py`). And a and g, which are float32, must not depend on how many others there are, nor
on the place among them: libraries take other kernels for other shapes, and parameters far off (which a server may send)
make that rounding as large as it gets: a ninth user was seen to move a sum by 5 C. So every pass is over a unit of rows
of one shape (`HistoryBatch.unit`), and the model shows at each request's parameters that all rows of a unit compute
alike (`self_test.py`). Opacus' rows are what all of this is held against, there and in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.grid_sums import (
    REACH,
    equal_parts,
    grid_step,
    own_place,
    product_rounding,
    sum_of_rounded,
    sum_on_grid,
)
from common.models.batches import HistoryBatch
from common.models.heads import is_unread, moving_part
from common.models.interface import InterestModel
from common.models.own_weights import gradient_through, linear_of_sites
from common.witness import WITNESS

ClippedSum = Callable[[HistoryBatch, float], Tensor]
"""(batch, C) -> [coordinates] float64, the trainable parameters flattened one after the other."""
Seen = Callable[[Mapping[str, Tensor]], None]
"""Told what was computed for each row of a unit, by name: [rows, ...], float32 or float64."""


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
        read: bool,
    ) -> Tensor:
        # moving: the first columns of x, or all: the part that a gradient goes through
        # read: whether anybody looks at the output; else it is zeros
        ctx.save_for_backward(x, weight)
        ctx.columns, ctx.calls = moving.shape[-1], calls
        return (
            linear_of_sites(x, weight, bias)
            if read
            else x.new_zeros(1).expand(*x.shape[:-1], weight.shape[-2])
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, Tensor | None, None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.calls.append((x, grads[0]))
        through = gradient_through(grads[0], weight, ctx.columns) if ctx.needs_input_grad[1] else None
        return None, through, None, None, None, None, None


def recorded(
    x: Tensor, weight: Tensor, bias: Tensor | None, tap: Tensor, calls: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """A Linear layer's output for x, by `Recorded`, as x says that it is needed."""
    found: Tensor = Recorded.apply(  # type: ignore[no-untyped-call]
        x.detach(), moving_part(x), weight, bias, tap, calls, not is_unread(x)
    )
    return found


@dataclass
class _Layer:
    """A trainable Linear layer, and its calls of the present pass."""

    name: str
    module: nn.Linear
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def forward(self, tap: Tensor) -> Callable[[Tensor], Tensor]:
        weight = self.module.weight.detach()
        bias = None if self.module.bias is None else self.module.bias.detach()
        return lambda x: recorded(x, weight, bias, tap, self.calls)

    def taken(self, rows: int) -> tuple[Tensor, Tensor]:
        """a [rows, places, inputs] and g [rows, places, outputs] over all calls; they are forgotten here.

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
        joined = [tuple(each.reshape(rows, -1, each.shape[-1]) for each in call) for call in self.calls]
        self.calls.clear()
        a, g = zip(*joined, strict=True)
        return (a[0], g[0]) if len(a) == 1 else (torch.cat(a, dim=1), torch.cat(g, dim=1))


class _Shared:
    """What is made of a tensor, made once: a recurrence's two maps get the same g."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._made: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, *how: Hashable) -> Tensor:
        key = (x.data_ptr(), x.shape, x.stride(), *how)
        if key not in self._made:
            self._made[key] = (x, self._make(x, *how))  # x is kept, or its memory could be another's
        return self._made[key][1]


def _double(x: Tensor) -> Tensor:
    return x.to(torch.float64, memory_format=torch.contiguous_format)


def _over_places(g: Tensor) -> Tensor:
    """[users, outputs] float64: each user's sum."""
    return torch.cat([_double(g[users]).sum(dim=1) for users in equal_parts(len(g))])


def _gram(x: Tensor, single: bool = False) -> Tensor:
    """x x^T for each user, [users, places, places] float64.

    Args:
        single: whether it is made in float32, on a CPU; see `_single_rounding`.
    """
    if x.device.type != "cpu":
        on_device = _double(x)
        return on_device @ on_device.mT
    users, places, width = x.shape
    found = np.empty((users, places, places), np.float32 if single else np.float64)
    # At one place in memory for all users; twice, as numpy makes half of an array's product with itself and mirrors it,
    # which is slower.
    row, again = np.empty((2, places, width), found.dtype)
    with np.errstate(all="ignore"):  # or a warning would tell of a user whose numbers are none
        for user, own in enumerate(x.numpy()):
            np.copyto(row, own)
            np.copyto(again, row)
            np.matmul(row, again.T, out=found[user])
    return torch.from_numpy(found).double()


def _gram_of(users: slice, x: Tensor, single: bool = False) -> Tensor:
    """These users' Gram matrices."""
    return _gram(x[users], single)


def _rounding(places: int, inputs: int, outputs: int) -> float:
    """How far Gram sums in float64 may be off, in (sum over places of |a_p| |g_p|)^2, and more.

    Sums of n terms are off by at most n 2^-53 of the terms' sizes, whatever their order (Higham 2002, section 3).
    1e-10 covers that up to 600 places, takes no more than 1e-8 from a clip factor unless a user's places cancel to a
    tenth, and bounds what any user's rounding does to a sum: the factor is at most 1e5 C / sum |a_p| |g_p|, so
    a product of 2,000 rows is off by at most 2e-8 C a user.
    """
    return max(1e-10, 2.0**-52 * (inputs + outputs + places**2 + 8))


_SINGLE = 2**16
"""Places times inputs and outputs up to which Gram matrices are made in float32."""
_FLOOR = 2.0**-100
"""Of a row's squared norm in float32, in which the squares of small numbers are zero."""


def _single_rounding(inputs: int, outputs: int) -> float:
    """As `_rounding`, for Gram matrices in float32: n 2^-24 of the terms' sizes for a sum of n.

    Of a user whose places do not cancel, it takes 2^-25 (inputs + outputs) places from the clip factor at most: 2^-9
    where float32 is taken (`_SINGLE`), and a thousandth at a language model's full width with 32 events.
    """
    return 1.01 * 2.0**-24 * (inputs + outputs + 8)


def _sizes(of_a: Tensor, of_g: Tensor, floor: float = 0.0) -> Tensor:
    """[users]: the sum over places of |a_p| |g_p|, from Gram matrices; no row is shorter than the floor's root."""
    return ((_of_rows(of_a) + floor) * (_of_rows(of_g) + floor)).sqrt().sum(dim=1)


def _of_rows(gram: Tensor) -> Tensor:
    """[users, places]: the rows' squared norms."""
    return gram.diagonal(dim1=1, dim2=2)


def _from_grams(of_a: Tensor, of_g: Tensor, sizes: Tensor, rounding: float) -> Tensor:
    """[users]: the squared norm of each user's sum over places of g a^T, and never less than it.

    Where places cancel, what is left is rounding, or even zero: its bound is added.
    """
    return (of_a * of_g).sum((1, 2)).clamp(min=0) + rounding * sizes.square()


class _Gradients:
    """Each user's gradient of one weight, made on a CPU: [users, inputs * outputs] float32."""

    def __init__(self, a: Tensor, g: Tensor, clip_norm: float) -> None:
        self.clip_norm = clip_norm
        self.turned = g.shape[2] > a.shape[2]  # the product whose result has the longer rows is faster
        first, second = (a, g) if self.turned else (g, a)
        places, rows, columns = *first.shape[1:], second.shape[2]
        made = torch.empty(len(a), rows, columns)
        # At one place in memory for all users: a product of all at once may take another kernel when there are more.
        own_first, own_second = own_place(places, rows), own_place(places, columns)
        product = own_place(rows, columns)
        with np.errstate(all="ignore"):  # or a warning would tell of a user whose numbers are none
            for own, x, y in zip(made.numpy(), first.numpy(), second.numpy(), strict=True):
                np.copyto(own_first, x)
                np.copyto(own_second, y)
                np.matmul(own_first.T, own_second, out=product)
                np.copyto(own, product)
        self.shape = (rows, columns)
        self.flat = made.flatten(1)

    def squared_norms(self, users: slice, gram: Callable[..., Tensor]) -> Tensor:
        """[users] float64."""
        return self.flat[users].double().square_().sum(dim=1)

    def sum_into(self, total: Tensor, factors: Tensor) -> None:
        """Writes the users' weighted sum to [outputs, inputs] float64."""
        found = sum_of_rounded(self.flat, factors, self.clip_norm).view(self.shape)
        total.copy_(found.T if self.turned else found)

    def forget(self, keep: Tensor) -> None:
        """Sets to zero the users that are not kept: zero times what is no number is none."""
        self.flat = torch.where(keep.unsqueeze(1), self.flat, 0.0)


@dataclass
class _Factored:
    """Each user's gradient of one weight as its two factors, float32; as a device holds it."""

    a: Tensor
    g: Tensor
    clip_norm: float

    def squared_norms(self, users: slice, gram: Callable[..., Tensor]) -> Tensor:
        """[users] float64; `gram` gives these users' matrices of a or g."""
        of_a, of_g = gram(self.a), gram(self.g)
        room = _rounding(self.a.shape[1], self.a.shape[2], self.g.shape[2])
        return _from_grams(of_a, of_g, _sizes(of_a, of_g), room)

    def sum_into(self, total: Tensor, factors: Tensor) -> None:
        """Writes the users' weighted sum to [outputs, inputs] float64, from a float64 product of each user's own."""
        step = grid_step(self.clip_norm)
        total.zero_()
        for users in equal_parts(len(factors)):
            scaled = _double(self.g[users]) * (factors[users] / step).view(-1, 1, 1)
            total += torch.bmm(scaled.mT, _double(self.a[users])).round_().sum(dim=0)
        total.mul_(step)

    def forget(self, keep: Tensor) -> None:
        """Sets to zero the users that are not kept."""
        self.a, self.g = (torch.where(keep.view(-1, 1, 1), each, 0.0) for each in (self.a, self.g))


@dataclass
class _OnGrid(_Factored):
    """The same on a CPU: every user's part is a float32 product of its own, on the noise's grid."""

    def squared_norms(self, users: slice, gram: Callable[..., Tensor]) -> Tensor:
        """[users] float64, and never less than the squared norm of what `sum_into` sums, but for the grid."""
        if self.a.shape[1] * (self.a.shape[2] + self.g.shape[2]) > _SINGLE:
            return self._squared_norms(users, gram, False)
        found = self._squared_norms(users, gram, True)
        if bool(found.isfinite().all()):
            return found
        # Squares of large numbers are none in float32. For each user alone: others keep what they have.
        return torch.where(found.isfinite(), found, self._squared_norms(users, gram, False))

    def _squared_norms(self, users: slice, gram: Callable[..., Tensor], single: bool) -> Tensor:
        places, inputs, outputs = self.a.shape[1], self.a.shape[2], self.g.shape[2]
        room = _single_rounding(inputs, outputs) if single else _rounding(places, inputs, outputs)
        of_a, of_g = gram(self.a, single), gram(self.g, single)
        sizes = _sizes(of_a, of_g, _FLOOR if single else 0.0)
        norms = _from_grams(of_a, of_g, sizes, room).sqrt() + product_rounding(places) * sizes
        far = (_of_rows(of_a) > REACH**2) | (_of_rows(of_g) > (REACH * grid_step(self.clip_norm)) ** 2)
        return torch.where(far.any(dim=1), torch.inf, norms.square())

    def sum_into(self, total: Tensor, factors: Tensor) -> None:
        """Writes the users' weighted sum to [outputs, inputs] float64."""
        sum_on_grid(total, self.a, self.g, factors, self.clip_norm)

    def forget(self, keep: Tensor) -> None:
        """Nothing: who has the factor zero adds zeros."""


def _is_small(a: Tensor, g: Tensor) -> bool:
    """Whether a user's gradient is made: it takes little beside a and g in float64, and then is faster, too."""
    places, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
    return inputs * outputs <= 2 * places * (inputs + outputs)


@torch.no_grad()
def _sum_clipped(
    taken: dict[str, tuple[Tensor, Tensor]],
    biased: set[str],
    clip_norm: float,
    into: dict[str, Tensor],
    users: int,
    seen: Seen,
) -> None:
    """Writes the clipped sums of weights and biases, from (a, g) of each layer, which are given up here.

    Args:
        into: name of weight or bias -> float64, of its shape.
        users: the rows after so many add nothing.
    """
    rows, device = next((len(g), g.device) for _, g in taken.values())
    biases = {name: _over_places(taken[name][1]) for name in biased}
    weights = {name: _held(a, g, clip_norm) for name, (a, g) in taken.items()}
    taken.clear()

    squared = torch.zeros(rows, dtype=torch.float64, device=device)
    for bias in biases.values():
        squared += bias.square().sum(dim=1)
    for part in equal_parts(rows):
        gram = _Shared(partial(_gram_of, part))
        for weight in weights.values():
            squared[part] += weight.squared_norms(part, gram)
    norms = squared.sqrt()
    factors = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    seen({"factors": factors, **{f"{name}.bias": bias for name, bias in biases.items()}})
    factors[users:] = 0.0
    finite = norms.isfinite()
    if not bool(finite.all()):  # such a user contributes nothing: a contribution like any other
        factors = torch.where(finite, factors, 0.0)
        biases = {name: torch.where(finite.unsqueeze(1), bias, 0.0) for name, bias in biases.items()}
        for weight in weights.values():
            weight.forget(finite)

    for name, weight in weights.items():
        weight.sum_into(into[f"{name}.weight"], factors)
    for name, bias in biases.items():
        into[f"{name}.bias"].copy_(sum_of_rounded(bias, factors, clip_norm))


def _held(a: Tensor, g: Tensor, clip_norm: float) -> _Gradients | _Factored:
    """Each user's gradient of one weight, as it is cheapest; on a device, all is float64."""
    if a.device.type != "cpu":
        return _Factored(a, g, clip_norm)
    return (_Gradients if _is_small(a, g) else _OnGrid)(a, g, clip_norm)


def _named_parts(flat: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Views of a flat vector, of the parameters' shapes."""
    parts = flat.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def nobody_sees(_: Mapping[str, Tensor]) -> None:
    """Looks at nothing."""


@contextmanager
def clipped_sums(
    model: InterestModel, rows: int | None = None, seen: Seen = nobody_sees
) -> Iterator[ClippedSum]:
    """Gives a function from a batch of users to the sum of their gradients, each clipped to C as a whole.

    The model is changed inside alone: its trainable Linear layers record. What else is trainable is refused.

    Args:
        rows: of a unit (`HistoryBatch.unit`), the same in every pass; None: as many as a batch has users.
        seen: told what was computed for each row: losses, (a, g) of each layer, biases' gradients and clip factors.

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
        if users == 0 and not rows:  # transformers cannot run on no rows; no user contributes nothing
            return torch.zeros(coordinates, dtype=torch.float64, device=device)
        for layer in layers:
            layer.calls.clear()
        unit = batch.unit(rows or users)
        losses = model.per_user_loss(unit)
        if losses.shape != (len(unit),):
            raise RowsAreNotUsersError(
                f"the loss has shape {tuple(losses.shape)}, but must be one number a user"
            )
        losses.sum().backward()
        taken = {layer.name: layer.taken(len(unit)) for layer in layers}
        parts = {
            f"{name}.{side}": part
            for name, own in taken.items()
            for side, part in zip("ag", own, strict=True)
        }
        seen({"losses": losses.detach(), **parts})
        del parts
        found = torch.empty(coordinates, dtype=torch.float64, device=device)
        into = _named_parts(found, parameters)
        if WITNESS in into:
            into.pop(WITNESS).zero_()  # no user reaches it
        _sum_clipped(taken, biased, clip_norm, into, users, seen)
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
