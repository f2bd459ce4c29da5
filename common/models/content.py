"""The content-based part of a user's state: recency kernels over frozen, public item vectors.

Nothing here is trained. A model whose residual is zero is this recommender.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.models.batches import over_time

RECENCY_KERNELS: tuple[tuple[float, float], ...] = ((2.0, 0.0), (4.0, 0.7), (2.0, 0.93))
"""(weight, decay per event): the last event, a short memory and a long one."""


def content_states(vectors: Tensor, items: Tensor) -> Tensor:
    """What a user has been reading of late, after each event.

    Args:
        vectors: [items, width] unit item vectors.
        items: [users, events] int64, -1 where there is no event.

    Returns:
        [users, events, width]: sum over kernels of weight * unit(sum of decay^age * vector).
    """
    events = items.shape[1]
    present = (items >= 0).unsqueeze(-1).to(vectors.dtype)
    x = vectors[items.clamp(min=0)] * present  # [users, events, width]
    age = torch.arange(events, device=items.device)
    age = age.unsqueeze(1) - age.unsqueeze(0)  # [events (now), events (then)]
    states = torch.zeros_like(x)
    for weight, decay in RECENCY_KERNELS:
        kernel = torch.where(
            age >= 0, torch.tensor(decay, dtype=x.dtype, device=x.device) ** age.clamp(min=0), 0.0
        )
        states = states + weight * normalize(over_time(kernel.to(x.dtype), x), dim=-1)
    return states
