"""Standard normal numbers that are a function of one user's own row and of public tensors alone.

A variational family needs noise while it is trained. Were it drawn for the batch, a user's loss would depend on the
user's place in it. This noise is no part of any privacy mechanism: that draws its own, from a cryptographic generator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (
    -4658895280553007687,
    -7723592293110705685,
)  # SplitMix64's, as signed numbers (Steele et al. 2014)
_STEP = -7046029254386353131


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which wraps round."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_noise(items: Tensor, width: int, nonce: int) -> Tensor:
    """Noise for each event of each user.

    Args:
        items: [users, events] int64: the row that decides the noise, along with place and nonce.
        width: numbers for each event.
        nonce: public; another nonce gives other noise.

    Returns:
        [users, events, width] float32, Box-Muller.
    """
    events = items.shape[1]
    place = torch.arange(events * width, device=items.device).view(1, events, width)
    # Each event's seed holds the events before it, so equal items at different times get different noise.
    start = _mixed(torch.tensor(nonce % 2**62, device=items.device) * _STEP)
    history = _mixed(items + 1 + start).cumsum(dim=1)
    seed = _mixed(history).unsqueeze(-1) + place * _STEP  # [users, events, width]
    first, second = _mixed(seed), _mixed(seed ^ 0x5DEECE66D)
    uniforms = [((bits >> 11) & ((1 << 53) - 1)).double().add(0.5) / 2**53 for bits in (first, second)]
    radius = torch.sqrt(-2 * torch.log(uniforms[0]))
    return (radius * torch.cos(2 * math.pi * uniforms[1])).float()
