"""Histories: a site's cleaned log, one row a user, as flat arrays that can be mapped from disk.

Rows are users under their pseudonyms; nothing here has seen a raw user id. Everything is a plain array
operation on one user's own events: no method lets one user change another's row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.events.histories_files import ABOUT, ARRAYS, HistoriesError, HistoriesWriter

__all__ = ["NO_ITEM", "Histories", "HistoriesError"]

NO_ITEM = -1
"""Stands where a history has no event."""
MAPPED_FROM = 1 << 18
"""Bytes of a file from which on it is mapped: a smaller one is sooner read."""


@dataclass(frozen=True, eq=False)
class Histories:
    """The events of each user, oldest first: user r has the events offsets[r] to offsets[r + 1].

    Attributes:
        users: [users] pseudonyms, each exactly once.
        offsets: [users + 1] int64.
        items: [events] int32, rows in the catalog.
        times: [events] int64, seconds since 1970-01-01 UTC.
        kinds: [events] int16, places in `kind_names`.
        values: [events] float32, NaN where an event has none.
        kind_names: names of the kinds.
    """

    users: npt.NDArray[np.str_]
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int16]
    values: npt.NDArray[np.float32]
    kind_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, dtype in ARRAYS.items():
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != dtype:
                raise HistoriesError(f"{name} must be one-dimensional {dtype}")
        if self.users.ndim != 1 or self.users.dtype.kind != "U":
            raise HistoriesError("users must be a one-dimensional array of text")
        if not _distinct(self.users):
            raise HistoriesError("a user has more than one row: merge the rows, one user is one row")
        events = len(self.items)
        if any(len(getattr(self, name)) != events for name in ("times", "kinds", "values")):
            raise HistoriesError("items, times, kinds and values must have one entry for each event")
        if len(self.offsets) != len(self.users) + 1 or self.offsets[0] != 0 or self.offsets[-1] != events:
            raise HistoriesError("offsets must run from 0 to the number of events, one more than users")
        if (np.diff(self.offsets) < 0).any():
            raise HistoriesError("offsets must not fall")

    def __len__(self) -> int:
        """The number of users."""
        return len(self.users)

    @property
    def events(self) -> int:
        """The number of events."""
        return len(self.items)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[users] events of each user."""
        return np.diff(self.offsets)

    def history(self, row: int) -> npt.NDArray[np.int32]:
        """[events of that user] the items of one user, oldest first."""
        if not 0 <= row < len(self):
            raise IndexError(f"there is no row {row} among {len(self)} users")
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def bounded(self, max_events: int) -> Histories:
        """Each user's `max_events` most recent events: what one user may contribute."""
        if max_events < 1:
            raise HistoriesError(f"max_events is {max_events}, but must be at least 1")
        kept = np.minimum(self.lengths, max_events)
        return self._take(self.users, self.offsets[1:] - kept, kept)

    def without_last(self, n: int = 1) -> tuple[Histories, npt.NDArray[np.int32]]:
        """Holds out each user's last `n` events, for leave-one-out.

        Returns:
            The histories without them, and [users, n] the items held out, oldest first. A user who would
            be left without any event keeps all, and has -1 held out.
        """
        if n < 1:
            raise HistoriesError(f"n is {n}, but must be at least 1")
        enough = self.lengths > n
        held_out = np.full((len(self), n), NO_ITEM, dtype=np.int32)
        last = self.offsets[1:][enough]
        held_out[enough] = self.items[last[:, None] + np.arange(-n, 0)]  # [users with enough, n]
        kept = self.lengths - np.where(enough, n, 0)
        return self._take(self.users, self.offsets[:-1], kept), held_out

    def select(self, rows: npt.ArrayLike) -> Histories:
        """The histories of some users, in the order of `rows`; no row twice."""
        chosen = self._rows(rows)
        return self._take(self.users[chosen], self.offsets[chosen], self.lengths[chosen])

    def padded(
        self, rows: npt.ArrayLike, max_events: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Histories of some users as rectangles: each one's most recent events, oldest first.

        Returns:
            items: [rows, max_events] int64, padded with -1 on the right.
            times: [rows, max_events] int64 seconds, padded with 0 on the right.
        """
        places = self.padded_places(rows, max_events)
        real = places >= 0
        items = np.full(places.shape, NO_ITEM, dtype=np.int64)
        times = np.zeros(places.shape, dtype=np.int64)
        items[real], times[real] = self.items[places[real]], self.times[places[real]]
        return items, times

    def padded_places(self, rows: npt.ArrayLike, max_events: int) -> npt.NDArray[np.int64]:
        """Where the events of those rectangles stand: [rows, max_events], -1 where there is no event."""
        if max_events < 1:
            raise HistoriesError(f"max_events is {max_events}, but must be at least 1")
        chosen = self._rows(rows)
        kept = np.minimum(self.lengths[chosen], max_events)
        place = np.arange(max_events)
        starts = self.offsets[chosen + 1] - kept
        return np.where(place < kept[:, None], starts[:, None] + place, -1).astype(np.int64)

    def save(self, folder: str | Path) -> None:
        """Writes a new folder of .npy files that their owner alone may read, whole or not at all.

        Raises:
            HistoriesError: the folder exists and is not empty.
        """
        with HistoriesWriter(folder) as writer:
            arrays = {name: getattr(self, name) for name in ARRAYS if name != "offsets"}
            writer.add(self.users, self.lengths, **arrays)
            writer.finish(self.kind_names)

    @classmethod
    def load(cls, folder: str | Path) -> Histories:
        """Maps the files that `save` wrote: where they are many, events stay on disk until they are read.

        Raises:
            HistoriesError: the folder holds no histories, or damaged ones.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / ABOUT).read_bytes())
            if about["version"] != 1:
                raise HistoriesError(f"histories in {folder} are of another version: clean the log again")
            arrays = {name: _array(folder / f"{name}.npy") for name in ("users", *ARRAYS)}
            return cls(**arrays, kind_names=tuple(about["kind_names"]))
        except FileNotFoundError as error:
            raise HistoriesError(f"folder {folder} holds no histories: clean a log into it") from error
        except (ValueError, KeyError, TypeError, EOFError) as error:
            if isinstance(error, HistoriesError):
                raise
            raise HistoriesError(f"histories in {folder} are damaged: clean the log again") from error

    def _rows(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        chosen = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"rows must lie in [0, {len(self)})")
        return chosen

    def _take(
        self,
        users: npt.NDArray[np.str_],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> Histories:
        places = _ranges(starts, lengths)
        return Histories(
            users=users,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=self.items[places],
            times=self.times[places],
            kinds=self.kinds[places],
            values=self.values[places],
            kind_names=self.kind_names,
        )


def _array(file: Path) -> npt.NDArray[Any]:
    mapped = file.stat().st_size >= MAPPED_FROM
    found: npt.NDArray[Any] = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    found.setflags(write=False)
    return found


def _distinct(users: npt.NDArray[np.str_]) -> bool:
    # Cleaning's order, which is seen far sooner than that no two are the same in another.
    return bool((users[1:] > users[:-1]).all()) or len(np.unique(users)) == len(users)


def _ranges(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The ranges [starts[r], starts[r] + lengths[r]) one after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
