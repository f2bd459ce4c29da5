"""A batch of users' histories as tensors: one row a user, in every tensor, always."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class HistoryBatch:
    """Histories of some users, oldest event first, padded on the right.

    Attributes:
        items: [users, events] int64, rows of the catalog, -1 where there is no event.
        times: [users, events] int64, seconds since the epoch, 0 where there is no event.
        token_states: [users, tokens, width] float32, states of the encoder's frozen lower layers, or None.
        token_events: [users, tokens] int64, the event that each token belongs to, -1 for padding, or None.
    """

    items: Tensor
    times: Tensor
    token_states: Tensor | None = None
    token_events: Tensor | None = None

    @classmethod
    def of(cls, items: np.ndarray, times: np.ndarray, device: torch.device | str = "cpu") -> HistoryBatch:
        """Both [users, events]; see the attributes."""
        return cls(
            items=torch.as_tensor(np.ascontiguousarray(items), dtype=torch.int64).to(device),
            times=torch.as_tensor(np.ascontiguousarray(times), dtype=torch.int64).to(device),
        )

    def __len__(self) -> int:
        return int(self.items.shape[0])

    @property
    def mask(self) -> Tensor:
        """[users, events] bool: where there is an event."""
        return self.items >= 0

    @property
    def lengths(self) -> Tensor:
        """[users] int64: number of events."""
        return self.mask.sum(dim=1)

    def rows(self, index: Tensor) -> HistoryBatch:
        """The users at `index` [rows] int64, every tensor alike."""
        return replace(
            self,
            items=self.items[index],
            times=self.times[index],
            token_states=None if self.token_states is None else self.token_states[index],
            token_events=None if self.token_events is None else self.token_events[index],
        )


def concatenate(batches: list[HistoryBatch]) -> HistoryBatch:
    """Batches of equal widths, one after the other."""

    def join(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    return HistoryBatch(
        items=torch.cat([batch.items for batch in batches]),
        times=torch.cat([batch.times for batch in batches]),
        token_states=join([batch.token_states for batch in batches]),
        token_events=join([batch.token_events for batch in batches]),
    )
