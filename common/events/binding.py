"""Binding: some users' events in the order of their histories, duplicates and odd users dropped.

Everything is a function of one user's own events, the policy and the site's secret.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.events.rules import CleaningPolicy

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Events:
    """Usable events of some users, [events] each; `users` are places in `tie_keys`, [users]."""

    tie_keys: npt.NDArray[np.uint64]
    users: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int16]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bound:
    """Part of the histories, with what was dropped; `lengths` are [users], 0 for a user who is dropped."""

    lengths: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int16]
    values: npt.NDArray[np.float32]
    duplicates: int
    events_over_cap: int
    users_over_cap: int
    events_of_few: int
    tied_events: int


def bind(events: Events, policy: CleaningPolicy) -> Bound:
    """Orders events by user and time, then by a keyed hash of user and item, then by item, kind and value."""
    order, together = _in_order(events)
    users, items = events.users[order], events.items[order]
    kept = np.ones(len(order), dtype=np.bool_)
    if policy.duplicates == "same-event":
        kinds = events.kinds[order]
        kept[1:] = ~(together[1:] & (items[1:] == items[:-1]) & (kinds[1:] == kinds[:-1]))
    elif policy.duplicates == "same-item":
        kept = _first_with_item(users, items)
    duplicates = len(order) - int(kept.sum())
    per_user = np.bincount(users[kept], minlength=len(events.tie_keys))
    over, few = per_user > policy.max_events_per_user, per_user < policy.minimum_events
    if (odd := over | few).any():
        kept &= ~odd[users]
    order = order[kept]
    times = events.times[order]
    return Bound(
        lengths=np.where(odd, 0, per_user),
        items=items[kept],
        times=times,
        kinds=events.kinds[order],
        values=events.values[order],
        duplicates=duplicates,
        events_over_cap=int(per_user[over].sum()),
        users_over_cap=int(over.sum()),
        events_of_few=int(per_user[few].sum()),
        tied_events=_ties(users[kept], times),
    )


def _in_order(events: Events) -> tuple[npt.NDArray[np.int64], Flags]:
    """The order of histories; and [events in that order] whether an event has the user and time of the one before."""
    order, together = _by_user_and_time(events)
    tied = together.copy()
    tied[:-1] |= together[1:]
    places = np.flatnonzero(tied)
    if len(places):
        some = order[places]
        items = events.items[some]
        tie = mix(events.tie_keys[events.users[some]] ^ mix(items.astype(np.uint64)))
        runs = np.cumsum(~together[places])
        keys = (events.values[some], events.kinds[some], items, tie, runs)
        order[places] = some[np.lexsort(keys)]  # stable: what is equal stays in the log's order
    return order, together


def _by_user_and_time(events: Events) -> tuple[npt.NDArray[np.int64], Flags]:
    """A stable order by user and time."""
    together = np.zeros(len(events.users), dtype=np.bool_)
    if not len(together):
        return np.empty(0, dtype=np.int64), together
    earliest, latest = int(events.times.min()), int(events.times.max())
    of_time, of_place = (latest - earliest).bit_length(), (len(together) - 1).bit_length()
    if len(events.tie_keys).bit_length() + of_time + of_place > 64:
        order = np.lexsort((events.times, events.users))
        users, times = events.users[order], events.times[order]
        together[1:] = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
        return order, together
    # User, time and place in one number: sorting numbers is far faster than sorting places by them.
    packed = events.users.astype(np.uint64)
    packed <<= np.uint64(of_time)
    packed |= (events.times - np.int64(earliest)).astype(np.uint64)
    packed <<= np.uint64(of_place)
    packed |= np.arange(len(packed), dtype=np.uint64)
    packed.sort()
    order = (packed & np.uint64(2**of_place - 1)).astype(np.int64)
    packed >>= np.uint64(of_place)
    together[1:] = packed[1:] == packed[:-1]
    return order, together


def _first_with_item(users: npt.NDArray[np.int64], items: npt.NDArray[np.int32]) -> Flags:
    """[events] whether an event is its user's first with its item."""
    order = np.lexsort((items, users))  # stable: equal events stay in order of history
    again = (users[order][1:] == users[order][:-1]) & (items[order][1:] == items[order][:-1])
    first = np.ones(len(order), dtype=np.bool_)
    first[order[1:][again]] = False
    return first


def _ties(users: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> int:
    """Events at a time that another event of the same user has; events must be sorted."""
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.zeros(len(users), dtype=np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    return int(tied.sum())


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser: spreads the secret tie key of a user over the items."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
