"""Time as a feature: how long since the event before, and since the first; a function of one's own row."""

from __future__ import annotations

import torch
from torch import Tensor

TIME_FEATURES = 3
"""Width of `time_features`."""

_MONTH = 30 * 86_400.0


def time_features(times: Tensor, mask: Tensor) -> Tensor:
    """Gaps and ages of events on a logarithmic scale on which a month is 1.

    Args:
        times: [users, events] int64 seconds, oldest first.
        mask: [users, events] bool, where there is an event.

    Returns:
        [users, events, 3] float32: log gap since the event before, log age since the first event read, and 1
        where the gap is zero (events of one instant, or without times); zeros where there is no event.
    """
    events = times.shape[1]
    if events == 0:
        return torch.zeros(*times.shape, TIME_FEATURES, device=times.device)
    before = torch.cat([times[:, :1], times[:, :-1]], dim=1)
    gap = (times - before).clamp(min=0).float()
    age = (times - times[:, :1]).clamp(min=0).float()
    scale = torch.log1p(torch.tensor(_MONTH, device=times.device))
    features = torch.stack([torch.log1p(gap) / scale, torch.log1p(age) / scale, (gap == 0).float()], dim=-1)
    return features * mask.unsqueeze(-1)
