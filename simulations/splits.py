"""Ways to hold data out besides leave-one-out: folds of users, and a moment in time. All on the researcher's side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from common.events.histories import Histories


def user_folds(
    users: int, folds: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """K-fold over users: rows to train on, and rows to judge by, each user judged exactly once.

    Raises:
        ValueError: fewer than two folds, or more than users.
    """
    if not 2 <= folds <= users:
        raise ValueError(f"folds is {folds}, but must lie between 2 and the {users} users")
    order = np.random.default_rng(seed).permutation(users)
    for judged in np.array_split(order, folds):
        yield np.setdiff1d(order, judged), np.sort(judged)


def until(histories: Histories, moment: int) -> Histories:
    """Each user's events before a moment, for a temporal split; users without one keep an empty history.

    Args:
        moment: seconds since 1970-01-01 UTC.
    """
    rows = np.repeat(np.arange(len(histories)), histories.lengths)
    before = histories.times < moment
    lengths = np.bincount(rows[before], minlength=len(histories))
    return replace(
        histories,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=histories.items[before],
        times=histories.times[before],
        kinds=histories.kinds[before],
        values=histories.values[before],
    )


def up_to_first_after(histories: Histories, moment: int) -> Histories:
    """Each user's events before a moment and the first one after it, which is then the one to foretell.

    Users with fewer than two events before, or none after, are left out: a model cannot be judged by them. With
    `HeldOut`, the test is then each user's first event after the moment, and no model has seen any later one.
    """
    rows = np.repeat(np.arange(len(histories)), histories.lengths)
    before = np.bincount(rows[histories.times < moment], minlength=len(histories))
    judged = np.flatnonzero((before >= 2) & (before < histories.lengths))
    chosen = histories.select(judged)
    kept = before[judged] + 1
    place = np.arange(len(chosen.items)) - np.repeat(chosen.offsets[:-1], chosen.lengths)
    stays = place < np.repeat(kept, chosen.lengths)
    return replace(
        chosen,
        offsets=np.concatenate([[0], np.cumsum(kept)]).astype(np.int64),
        items=chosen.items[stays],
        times=chosen.times[stays],
        kinds=chosen.kinds[stays],
        values=chosen.values[stays],
    )


def moment_after(histories: Histories, share: float) -> int:
    """The time by which a share of all events had happened.

    Raises:
        ValueError: a share outside (0, 1), or no events.
    """
    if not 0 < share < 1 or not histories.events:
        raise ValueError(
            f"the share of events is {share:g}, but must lie between 0 and 1, of at least one event"
        )
    return int(np.quantile(histories.times, share, method="higher"))
