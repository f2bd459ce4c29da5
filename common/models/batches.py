"""A batch of users' histories as tensors: one row a user, in every tensor, always."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

EVEN_EVENTS = 4
"""Units of rows have a multiple of so many events: [events, events] float32 of every user begins at a multiple of 64
bytes. Where it does not, the same numbers are added in another order at another place of the unit. So do
[events, width] of every user, as a plan's widths are multiples of 4."""


@dataclass(frozen=True)
class HistoryBatch:
    """Histories of some users, oldest event first, padded on the right.

    Attributes:
        items: [users, events] int64, rows of the catalog, -1 where there is no event.
        times: [users, events] int64, seconds since the epoch, 0 where there is no event.
        labels: [users, events] float32, 1 liked, 0 not, NaN where unknown; None where no task asks for them.
        token_states: [users, tokens, width] float32, states of the encoder's frozen lower layers, or None.
        token_events: [users, tokens] int64, the event that each token belongs to, -1 for padding, or None.
    """

    items: Tensor
    times: Tensor
    labels: Tensor | None = None
    token_states: Tensor | None = None
    token_events: Tensor | None = None

    @classmethod
    def of(
        cls,
        items: np.ndarray,
        times: np.ndarray,
        device: torch.device | str = "cpu",
        *,
        labels: np.ndarray | None = None,
    ) -> HistoryBatch:
        """Each [users, events]; see the attributes."""
        return cls(
            items=torch.as_tensor(np.ascontiguousarray(items), dtype=torch.int64).to(device),
            times=torch.as_tensor(np.ascontiguousarray(times), dtype=torch.int64).to(device),
            labels=None if labels is None else torch.as_tensor(labels, dtype=torch.float32).to(device),
        )

    def to(self, device: torch.device | str) -> HistoryBatch:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

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
        return self._each(lambda tensor: tensor[index])

    def first(self, users: int) -> HistoryBatch:
        """The first users."""
        return self._each(lambda tensor: tensor[:users])

    def unit(self, rows: int) -> HistoryBatch:
        """The same users in a unit of rows: histories without events behind them, and room for more events.

        Every product over a unit has one shape, however many users there are, so a library takes one kernel for all of
        them. Whoever asks for this takes the results' first rows alone.

        Args:
            rows: of the unit, at least as many as there are users.

        Raises:
            ValueError: there are more users.
        """
        lacking = rows - len(self)
        if lacking < 0:
            raise ValueError(f"a unit of {rows} rows cannot hold {len(self)} users: split them")
        wide = self.with_even_events()
        return concatenate([wide, wide.without_events(lacking)]) if lacking else wide

    def without_events(self, rows: int) -> HistoryBatch:
        """So many histories of the same form, without an event."""

        def blank(tensor: Tensor | None, value: float) -> Tensor | None:
            return None if tensor is None else tensor.new_full((rows, *tensor.shape[1:]), value)

        found: dict[str, Any] = {
            "items": blank(self.items, -1),
            "times": blank(self.times, 0),
            "labels": blank(self.labels, float("nan")),
            "token_states": blank(self.token_states, 0.0),
            "token_events": blank(self.token_events, -1),
        }
        return HistoryBatch(**found)

    def with_even_events(self) -> HistoryBatch:
        """The same with room for more events, up to a multiple of EVEN_EVENTS."""
        room = even_events(self.items.shape[1]) - self.items.shape[1]
        return replace(self, **self._with_room(room)) if room else self

    def _with_room(self, events: int) -> dict[str, Any]:
        """Items, times and labels with room for more events, as padding."""
        labels = self.labels
        return {
            "items": pad(self.items, (0, events), value=-1),
            "times": pad(self.times, (0, events)),
            "labels": None if labels is None else pad(labels, (0, events), value=float("nan")),
        }

    def _each(self, change: Callable[[Tensor], Tensor]) -> HistoryBatch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if t is None else change(t) for name, t in tensors.items()}
        return HistoryBatch(**changed)

    @property
    def known_labels(self) -> Tensor:
        """[users, events] float32: labels, NaN everywhere if there are none."""
        if self.labels is None:
            return torch.full(self.items.shape, float("nan"), device=self.items.device)
        return self.labels

    def widened(self) -> HistoryBatch:
        """The same histories with room for one more event, as padding: none of its tensors is empty."""
        return HistoryBatch(**self._with_room(1))

    def followed_by(self, items: Tensor) -> HistoryBatch:
        """Each history with one more event at its end, of unknown label, at the time of the last one.

        Args:
            items: [users] int64 rows of the catalog.
        """
        wide = self.widened()
        users, place = torch.arange(len(self), device=self.items.device), self.lengths
        last = wide.times.gather(1, (place - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        wide.items[users, place] = items
        wide.times[users, place] = last
        return wide


def over_time(kernel: Tensor, x: Tensor) -> Tensor:
    """Each user's events weighed by a kernel over time: a product for each user, and not one with users as its columns.

    Where users are columns of one product, a library may add up those at its edge in another order.

    Args:
        kernel: [events (now), events (then)].
        x: [users, events, width].

    Returns:
        [users, events, width].
    """
    return torch.bmm(kernel.expand(len(x), -1, -1), x)


def even_events(events: int) -> int:
    """So many events, or the next multiple of EVEN_EVENTS."""
    return events + -events % EVEN_EVENTS


def concatenate(batches: list[HistoryBatch]) -> HistoryBatch:
    """Batches of equal widths, one after the other."""

    def join(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    joined: dict[str, Any] = {
        f.name: join([getattr(b, f.name) for b in batches]) for f in fields(HistoryBatch)
    }
    return HistoryBatch(**joined)
