"""Which events sites train on, and which ones judge the model. All on the researcher's side, of public data.

Leave-one-out, the default: of each user the last event is the test, the one before it the validation. Temporal: two
moments, the same for all users; sites hold what came before the first. Folds of users: leave-one-out, but a user who
judges the model is at no site.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.events.histories import Histories

Part = Literal["validation", "test"]
TEMPORAL_SHARES = (0.8, 0.9)
"""Shares of all events that happened before the validation, and before the test, of a temporal split."""


class Split(ABC):
    """A way to hold events out."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What sites that outlive a run remember, so that no other split's test reaches their training."""

    @property
    def words(self) -> str:
        """For the reader of a report."""
        return self.name

    @abstractmethod
    def training(self, histories: Histories) -> Histories:
        """What sites may hold, of some users' whole histories."""

    @abstractmethod
    def judged(self, histories: Histories, part: Part) -> Histories:
        """Histories of those who judge; the last event of each is the one to foretell from those before it."""


class LeaveOneOut(Split):
    """Each user's last event is the test, the one before it the validation."""

    @property
    def name(self) -> str:
        return "leave-one-out"

    def training(self, histories: Histories) -> Histories:
        return self._long_enough(histories).without_last(2)[0]

    def judged(self, histories: Histories, part: Part) -> Histories:
        chosen = self._long_enough(histories)
        return chosen if part == "test" else chosen.without_last(1)[0]

    def _long_enough(self, histories: Histories) -> Histories:
        return histories.select(np.flatnonzero(histories.lengths >= 3))


@dataclass(frozen=True)
class Temporal(Split):
    """Each user's first event from a moment on is foretold; no site holds any event from the first moment on.

    Attributes:
        validation_from, test_from: seconds since 1970-01-01 UTC, public.
    """

    validation_from: int
    test_from: int

    @classmethod
    def of(cls, whole: Histories) -> Temporal:
        """The moments by which shares of all events had happened: `TEMPORAL_SHARES`.

        Raises:
            ValueError: too many events share one time.
        """
        first, second = (moment_after(whole, share) for share in TEMPORAL_SHARES)
        if not first < second:
            raise ValueError(
                f"a tenth of all events and more happened at {_date(first)}, so no moment parts validation from "
                "test: use --split leave-one-out"
            )
        return cls(first, second)

    @property
    def name(self) -> str:
        return f"temporal {self.validation_from} {self.test_from}"

    @property
    def words(self) -> str:
        return (
            f"temporal split: training before {_date(self.validation_from)}, test from {_date(self.test_from)} on, "
            "the first event of each user with two before it"
        )

    def training(self, histories: Histories) -> Histories:
        before = until(histories, self.validation_from)
        return before.select(np.flatnonzero(before.lengths > 0))

    def judged(self, histories: Histories, part: Part) -> Histories:
        if part == "test":
            return up_to_first_after(histories, self.test_from)
        return up_to_first_after(until(histories, self.test_from), self.validation_from)


@dataclass(frozen=True, eq=False)
class Fold(LeaveOneOut):
    """Leave-one-out over users who are at no site.

    Attributes:
        number, folds: which one, from 1, of how many.
        users: pseudonyms of those who judge.
    """

    number: int
    folds: int
    users: npt.NDArray[np.str_]

    @classmethod
    def of(cls, whole: Histories, number: int, folds: int, seed: int) -> Fold:
        """One fold of all users.

        Raises:
            ValueError: fewer than two folds, or more than users.
        """
        judging = list(user_folds(len(whole), folds, seed))[number - 1][1]
        return cls(number, folds, whole.users[judging])

    @property
    def name(self) -> str:
        return f"fold {self.number} of {self.folds}"

    @property
    def words(self) -> str:
        return f"leave-one-out, over users who are at no site: {self.name}"

    def training(self, histories: Histories) -> Histories:
        return super().training(histories.select(np.flatnonzero(~np.isin(histories.users, self.users))))

    def judged(self, histories: Histories, part: Part) -> Histories:
        return super().judged(histories.select(np.flatnonzero(np.isin(histories.users, self.users))), part)


def _date(moment: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


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
    return first_events(histories, _events_before(histories, moment))


def first_events(histories: Histories, kept: npt.NDArray[np.int64]) -> Histories:
    """Each user's first `kept` [users] events."""
    place = np.arange(histories.events) - np.repeat(histories.offsets[:-1], histories.lengths)
    stays = place < np.repeat(kept, histories.lengths)
    return replace(
        histories,
        offsets=np.concatenate([[0], np.cumsum(kept)]).astype(np.int64),
        items=histories.items[stays],
        times=histories.times[stays],
        kinds=histories.kinds[stays],
        values=histories.values[stays],
    )


def _events_before(histories: Histories, moment: int) -> npt.NDArray[np.int64]:
    """[users] how many events each user has before a moment; histories are in the order of time."""
    rows = np.repeat(np.arange(len(histories)), histories.lengths)
    return np.bincount(rows[histories.times < moment], minlength=len(histories))


def up_to_first_after(histories: Histories, moment: int) -> Histories:
    """Each user's events before a moment and the first one after it, which is then the one to foretell.

    Users with fewer than two events before, or none after, are left out: a model cannot be judged by them. With
    `HeldOut`, the test is then each user's first event after the moment, and no model has seen any later one.
    """
    before = _events_before(histories, moment)
    judged = np.flatnonzero((before >= 2) & (before < histories.lengths))
    return first_events(histories.select(judged), before[judged] + 1)


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
