"""The rules of cleaning: what a site drops, and the count of what it dropped and why.

Every rule looks at one user's own events and the public catalog, so one user never decides what is kept of
another. The report is for the site's eyes only: its counts are exact, and must not leave the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from rich.table import Table

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

WAYS_OUT: Mapping[str, str] = dict(
    zip(
        REASONS,
        (
            "name the columns that hold them",
            "name the column of times, or the form that they have",
            "give the catalog that lists the log's items, by the same ids",
            "let duplicates be kept",
            "raise the cap, if these are people",
            "lower the minimum of events",
        ),
        strict=True,
    )
)
"""Reason -> what helps where nothing is left for it."""


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
        days: the first day and the last of the events that could be used, before users were left out.
        early, late: events before 1990, and in the future.
        near: sentences of ids that differ from another by next to nothing.
    """

    events_read: int
    dropped: Mapping[str, int]
    users_read: int
    users_over_cap: int
    users_too_few: int
    events_kept: int
    users_kept: int
    tied_events: int
    days: str = ""
    early: int = 0
    late: int = 0
    near: tuple[str, ...] = ()

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
        share = f" ({self.tied_events / self.events_kept:.0%})" if self.tied_events else ""
        table.add_row("of these at equal times of one user", f"{self.tied_events:,}{share}", "")
        if self.days:
            table.add_row(f"times: {self.days}", "", "")
        for what, events in (("before 1990", self.early), ("in the future", self.late)):
            if events:
                table.add_row(f"of these {what}", f"{events:,}", "", style="yellow")
        return table

    def sentences(self) -> tuple[str, ...]:
        """What is to be said beside the table, before anything is trained."""
        tied: tuple[str, ...] = ()
        if 2 * self.tied_events > self.events_kept:
            tied = (
                f"{self.tied_events / self.events_kept:.0%} of events share their time with another of the same user: "
                "what came first is not known there, and is decided by a keyed hash",
            )
        return (*self.near, *tied)
