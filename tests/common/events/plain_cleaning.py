"""Cleaning in plain Python, event by event: what the fast path must give, bit for bit."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from common.events.cleaning import REASONS, CleaningPolicy, CleaningReport
from common.events.deidentify import pseudonym, tie_key
from common.events.histories import Histories
from common.events.schema import DEFAULT_KIND

Event = tuple[int, int, int, float, float]
"""Time, row, kind, the value to sort by, the value."""

Row = tuple[str | None, str | None, int | None, str | None, float | None]
_MASK = 2**64 - 1


def plain_clean(
    rows: Sequence[Row], items: Sequence[str], policy: CleaningPolicy, secret: bytes
) -> tuple[Histories | None, CleaningReport]:
    """Histories (None where nothing is left) and report of events with tidy texts."""
    dropped = dict.fromkeys(REASONS, 0)
    kinds = sorted({DEFAULT_KIND if kind is None else kind for *_, kind, _ in rows})
    place = {item: row for row, item in enumerate(items)}
    usable: dict[str, list[Event]] = {}
    for user, item, time, kind, value in rows:
        if user is not None:
            usable.setdefault(user, [])
        if user is None or item is None:
            dropped[REASONS[0]] += 1
        elif time is None:
            dropped[REASONS[1]] += 1
        elif item not in place:
            dropped[REASONS[2]] += 1
        else:
            number = kinds.index(DEFAULT_KIND if kind is None else kind)
            usable[user].append((time, place[item], number, *_value(value)))
    kept, over, few, tied = {}, 0, 0, 0
    for user, mine in usable.items():
        events = _distinct(_sorted(mine, tie_key(user, secret)), policy.duplicates)
        dropped[REASONS[3]] += len(mine) - len(events)
        if len(events) > policy.max_events_per_user:
            over, dropped[REASONS[4]] = over + 1, dropped[REASONS[4]] + len(events)
        elif len(events) < policy.minimum_events:
            few, dropped[REASONS[5]] = few + 1, dropped[REASONS[5]] + len(events)
        else:
            kept[pseudonym(user, secret)] = events
            times = [time for time, *_ in events]
            tied += sum(times.count(time) > 1 for time in times)
    users = sorted(kept)
    flat = [event for user in users for event in kept[user]]
    report = CleaningReport(len(rows), dropped, len(usable), over, few, len(flat), len(users), tied)
    if not flat:
        return None, report
    columns = list(zip(*flat, strict=True))
    return (
        Histories(
            users=np.array(users),
            offsets=np.cumsum([0, *(len(kept[user]) for user in users)], dtype=np.int64),
            items=np.array(columns[1], dtype=np.int32),
            times=np.array(columns[0], dtype=np.int64),
            kinds=np.array(columns[2], dtype=np.int16),
            values=np.array(columns[4], dtype=np.float32),
            kind_names=tuple(kinds),
        ),
        report,
    )


def _value(value: float | None) -> tuple[float, float]:
    """For sorting, events without a value last; and as it is kept."""
    if value is None:
        return float("inf"), float("nan")
    (short,) = struct.unpack("f", struct.pack("f", value))
    return short, short


def _sorted(events: list[Event], key: int) -> list[Event]:
    return sorted(events, key=lambda event: (event[0], _mix(key ^ _mix(event[1])), *event[1:4]))


def _distinct(events: list[Event], rule: str) -> list[Event]:
    seen, first = set(), []
    for event in events:
        key = (event[1], event[0], event[2]) if rule == "same-event" else (event[1],)
        if rule == "keep" or key not in seen:
            first.append(event)
        seen.add(key)
    return first


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
