"""Sums of users' clipped gradients on a CPU, in whole steps of the grid that noise is added on.

Each user's clipped gradient of a weight is a float32 product of that user's own, rounded to the grid (`private_sum`) by
itself. What is added up then are whole numbers: exact, in any order. Float64 sums come close to that, and take twice
the time.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.privacy.noise import GRID_BITS

_ROUNDS = np.float32(1.5 * 2**23)
"""Added to a float32 below 2^22, this leaves its nearest whole number in the sum's last bits."""
_BITS = int(_ROUNDS.view(np.int32))
_USERS = 1024
"""That may be added up in int32: each coordinate is at most C, that is 2^20 steps, and rounding."""
_AT_ONCE = 32
"""Rows whose part is made in float64 at once, for memory: at most so many, and in equal parts of a unit."""
REACH = 2.0**100
"""Largest norm of a row that float32 products are vouched for: below, no overflow, and nothing is lost to underflow."""


def product_rounding(places: int) -> float:
    """How far a user's float32 product may be off, in sums over places of |a_p| |g_p|, whatever the order of additions.

    A sum of n float32 products is off by n 2^-24 of the terms' sizes at most, and a bit (Higham 2002, section 3); two
    more roundings make the factor.
    """
    return 1.01 * 2.0**-24 * (places + 2)


def grid_step(clip_norm: float) -> float:
    """The grid's step, as `private_sum` has it."""
    return math.ldexp(clip_norm, -GRID_BITS)


class GridSums:
    """Sums of users' parts, each part rounded to the grid by itself.

    Args:
        totals: [sums, coordinates] float64, on whose numbers the sums are written.
        clip_norm: C.
    """

    def __init__(self, totals: Tensor, clip_norm: float) -> None:
        self.step = grid_step(clip_norm)
        self._totals = totals.zero_()
        self._steps = torch.zeros(totals.shape, dtype=torch.int32).numpy()
        self._counts = np.zeros(len(totals), np.int64)

    def add(self, into: int, part: npt.NDArray[np.float32]) -> None:
        """Adds one user's part.

        Args:
            into: which sum.
            part: [coordinates], in steps of the grid, of norm at most C; given up here.
        """
        part += _ROUNDS
        steps = self._steps[into]
        np.add(steps, part.view(np.int32), out=steps)  # wraps round; the whole sum fits again
        self._counts[into] += 1
        if self._counts[into] == _USERS:
            self._write(into)

    def finish(self) -> Tensor:
        """The sums.

        Raises:
            RuntimeError: a sum is beyond what parts of norm C add up to.
        """
        for into in np.flatnonzero(self._counts):
            self._write(int(into))
        return self._totals

    def _write(self, into: int) -> None:
        steps, count = self._steps[into], int(self._counts[into])
        steps += np.int32((-count * _BITS + 2**31) % 2**32 - 2**31)  # modulo 2^32
        if max(int(steps.max()), -int(steps.min())) > 1.01 * count * 2**GRID_BITS:
            raise RuntimeError(
                "a sum is larger than its users' clipped gradients can make it: it is not used"
            )
        self._totals[into].add_(torch.from_numpy(steps), alpha=self.step)
        steps.fill(0)
        self._counts[into] = 0


def sum_on_grid(total: Tensor, a: Tensor, g: Tensor, factors: Tensor, clip_norm: float) -> None:
    """Sums users' clipped gradients of one weight, each rounded to the grid: sum_u round(c_u g_u^T a_u).

    Args:
        total: [outputs, inputs] float64, on whose numbers the sum is written.
        a: [users, places, inputs] float32, rows of norm at most REACH.
        g: [users, places, outputs] float32, rows of norm at most REACH grid steps.
        factors: [users] float64, c_u: each c_u g_u^T a_u, in float32, has norm at most `clip_norm`. Zero for nothing.

    Raises:
        RuntimeError: the sum is beyond that.
    """
    places, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
    of_a, of_g = a.numpy(), g.numpy()
    sums = GridSums(total.view(1, -1), clip_norm)
    scale = (factors / sums.step).float().numpy()
    # All users' products are made at one place in memory: nothing can depend on where a row stands.
    own_a, own_g, product = own_place(places, inputs), own_place(places, outputs), own_place(outputs, inputs)
    for user, own_scale in enumerate(scale):  # of nobody, too: the work follows rows, not users
        np.copyto(own_a, of_a[user] if own_scale else 0.0)
        np.multiply(of_g[user] if own_scale else 0.0, own_scale, out=own_g)
        np.matmul(own_g.T, own_a, out=product)
        sums.add(0, product.reshape(-1))
    sums.finish()


def sum_rows_on_grid(rows: Tensor, factors: Tensor, clip_norm: float) -> Tensor:
    """Sums users' whole gradients, each scaled and rounded to the grid by itself.

    Args:
        rows: [users, coordinates] float32.
        factors: [users] float64; each factor times its row has norm at most `clip_norm`. Zero for nothing.

    Returns:
        [coordinates] float64.
    """
    if rows.device.type != "cpu":
        finite = torch.where(factors.unsqueeze(1) > 0, rows, 0.0)  # zero times a NaN is NaN
        return sum_of_rounded(finite, factors, clip_norm)
    sums = GridSums(torch.empty(1, rows.shape[1], dtype=torch.float64), clip_norm)
    own, part = own_place(rows.shape[1]), own_place(rows.shape[1])
    for row, scale in zip(rows.numpy(), (factors / sums.step).float().numpy(), strict=True):
        np.copyto(own, row if scale else 0.0)
        np.multiply(own, scale, out=part)
        sums.add(0, part)
    return sums.finish()[0]


def own_place(*shape: int) -> npt.NDArray[np.float32]:
    """Zeros that begin at a multiple of 64 bytes, as torch's memory does."""
    found: npt.NDArray[np.float32] = torch.zeros(*shape).numpy()
    return found


def equal_parts(rows: int) -> list[slice]:
    """Parts of a unit's rows that all have one size, so that what is computed of them has one shape."""
    count = next((count for count in range(max(1, -(-rows // _AT_ONCE)), rows + 1) if rows % count == 0), 1)
    size = rows // count
    return [slice(first, first + size) for first in range(0, rows, max(1, size))]


def sum_of_rounded(values: Tensor, factors: Tensor, clip_norm: float) -> Tensor:
    """Sums users' scaled values, each rounded to the noise's grid by itself: exact in any order.

    Args:
        values: [users, coordinates], finite.
        factors: [users] float64.
        clip_norm: C.

    Returns:
        [coordinates] float64.
    """
    step = grid_step(clip_norm)
    total = factors.new_zeros(values.shape[1])
    for users in equal_parts(len(factors)):
        total += (values[users].double() * (factors[users] / step).unsqueeze(1)).round_().sum(dim=0)
    return total.mul_(step)
