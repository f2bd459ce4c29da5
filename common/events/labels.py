"""Labels of events: whether an item was liked, from an event's kind or value; and no guess where it is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.events.histories import Histories


@dataclass(frozen=True)
class LabelRule:
    """Which events are liked.

    Attributes:
        liked_from: an event with a value is liked where the value is at least this.
        liked_kinds: kinds of event that are liked, all others not; values then play no part.
    """

    liked_from: float = 4.0
    liked_kinds: tuple[str, ...] = ()

    def labels(self, histories: Histories) -> npt.NDArray[np.float32]:
        """[events] float32: 1 liked, 0 not, NaN where an event has no value to go by."""
        if self.liked_kinds:
            liked = [code for code, name in enumerate(histories.kind_names) if name in self.liked_kinds]
            return np.isin(histories.kinds, liked).astype(np.float32)
        values = np.asarray(histories.values)
        return np.where(np.isnan(values), np.nan, values >= self.liked_from).astype(np.float32)


def padded_labels(
    histories: Histories, rows: Iterable[int] | npt.ArrayLike, max_events: int, rule: LabelRule | None
) -> npt.NDArray[np.float32] | None:
    """Labels of some users' most recent events, beside `Histories.padded`.

    Returns:
        [rows, max_events] float32, NaN where a label is unknown or there is no event; None without a rule.
    """
    if rule is None:
        return None
    chosen = np.asarray(list(rows) if not isinstance(rows, np.ndarray) else rows, dtype=np.int64)  # type: ignore[arg-type]
    places = histories.padded_places(chosen, max_events)  # [rows, max_events], -1 where there is no event
    labels = rule.labels(histories)
    if not len(labels):
        return np.full(places.shape, np.nan, dtype=np.float32)
    return np.where(places >= 0, labels[places], np.float32(np.nan))
