"""How the numbers of an update travel: as float32, or rounded at random to bfloat16 or int8.

Rounding costs no privacy. What is rounded is the update, a function of the Gaussian sums that were released to make
it; the rounding draws from the operating system's generator, and looks at that update alone. So it is post-processing
of the mechanism's output: whatever holds for the update holds for what is made of it, a scale computed from its
largest value included, and would hold if the whole world knew the draws. The one thing that must not change is the
order: before the noise, a scale would be computed from users' data, and a user could move the sum by more than C.

It is unbiased: the mean over the draws of what `decoded` gives is the update (int8: to 2^-32 of a step of its grid,
and to float32's own rounding), so errors of sites and rounds cancel as noise does. They are small beside the noise:

- bfloat16: a value moves by less than 2^-7 of itself, which adds 6e-6 of its variance to noise;
- int8: a block of BLOCK values has one scale, its largest value / 127, and a value moves by less than a scale, which
  adds 1e-4 of its variance to noise.

The witness travels as float32 always, so that the noise that an auditor measures is the noise alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.config import Precision
from common.witness import is_witness

SCALES = "/scales"
"""Name of the scales of an update in int8, float32 [blocks]; no parameter's name holds a slash."""

BLOCK = 256
"""Values that share a scale, in the order of names, then of places; the last block of an update may be shorter."""

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""What all of an update but its witness and scales is made of, by precision."""

_LEVELS = 127

Random = Callable[[int], bytes]
"""Gives so many random bytes. The operating system's, but for tests."""


class EncodingError(ValueError):
    """An update cannot be encoded, or does not have the form that this module writes; `reason` names the fault."""

    def __init__(self, reason: str, explanation: str) -> None:
        super().__init__(explanation)
        self.reason = reason


def encoded(
    update: Mapping[str, Tensor], precision: Precision, random: Random = os.urandom
) -> dict[str, Tensor]:
    """A finished update as it travels.

    Args:
        update: float32; the noise is in it.
        random: the draws of the rounding.

    Raises:
        EncodingError: a value is not finite, or too large for the precision.
    """
    names = _rounded(update)
    if precision == "float32" or not names:
        return dict(update)
    check_finite(update)
    flat = torch.cat([update[name].detach().cpu().float().flatten() for name in names])
    sent = {name: value for name, value in update.items() if is_witness(name)}
    if precision == "bfloat16":
        rounded = _to_bfloat16(flat, random)
    else:
        rounded, sent[SCALES] = _to_int8(flat, random)
    parts = rounded.split([update[name].numel() for name in names])
    return sent | {name: part.view(update[name].shape) for name, part in zip(names, parts, strict=True)}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises `EncodingError` where a value is infinite or none: such tensors are neither sent nor read."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise EncodingError("not_finite", "there are values that are not finite")


def decoded(sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The update, float32, of what `encoded` gave: the tensors themselves say how.

    Raises:
        EncodingError: scales are missing, or there are not as many as blocks.
    """
    values = {name: value.float() for name, value in sent.items() if name != SCALES}
    names = [name for name in sorted(sent) if sent[name].dtype == torch.int8]
    if names or SCALES in sent:
        count = sum(sent[name].numel() for name in names)
        if SCALES not in sent or sent[SCALES].shape != (blocks(count),):
            raise EncodingError(
                "wrong_shape", "an update in int8 has another number of scales than of blocks"
            )
        flat = torch.cat([sent[name].flatten() for name in names]) if names else torch.zeros(0)
        by_place = sent[SCALES].double().repeat_interleave(BLOCK)[:count]
        parts = (flat.double() * by_place).float().split([sent[name].numel() for name in names])
        values |= {name: part.view(sent[name].shape) for name, part in zip(names, parts, strict=True)}
    return values


def broadcast(state: Mapping[str, Tensor], parameters: Precision) -> dict[str, Tensor]:
    """The parameters that sites are sent, float32: to the nearest that bfloat16 holds, where the plan says so.

    Not at random: an auditor makes the same of a checkpoint. What the server keeps and adds to is not rounded.
    """
    if parameters == "float32":
        return dict(state)
    return {name: value.to(DTYPES[parameters]).float() for name, value in state.items()}


def blocks(count: int) -> int:
    """How many blocks so many values are."""
    return math.ceil(count / BLOCK)


def check_form(
    sent: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], precision: Precision
) -> None:
    """Whether an update came as the plan says; nothing is decoded, and nothing larger is made of it.

    Args:
        sent: as it travelled.
        shapes: name -> shape of every tensor of the update.

    Raises:
        EncodingError: its reason is wrong_tensors, wrong_shape, wrong_precision or bad_scales.
    """
    wanted = {name: (shape, torch.float32) for name, shape in shapes.items()}
    rounded = _rounded(shapes)
    wanted |= {name: (shapes[name], DTYPES[precision]) for name in rounded}
    if precision == "int8" and rounded:
        count = sum(math.prod(shapes[name]) for name in rounded)
        wanted[SCALES] = ((blocks(count),), torch.float32)
    if set(sent) != set(wanted):
        raise EncodingError("wrong_tensors", "the update has other tensors than the model")
    if any(tuple(sent[name].shape) != shape for name, (shape, _) in wanted.items()):
        raise EncodingError("wrong_shape", "a tensor of the update has another shape than the model's")
    if any(sent[name].dtype != dtype for name, (_, dtype) in wanted.items()):
        raise EncodingError("wrong_precision", "a tensor of the update has another precision than the plan's")
    if SCALES in wanted and not bool((sent[SCALES].isfinite() & (sent[SCALES] >= 0)).all()):
        raise EncodingError("bad_scales", "a scale of the update is negative or not finite")


def _rounded(names: Mapping[str, object]) -> list[str]:
    """The tensors that are rounded, in the order of their blocks."""
    return [name for name in sorted(names) if not is_witness(name)]


def _to_bfloat16(flat: Tensor, random: Random) -> Tensor:
    """Up or down to bfloat16, up with the chance that makes the mean right: the low half of float32 carries, or not.

    bfloat16 is the upper half of float32. With 16 random bits added to the lower half, the chance of a carry is what
    the lower half says, in units of the upper half's last place; a float's sign stands apart, so both ways are alike.
    """
    draws = np.frombuffer(random(2 * flat.numel()), dtype="<u2").astype(np.int32)
    bits = flat.view(torch.int32) + torch.from_numpy(draws)
    rounded = (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
    if not bool(rounded.isfinite().all()):
        raise EncodingError("not_finite", "a value of the update is too large for bfloat16")
    return rounded


def _to_int8(flat: Tensor, random: Random) -> tuple[Tensor, Tensor]:
    """Whole multiples of each block's scale, in -127 to 127, and the scales."""
    count = flat.numel()
    padded = torch.zeros(blocks(count) * BLOCK, dtype=torch.float64)
    padded[:count] = flat
    rows = padded.view(-1, BLOCK)
    largest = rows.abs().amax(dim=1)
    scales = (largest / _LEVELS).float()
    # Never rounded down: the largest value must not leave the grid.
    short = scales.double() * _LEVELS < largest
    scales = torch.where(short, torch.nextafter(scales, torch.full_like(scales, math.inf)), scales)
    steps = rows / scales.double().clamp(min=2.0**-149).unsqueeze(1)
    draws = np.frombuffer(random(4 * padded.numel()), dtype="<u4") * 2.0**-32  # [0, 1)
    whole = torch.floor(steps + torch.from_numpy(draws).view_as(rows))
    return whole.flatten()[:count].to(torch.int8), scales
