"""Reading a log once: batch by batch its usable events are put down as numbers, and its users get pseudonyms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from common.events.catalog import Catalog
from common.events.numbering import NOBODY, UNKNOWN_ITEM, Items, Kinds, Users
from common.events.readers import Log
from common.events.schema import LogError
from common.events.spill import BUCKETS, Spill
from common.events.times import Span, check_readable

Progress = Callable[[str, int, int | None], None]
"""Told what is being done, how many events are done, and of how many where that is known."""

_BATCH = 1 << 18
_LARGEST_BATCH = 1 << 21
_SHARE = 8  # of what was read already, a batch may be one part in so many


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known once a log was read to its end.

    Attributes:
        events: in the log.
        dropped: events for each of the first three reasons.
        digests, tie_keys: [users, 16] and [users], in the order of the pseudonyms.
        rows: [numbers] the place of a numbered user in that order.
        begins: [BUCKETS + 1] users in the buckets before.
        kind_names: sorted.
        kinds: [numbers] the place of a numbered kind among them.
        span: of the events that are used.
        near: sentences of ids that differ from another by next to nothing.
    """

    events: int
    dropped: tuple[int, int, int]
    digests: npt.NDArray[np.uint8]
    tie_keys: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.uint32]
    begins: npt.NDArray[np.int64]
    kind_names: tuple[str, ...]
    kinds: npt.NDArray[np.int16]
    span: Span
    near: tuple[str, ...]


def read_once(
    log: pl.LazyFrame | Log, catalog: Catalog, secret: bytes, spill: Spill, progress: Progress
) -> Reading:
    """Reads a log once; its usable events lie in the spill then."""
    log = log if isinstance(log, Log) else Log(log, untidy=False)
    users = Users(secret, untidy=log.untidy)
    items = Items(catalog, untidy=log.untidy)
    kinds = Kinds(log.default_kind, untidy=log.untidy)
    events, dropped, span = 0, np.zeros(3, dtype=np.int64), Span.begin()
    for batch in _batches(log, items):
        dropped += _put_down(batch, users, items, kinds, spill, span)
        events += len(batch)
        progress("reading", events, log.events)
    if log.events is not None and events != log.events:
        raise LogError(
            f"{events:,} rows were read of {log.events:,} that the log's files have: look for a damaged row, or a file "
            "that is written still"
        )
    if log.check_forms:
        check_readable(int(dropped[1]), events - int(dropped[0]))
    if log.check_span:
        span.check()
    return _ordered(users, kinds, events, dropped, span, (*users.near(), *items.near()))


def _put_down(
    batch: pl.DataFrame, users: Users, items: Items, kinds: Kinds, spill: Spill, span: Span
) -> npt.NDArray[np.int64]:
    """Puts down a batch's usable events; [3] events dropped for each of the first reasons."""
    numbers = users.of(batch["user"])
    rows, times = items.of(batch), batch["time"]
    unnamed = (numbers == NOBODY) | rows.is_null().to_numpy()
    timeless = times.is_null().to_numpy() & ~unnamed
    unknown = (rows == UNKNOWN_ITEM).fill_null(False).to_numpy() & ~unnamed & ~timeless
    useful = np.flatnonzero(~(unnamed | timeless | unknown))
    seconds = times.fill_null(0).to_numpy()
    span.add(seconds[useful])
    spill.add(
        users.buckets[numbers[useful]],
        useful,
        user=numbers,
        item=rows.fill_null(UNKNOWN_ITEM).to_numpy(),
        time=seconds,
        kind=kinds.of(batch["kind"]),
        value=batch["value"].to_numpy(),
    )
    return np.array([reason.sum() for reason in (unnamed, timeless, unknown)], dtype=np.int64)


def _batches(log: Log, items: Items) -> Iterator[pl.DataFrame]:
    plan = log.frame.select(
        "user",
        "time",
        *items.expressions(),
        pl.col("kind").cast(pl.Categorical()),
        pl.col("value").cast(pl.Float32).fill_null(np.nan),
    )
    try:
        yield from _grown(plan.collect_batches(chunk_size=_BATCH, engine="streaming"))
    except (pl.exceptions.PolarsError, OSError) as error:
        log.look_again()
        # The library's own text may quote a row, which is a user's data.
        raise LogError(
            "the log cannot be read to its end: look for a damaged row or a cut-off file"
        ) from error


def _grown(batches: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Batches put together as a log turns out to be large: fewer events then come with a user not met in theirs."""
    held: list[pl.DataFrame] = []
    read = 0
    for batch in batches:
        held.append(batch)
        read += len(batch)
        if sum(map(len, held)) >= min(read // _SHARE, _LARGEST_BATCH):
            yield pl.concat(held).rechunk()
            held.clear()
    if held:
        yield pl.concat(held).rechunk()


def _ordered(
    users: Users,
    kinds: Kinds,
    events: int,
    dropped: npt.NDArray[np.int64],
    span: Span,
    near: tuple[str, ...],
) -> Reading:
    own = np.flatnonzero(users.same_as == np.arange(len(users.same_as)))
    halves = users.digests[own].view(">u8").astype(np.uint64)  # [users, 2]
    own = own[np.lexsort((halves[:, 1], halves[:, 0]))]
    rows = np.zeros(len(users.same_as), dtype=np.uint32)
    rows[own] = np.arange(len(own), dtype=np.uint32)
    digests = users.digests[own]
    names = sorted(kinds.names)
    place = {name: place for place, name in enumerate(names)}
    return Reading(
        events=events,
        dropped=(int(dropped[0]), int(dropped[1]), int(dropped[2])),
        digests=digests,
        tie_keys=users.tie_keys[own],
        rows=rows,
        begins=np.searchsorted(digests[:, 0], np.arange(BUCKETS + 1)),
        kind_names=tuple(names),
        kinds=np.array([place[name] for name in kinds.names], dtype=np.int16),
        span=span,
        near=near,
    )
