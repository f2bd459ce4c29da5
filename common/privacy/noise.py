"""The generators that privacy rests on, and the one place where noise meets a sum.

Here live the cryptographic Gaussian generator, the cryptographic Poisson sampler of users, and `private_sum`,
which turns a clipped sum into the Gaussian mechanism's output. None of them takes a seed: nothing that anyone
sets in a process makes them repeat. Tests pass generators of their own through the two protocols. What a sum
costs is not here (`mechanisms.py`, `accountants.py`), nor is clipping (`client/training.py`).
"""

from __future__ import annotations

import math
import os
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from common.privacy.mechanisms import SMALLEST_NOISE_MULTIPLIER

GRID_BITS = 20
"""The grid's step is the clip norm times 2^-20."""

INFLATION = 1e-3
"""The noise is drawn this much wider than the event says, to pay for rounding (see `private_sum`)."""

ROOM_FOR_FLOATS = 5e-5
"""The part of INFLATION kept for float arithmetic before the grid: clipping and summing in fp32."""

LARGEST_DIMENSION = math.floor(((INFLATION - ROOM_FOR_FLOATS) * 2**GRID_BITS) ** 2)
"""The longest vector whose rounding INFLATION covers: 992,309 coordinates."""

_PAIRS_AT_ONCE = 1 << 15
_LARGEST_RATIO = 2.0**31
_BLOCK = 1 << 16


class GaussianNoise(Protocol):
    """A source of independent standard normals."""

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        """`size` standard normals, float64 [size]."""
        ...


class UserSampler(Protocol):
    """A source of Poisson samples of users."""

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        """Which of `users` users take part, each independently with probability `rate`: bool [users]."""
        ...


class _NeverCopied:
    """A generator that refuses every way of being copied or stored."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is never pickled or copied: make a new one where it is needed"
        )

    def __copy__(self) -> NoReturn:
        self.__reduce_ex__(None)

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce_ex__(None)


class SecureGaussian(_NeverCopied):
    """Standard normals from AES-256 in counter mode, through Box-Muller in float64.

    Every call runs under a key of its own from the operating system and forgets it, so there is no state that
    a fork, a thread or a restored snapshot could repeat. The radius uses 64-bit uniforms, exact where they
    are small, so normals reach 9.4 (a tail of 2^-64 is missing); the angle uses 53-bit uniforms.
    """

    __slots__ = ()

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        """`size` standard normals, float64 [size].

        Raises:
            ValueError: `size` is negative.
        """
        if size < 0:
            raise ValueError(f"size is {size}, but must be at least 0")
        keystream = Cipher(AES(os.urandom(32)), CTR(bytes(16))).encryptor()
        normals = np.empty(size, dtype=np.float64)
        for start in range(0, size, 2 * _PAIRS_AT_ONCE):
            block = normals[start : start + 2 * _PAIRS_AT_ONCE]
            pairs = (len(block) + 1) // 2
            words = np.frombuffer(keystream.update(bytes(16 * pairs)), dtype="<u8")
            _box_muller(words[:pairs], words[pairs:], torch.from_numpy(block))
        return normals


def _box_muller(
    radius_words: npt.NDArray[np.uint64], angle_words: npt.NDArray[np.uint64], out: torch.Tensor
) -> None:
    """Two normals from each pair of 64-bit words (Box and Muller 1958).

    torch's functions, which take four numbers at a time where numpy's take one.

    Args:
        radius_words, angle_words: [pairs].
        out: [2 * pairs] float64, or one less.
    """
    pairs = len(radius_words)
    radius = torch.from_numpy(radius_words.astype(np.float64))
    radius.add_(1.0).mul_(2.0**-64).log_().mul_(-2.0).sqrt_()  # of uniforms in (0, 1]
    angle = torch.from_numpy((angle_words >> np.uint64(11)).astype(np.float64)).mul_(2.0 * math.pi * 2.0**-53)
    torch.cos(angle, out=out[:pairs]).mul_(radius)
    second = out[pairs:]
    torch.sin(angle[: len(second)], out=second).mul_(radius[: len(second)])


class SecurePoissonSampler(_NeverCopied):
    """Poisson sampling of users from the operating system's generator, 64 bits a user."""

    __slots__ = ()

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        """Which of `users` users take part: bool [users], each true with probability floor(rate 2^64) / 2^64.

        So the probability never exceeds the rate that the event charges, and a rate of 1 takes every user.

        Raises:
            ValueError: `users` is negative, or `rate` lies outside (0, 1].
        """
        if users < 0:
            raise ValueError(f"users is {users}, but must be at least 0")
        if not 0 < rate <= 1:
            raise ValueError(f"rate is {rate}, but must lie in (0, 1]: choose a public constant")
        threshold = int(math.ldexp(rate, 64))
        if threshold == 1 << 64:
            return np.ones(users, dtype=np.bool_)
        draws = np.frombuffer(os.urandom(8 * users), dtype="<u8")
        taken: npt.NDArray[np.bool_] = draws < np.uint64(threshold)
        return taken


