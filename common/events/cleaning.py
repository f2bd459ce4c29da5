"""Cleaning: from a raw log to histories, with a count of what was dropped and why.

Every rule looks at one user's own events and the public catalog, so one user never decides what is kept of
another. The report is for the site's eyes only: its counts are exact, and must not leave the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import polars as pl
from rich.table import Table

from common.events.catalog import Catalog
from common.events.deidentify import pseudonym, tie_key
from common.events.histories import Histories
from common.events.schema import DEFAULT_KIND, LogError

Duplicates = Literal["same-event", "same-item", "keep"]

ORDERING_RULE = (
    "by time; events of one user at one time by a keyed hash of user and item, as a log's own order is "
    "often an artefact"
)
REASONS = (
    "missing user or item",
    "no readable time",
    "item not in the catalog",
    "duplicate",
    "user over the cap of events",
    "user with too few events",
)
"""Why an event is dropped; the first reason that applies counts."""


@dataclass(frozen=True, slots=True)
class CleaningPolicy:
    """What a site drops: public constants, the same at every site of a run.

    Attributes:
        max_events_per_user: users with more events than this are taken for robots, and dropped whole.
        minimum_events: users with fewer events are dropped whole.
        duplicates: "same-event" keeps one of the events with the same user, item, time and kind;
            "same-item" keeps a user's first event with each item; "keep" keeps all.
    """

    max_events_per_user: int = 10_000
    minimum_events: int = 3
    duplicates: Duplicates = "same-event"

    def __post_init__(self) -> None:
        if not 1 <= self.minimum_events <= self.max_events_per_user:
            raise ValueError(
                f"minimum_events is {self.minimum_events}, but must lie in [1, max_events_per_user = "
                f"{self.max_events_per_user}]: raise the cap or lower the minimum"
            )
        if self.duplicates not in get_args(Duplicates):
            raise ValueError(
                f"duplicates is {self.duplicates!r}, but must be one of {', '.join(get_args(Duplicates))}"
            )


@dataclass(frozen=True, slots=True)
class CleaningReport:
    """What cleaning did to one log. Local to the site: exact counts, no ids.

    Attributes:
        events_read: events in the log.
        dropped: reason -> events dropped for it, all of `REASONS`.
        users_read: users in the log.
        users_over_cap: users dropped as robots.
        users_too_few: users dropped for too few events, or for none left.
        events_kept: events in the histories.
        users_kept: rows of the histories.
        tied_events: kept events that share their time with another event of the same user.
    """

    events_read: int
    dropped: Mapping[str, int]
    users_read: int
    users_over_cap: int
    users_too_few: int
    events_kept: int
    users_kept: int
    tied_events: int

    def table(self) -> Table:
        """The report for a terminal."""
        table = Table(title="cleaning (for the site's eyes only)", caption=f"order: {ORDERING_RULE}")
        table.add_column("what")
        table.add_column("events", justify="right")
        table.add_column("users", justify="right")
        table.add_row("read", f"{self.events_read:,}", f"{self.users_read:,}")
        users = {REASONS[4]: f"{self.users_over_cap:,}", REASONS[5]: f"{self.users_too_few:,}"}
        for reason, events in self.dropped.items():
            table.add_row(f"dropped: {reason}", f"{events:,}", users.get(reason, ""))
        table.add_row("kept", f"{self.events_kept:,}", f"{self.users_kept:,}", style="bold")
        table.add_row("of these at equal times of one user", f"{self.tied_events:,}", "")
        return table


def clean(
    log: pl.LazyFrame, catalog: Catalog, policy: CleaningPolicy, secret: bytes
) -> tuple[Histories, CleaningReport]:
    """Cleans and de-identifies a log in the schema of `EVENT_SCHEMA`.

    The log is read a few times, in streams; what is held in memory is the user ids and 22 bytes a usable
    event (a few times over while they are sorted).
    Rows of the histories are in the order of the pseudonyms. Events of one user are ordered by time, then
    by a hash of user and item under the site's secret, then by kind and value.

    Raises:
        LogError: the log cannot be read to its end, or no event is left.
        SecretError: the secret is not 32 bytes long.
    """
    try:
        counts, events = _encode(log, catalog, secret)
    except (pl.exceptions.PolarsError, OSError) as error:
        # The library's own text may quote a row, which is a user's data.
        raise LogError(
            "the log cannot be read to its end: look for a damaged row or a cut-off file"
        ) from error
    read = int(counts["events"].sum())
    known = counts.filter(pl.col("user").is_not_null())
    dropped = dict.fromkeys(REASONS, 0)
    for place in range(3):
        dropped[REASONS[place]] = int(counts[f"reason {place}"].sum())

    events = events.sort_by_history()
    if policy.duplicates != "keep":
        distinct = events.distinct(policy.duplicates)
        dropped[REASONS[3]] = len(events.users) - int(distinct.sum())
        events = events.where(distinct)
    per_user = np.bincount(events.users, minlength=len(known))  # [users read]
    over, few = per_user > policy.max_events_per_user, per_user < policy.minimum_events
    dropped[REASONS[4]] = int(per_user[over].sum())
    dropped[REASONS[5]] = int(per_user[few].sum())
    events = events.where(~(over | few)[events.users])
    if not len(events.users):
        reason = max(REASONS, key=lambda name: dropped[name])
        raise LogError(f"nothing is left of the log: mostly {reason!r}; check the columns and the catalog")

    rows, lengths = np.unique(events.users, return_counts=True)
    histories = Histories(
        users=np.asarray(events.names)[rows],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=events.items,
        times=events.times,
        kinds=events.kinds,
        values=events.values,
        kind_names=events.kind_names,
    )
    return histories, CleaningReport(
        events_read=read,
        dropped=dropped,
        users_read=len(known),
        users_over_cap=int(over.sum()),
        users_too_few=int(few.sum()),
        events_kept=histories.events,
        users_kept=len(histories),
        tied_events=events.ties(),
    )


@dataclass(frozen=True, slots=True)
class _Events:
    """Usable events as numbers, [events] each; `users` are places in `names`, the sorted pseudonyms."""

    names: list[str]
    tie_keys: npt.NDArray[np.uint64]
    kind_names: tuple[str, ...]
    users: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int16]
    values: npt.NDArray[np.float32]

    def where(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> _Events:
        return _Events(
            self.names,
            self.tie_keys,
            self.kind_names,
            self.users[chosen],
            self.items[chosen],
            self.times[chosen],
            self.kinds[chosen],
            self.values[chosen],
        )

    def sort_by_history(self) -> _Events:
        tie = _mix(self.tie_keys[self.users] ^ _mix(self.items.astype(np.uint64)))
        order = np.lexsort((self.values, self.kinds, self.items, tie, self.times, self.users))
        return self.where(order)

    def distinct(self, rule: Duplicates) -> npt.NDArray[np.bool_]:
        """[events] whether an event is the first of its kind in order."""
        keys: list[npt.NDArray[np.integer]] = [self.users, self.items]
        if rule == "same-event":
            keys += [self.times, self.kinds]
        order = np.lexsort(keys[::-1])  # stable: equal events stay in order of history
        changes = np.zeros(len(order), dtype=np.bool_)
        changes[:1] = True
        for key in keys:
            changes[1:] |= key[order][1:] != key[order][:-1]
        first = np.empty(len(order), dtype=np.bool_)
        first[order] = changes
        return first

    def ties(self) -> int:
        """Events at a time that another event of the same user has; events must be sorted."""
        same = (self.users[1:] == self.users[:-1]) & (self.times[1:] == self.times[:-1])
        tied = np.zeros(len(self.users), dtype=np.bool_)
        tied[1:] |= same
        tied[:-1] |= same
        return int(tied.sum())


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser: spreads the secret tie key of a user over the items."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _encode(log: pl.LazyFrame, catalog: Catalog, secret: bytes) -> tuple[pl.DataFrame, _Events]:
    """Counts by raw user and reason, and the usable events as numbers."""
    rows = pl.LazyFrame(
        {"item": list(catalog.ids), "row": np.arange(len(catalog), dtype=np.int32)},
        schema_overrides={"item": pl.String},
    )
    log = log.join(rows, on="item", how="left")
    unnamed = pl.col("user").is_null() | pl.col("item").is_null()
    timeless = ~unnamed & pl.col("time").is_null()
    unknown = ~unnamed & ~timeless & pl.col("row").is_null()
    reasons = [
        reason.sum().alias(f"reason {place}") for place, reason in enumerate((unnamed, timeless, unknown))
    ]
    counts = log.group_by("user").agg(pl.len().alias("events"), *reasons).collect(engine="streaming")
    kinds = log.select(pl.col("kind").fill_null(DEFAULT_KIND).unique()).collect(engine="streaming")
    kind_names = sorted(kinds["kind"].to_list())
    if len(kind_names) > np.iinfo(np.int16).max:
        raise LogError("the log has more than 32,767 kinds of events: map another column as kind")

    raw = counts["user"].drop_nulls().to_list()
    named = sorted((pseudonym(user, secret), user) for user in raw)
    users = pl.LazyFrame(
        {"user": [user for _, user in named], "user row": np.arange(len(named), dtype=np.int32)},
        schema_overrides={"user": pl.String},
    )
    kind_rows = pl.LazyFrame(
        {"kind": kind_names, "kind row": np.arange(len(kind_names), dtype=np.int16)},
        schema_overrides={"kind": pl.String},
    )
    usable = (
        log.filter(~unnamed & ~timeless & ~unknown)
        .with_columns(pl.col("kind").fill_null(DEFAULT_KIND))
        .join(users, on="user", how="inner")
        .join(kind_rows, on="kind", how="inner")
        .select("user row", "row", "time", "kind row", pl.col("value").cast(pl.Float32).fill_null(np.nan))
        .collect(engine="streaming")
    )
    return counts, _Events(
        names=[name for name, _ in named],
        tie_keys=np.array([tie_key(user, secret) for _, user in named], dtype=np.uint64),
        kind_names=tuple(kind_names),
        users=usable["user row"].to_numpy(),
        items=usable["row"].to_numpy(),
        times=usable["time"].to_numpy(),
        kinds=usable["kind row"].to_numpy(),
        values=usable["value"].to_numpy(),
    )
