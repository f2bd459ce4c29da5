"""Spill: a log's usable events as numbers, put down by bucket of users while the log is read.

What is put down holds no raw user id. On disk it is a file without a name, mode 0600, in the site's own folder:
it is gone when the process is, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from common.events.schema import LogError

EVENT = np.dtype([("user", "<u4"), ("item", "<i4"), ("time", "<i8"), ("kind", "<i2"), ("value", "<f4")])
"""22 bytes an event: numbers of user and kind, row of the item."""

BUCKETS = 256
"""Users fall to buckets by the first byte of the pseudonym, so buckets in order are pseudonyms in order."""


_AT_ONCE = 1 << 18  # events that are put in order while they are in the processor's cache


class SpillError(LogError):
    """Events cannot be put down: the disk is full, or the folder is not to be written."""


class Spill:
    """Events by bucket, in memory or in a file of a folder.

    Args:
        folder: of the site; None for memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] = BytesIO()
        if folder is not None:
            try:
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - `__exit__` does
            except OSError as error:
                raise SpillError(f"{folder} cannot be written to: {error.strerror}") from error
        self._begins: list[npt.NDArray[np.int64]] = []  # a batch: [BUCKETS + 1] events put down before
        self._written = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """[BUCKETS] events in each."""
        return sum((np.diff(begins) for begins in self._begins), start=np.zeros(BUCKETS, dtype=np.int64))

    def add(
        self,
        buckets: npt.NDArray[np.uint8],
        places: npt.NDArray[np.int64],
        **columns: npt.NDArray[np.generic],
    ) -> None:
        """Puts down the events at some places of the columns, each in its bucket.

        Raises:
            SpillError: they cannot be written.
        """
        for first in range(0, len(places), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            self._add(buckets[some], places[some], columns)

    def _add(
        self,
        buckets: npt.NDArray[np.uint8],
        places: npt.NDArray[np.int64],
        columns: Mapping[str, npt.NDArray[np.generic]],
    ) -> None:
        order = places[np.argsort(buckets, kind="stable")]
        events = np.empty(len(order), dtype=EVENT)
        for name, column in columns.items():
            events[name] = column[order]
        counts = np.bincount(buckets, minlength=BUCKETS)
        self._begins.append(self._written + np.concatenate([[0], np.cumsum(counts)]))
        self._written += len(order)
        left = events.view(np.uint8).data
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise SpillError(
                f"{self._folder} cannot take what is being read: {error.strerror}; make room for "
                f"{EVENT.itemsize} bytes an event, twice"
            ) from error

    def read(self, first: int, last: int) -> npt.NDArray[np.void]:
        """The events of buckets `first` to `last` - 1, in the order in which they were put down."""
        pieces = [(int(begins[first]), int(begins[last])) for begins in self._begins]
        events = np.empty(sum(end - begin for begin, end in pieces), dtype=EVENT)
        left = events.view(np.uint8).data
        for begin, end in pieces:
            self._read_into(left[: (size := (end - begin) * EVENT.itemsize)], begin * EVENT.itemsize)
            left = left[size:]
        return events

    def _read_into(self, place: memoryview, position: int) -> None:
        if isinstance(self._file, BytesIO):
            place[:] = self._file.getbuffer()[position : position + len(place)]
            return
        while place:
            read = os.preadv(self._file.fileno(), [place], position)  # threads read at once
            if not read:
                raise SpillError(f"what was put down in {self._folder} ends early: look at that disk")
            place, position = place[read:], position + read

    def groups(self, events: int) -> Iterator[tuple[int, int]]:
        """Ranges of buckets that hold about this many events each, or one bucket that holds more."""
        first, held = 0, 0
        for bucket, size in enumerate(self.sizes.tolist()):
            if held and held + size > events:
                yield first, bucket
                first, held = bucket, 0
            held += size
        yield first, BUCKETS