def private_sum(
    clipped_sum: torch.Tensor, *, clip_norm: float, noise_multiplier: float, noise: GaussianNoise
) -> torch.Tensor:
    """The Gaussian mechanism: the sum of clipped contributions, with noise, on a fixed grid.

    The sum is rounded to multiples of g = 2^-20 C in float64; Gaussian noise of standard deviation
    (1 + INFLATION) sigma C is drawn in float64 and rounded to the same grid; both are whole numbers of g
    below 2^52, so their sum is exact. The result is then cast to float32, which is post-processing.

    Why this is the mechanism of the event (sigma): as x is a multiple of g, x + round(z) = round(x + z), so
    rounding the noise is post-processing of the Gaussian mechanism on the rounded sum. Rounding moves a
    coordinate by at most g / 2; two neighbouring sums at most C apart are, rounded, at most C + g sqrt(d)
    apart. So the noise multiplier in effect is at least

        sigma (1 + INFLATION) / (1 + 2^-20 sqrt(d) + r),

    where r is what clipping and summing in floating point add to C, relatively. It is at least sigma when
    2^-20 sqrt(d) <= INFLATION - ROOM_FOR_FLOATS (hence LARGEST_DIMENSION) and r <= ROOM_FOR_FLOATS, which is
    the caller's part: add up in float64, and r is a clip's rounding of about 1e-6. (Adding n users in fp32
    costs up to 2^-23 n^2 in the worst case.) Or round each user's part to this grid before it is added
    (`client/grid_sums.py`): the sum is then exact, rounding it here changes nothing, and neighbours are at most
    C + g sqrt(d) / 2 apart. What remains is the accuracy of Box-Muller itself in float64.

    Args:
        clipped_sum: the sum over the sampled users, fp32 or fp64, [d], on CPU or CUDA. An empty batch is
            zeros.
        clip_norm: C > 0, the largest norm of one user's contribution.
        noise_multiplier: sigma, as the event says.
        noise: where the standard normals come from.

    Returns:
        float32 [d] on the device of `clipped_sum`.

    Raises:
        TypeError: the sum is neither fp32 nor fp64 (bf16 and fp16 lose the noise).
        ValueError: a shape, a size or a number out of its bounds, a sum or noise that is not finite.
    """
    _check_sum(clipped_sum)
    if not 1e-12 <= clip_norm <= 1e12:
        raise ValueError(f"clip_norm is {clip_norm}, but must lie in [1e-12, 1e12]: choose a positive norm")
    if not SMALLEST_NOISE_MULTIPLIER <= noise_multiplier <= 1e6:
        raise ValueError(
            f"noise_multiplier is {noise_multiplier}, but must lie in [{SMALLEST_NOISE_MULTIPLIER:g}, 1e6]: "
            "choose a smaller epsilon or more steps for more noise"
        )
    dimension = clipped_sum.numel()
    normals = noise.normal(dimension)
    if normals.shape != (dimension,) or normals.dtype != np.float64 or not np.isfinite(normals).all():
        raise ValueError(
            f"the generator did not give {dimension} finite float64 normals: nothing is released"
        )

    grid = math.ldexp(clip_norm, -GRID_BITS)
    scale = noise_multiplier * (1 + INFLATION) * 2.0**GRID_BITS
    released = torch.empty(dimension, dtype=torch.float32, device=clipped_sum.device)
    at_once = _BLOCK if clipped_sum.device.type == "cpu" else dimension  # a block stays in the cores' cache
    for start in range(0, dimension, at_once):
        block = slice(start, start + at_once)
        noise_steps = torch.from_numpy(normals[block] * scale).round_()  # whole multiples of the grid
        sum_steps = (clipped_sum[block].detach().to(torch.float64) / grid).round_()
        least, most = torch.aminmax(sum_steps)
        if not bool(
            torch.maximum(-least, most) <= _LARGEST_RATIO * 2.0**GRID_BITS
        ):  # also where one is no number
            raise ValueError(
                "the sum is not finite, or is far beyond what clipped users add up to: nothing is released"
            )
        released[block] = sum_steps.add_(noise_steps.to(clipped_sum.device)).mul_(grid)
    return released


def _check_sum(clipped_sum: torch.Tensor) -> None:
    if clipped_sum.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"the sum is {clipped_sum.dtype}, but noise is added to float32 or float64 alone: cast it"
        )
    if clipped_sum.ndim != 1 or clipped_sum.numel() == 0:
        raise ValueError(f"the sum has shape {tuple(clipped_sum.shape)}, but must be flat and not empty")
    if clipped_sum.numel() > LARGEST_DIMENSION:
        raise ValueError(
            f"the sum has {clipped_sum.numel()} coordinates, but rounding is covered up to "
            f"{LARGEST_DIMENSION}: train fewer parameters (a smaller rank, fewer layers)"
        )
