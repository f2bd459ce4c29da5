"""Cleaning: from a raw log to histories, with a count of what was dropped and why.

A log goes by in batches: users, items and kinds become numbers (`numbering.py`), which are put down by bucket of
users (`spill.py`); then each bucket is ordered and bound alone (`binding.py`), in the order of the pseudonyms. So
what is in memory is the users and some batches, however many events there are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import starmap
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from common.events.binding import Bound, Events, bind
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.events.histories_files import HistoriesWriter
from common.events.intake import Progress, Reading, read_once
from common.events.readers import Log
from common.events.rules import ORDERING_RULE, REASONS, WAYS_OUT, CleaningPolicy, CleaningReport, Duplicates
from common.events.schema import LogError
from common.events.spill import Spill

__all__ = [
    "ORDERING_RULE",
    "REASONS",
    "CleaningPolicy",
    "CleaningReport",
    "Duplicates",
    "Progress",
    "clean",
    "clean_to",
]

Result = TypeVar("Result")

_GROUP = 1 << 18
_WORKERS_AT_MOST = 4


def clean(
    log: pl.LazyFrame | Log, catalog: Catalog, policy: CleaningPolicy, secret: bytes
) -> tuple[Histories, CleaningReport]:
    """Cleans and de-identifies a log, in memory.

    Rows of the histories are in the order of the pseudonyms. Events of one user are ordered by time, then
    by a hash of user and item under the site's secret, then by kind and value.

    Args:
        log: in the schema of `EVENT_SCHEMA`, or as `scan_log` gives it.

    Raises:
        LogError: the log cannot be read to its end, or no event is left.
        SecretError: the secret is not 32 bytes long.
    """
    parts: list[tuple[npt.NDArray[np.str_], Bound]] = []
    with Spill() as spill:
        read = read_once(log, catalog, secret, spill, _silent)
        report = _report(read, _bound(read, policy, spill, _silent), lambda *part: parts.append(part))
    bound = [part for _, part in parts]
    lengths = np.concatenate([part.lengths[part.lengths > 0] for part in bound])
    histories = Histories(
        users=np.concatenate([names for names, _ in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate([part.items for part in bound]),
        times=np.concatenate([part.times for part in bound]),
        kinds=np.concatenate([part.kinds for part in bound]),
        values=np.concatenate([part.values for part in bound]),
        kind_names=read.kind_names,
    )
    return histories, report


def clean_to(
    folder: Path,
    log: pl.LazyFrame | Log,
    catalog: Catalog,
    policy: CleaningPolicy,
    secret: bytes,
    progress: Progress | None = None,
) -> tuple[Histories, CleaningReport]:
    """As `clean`, into a new folder, whole or not at all; the histories are mapped from it.

    The log may be larger than memory: what is held is the user ids and pseudonyms, and some batches.

    Raises:
        LogError: the log cannot be read to its end, no event is left, or the disk cannot take what is kept.
        HistoriesError: the folder exists and is not empty.
        SecretError: the secret is not 32 bytes long.
    """
    progress = progress or _silent
    try:
        with HistoriesWriter(folder) as writer, Spill(writer.partial) as spill:
            read = read_once(log, catalog, secret, spill, progress)

            def write(names: npt.NDArray[np.str_], part: Bound) -> None:
                lengths = part.lengths[part.lengths > 0]
                writer.add(
                    names,
                    lengths,
                    items=part.items,
                    times=part.times,
                    kinds=part.kinds,
                    values=part.values,
                )

            report = _report(read, _bound(read, policy, spill, progress), write)
            writer.finish(read.kind_names)
    except OSError as error:
        raise LogError(
            f"{folder} cannot be written: {error.strerror}; make room, or choose another"
        ) from error
    return Histories.load(folder), report


def _silent(what: str, done: int, of: int | None) -> None:
    pass


def _bound(
    read: Reading, policy: CleaningPolicy, spill: Spill, progress: Progress
) -> Iterator[tuple[npt.NDArray[np.uint8], Bound]]:
    """Digests and events of some users at a time, in the order of the pseudonyms."""

    def one(first: int, last: int) -> tuple[npt.NDArray[np.uint8], Bound]:
        begin, end = int(read.begins[first]), int(read.begins[last])
        raw = spill.read(first, last)
        events = Events(
            tie_keys=read.tie_keys[begin:end],
            users=read.rows[raw["user"]].astype(np.int64) - begin,
            items=np.ascontiguousarray(raw["item"]),
            times=np.ascontiguousarray(raw["time"]),
            kinds=read.kinds[raw["kind"]],
            values=np.ascontiguousarray(raw["value"]),
        )
        del raw
        return read.digests[begin:end], bind(events, policy)

    sizes, done = spill.sizes, 0
    groups = list(spill.groups(_GROUP))
    parts = starmap(one, groups) if len(groups) == 1 else _at_once(one, groups)
    for (first, last), part in zip(groups, parts, strict=True):
        done += int(sizes[first:last].sum())
        yield part
        progress("binding", done, int(sizes.sum()))


def _at_once(work: Callable[[int, int], Result], arguments: list[tuple[int, int]]) -> Iterator[Result]:
    """Results in order, from as many threads as there are cores; no more are held than are being made."""
    workers = min(os.cpu_count() or 1, _WORKERS_AT_MOST)
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as threads:
        for each in arguments:
            pending.append(threads.submit(work, *each))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _report(
    read: Reading,
    parts: Iterator[tuple[npt.NDArray[np.uint8], Bound]],
    keep: Callable[[npt.NDArray[np.str_], Bound], None],
) -> CleaningReport:
    """Hands on each part of the histories, and counts."""
    dropped = dict(zip(REASONS, (*read.dropped, 0, 0, 0), strict=True))
    over_cap = events_kept = users_kept = tied = 0
    for digests, part in parts:
        dropped[REASONS[3]] += part.duplicates
        dropped[REASONS[4]] += part.events_over_cap
        dropped[REASONS[5]] += part.events_of_few
        over_cap += part.users_over_cap
        tied += part.tied_events
        some = part.lengths > 0
        events_kept += len(part.items)
        users_kept += int(some.sum())
        keep(_names(digests[some]), part)
    if not events_kept:
        reason = max(REASONS, key=lambda name: dropped[name])
        raise LogError(f"nothing is left of the log: mostly {reason!r}: {WAYS_OUT[reason]}")
    return CleaningReport(
        events_read=read.events,
        dropped=dropped,
        users_read=len(read.digests),
        users_over_cap=over_cap,
        users_too_few=len(read.digests) - users_kept - over_cap,
        events_kept=events_kept,
        users_kept=users_kept,
        tied_events=tied,
        days=read.span.days,
        early=read.span.early,
        late=read.span.late,
        near=read.near,
    )


def _names(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.str_]:
    """[users] pseudonyms as text, of [users, 16] bytes."""
    letters = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    halves = np.stack([digests >> 4, digests & 15], axis=-1).reshape(-1, 32)
    return letters[halves].astype("<u4").reshape(-1).view("<U32")
