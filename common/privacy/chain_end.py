"""The end of a site's chain, the middle of which is not at hand: what a receipt or a certificate shows by itself."""

from __future__ import annotations

from collections.abc import Sequence

from common.privacy.chain import Chain
from common.privacy.entries import Anchor, Burnt, Close, Entry, Genesis, Release, Reserve
from common.privacy.faults import (
    AfterCloseError,
    BurntReservationError,
    ClockBackwardsError,
    ForkError,
    KeyMismatchError,
    OpenReservationError,
    ReleasedReservationError,
    SecondGenesisError,
    SecondReleaseError,
    SecondReservationError,
    WrongGenesisError,
    WrongTotalError,
)
from common.privacy.rules import check_charge, check_content, check_genesis, check_link


def check_end(genesis: Entry, entries: Sequence[Entry]) -> Genesis:
    """Whether consecutive entries may be the end of the chain that begins with this genesis, as far as they tell.

    Totals, reservations and heads of a gap before them are unknown; all else is held against the rules of a chain.

    Returns:
        The genesis' body.

    Raises:
        ReceiptError: its subclass names the first fault.
    """
    body = check_genesis(genesis)
    if entries and entries[0].seq <= 1:  # no gap
        Chain.begin(genesis).extended(entries)
        return body
    end = _End(genesis, body)
    for entry in entries:
        end.add(entry)
    return body


class _End:
    """The end of a chain, whose middle is not at hand: what was reserved there may be released or burnt here, once."""

    def __init__(self, first: Entry, genesis: Genesis) -> None:
        self._first, self.genesis = first, genesis
        self._hashes = {first.seq: first.hash}
        self._previous: Entry | None = None
        self._reserves: dict[str, Reserve] = {}
        self._outcomes: dict[str, Release | Burnt] = {}
        self._requests: set[tuple[str, int, int]] = set()
        self._spent: int | None = None
        self._day, self._closed = genesis.day, False

    def add(self, entry: Entry) -> None:
        """Raises `ReceiptError` where an entry cannot stand after those that were added."""
        if entry.key_id != self._first.key_id:
            raise KeyMismatchError(f"entry {entry.seq} names another key than its genesis")
        entry.check_signature(self.genesis.public_key)
        if self._previous is not None:
            check_link(entry, self._previous)
        if self._closed and not isinstance(entry.body, Anchor):
            raise AfterCloseError(f"entry {entry.seq} ({entry.kind}) stands after the site's withdrawal")
        self._admit(entry)
        self._previous, self._hashes[entry.seq] = entry, entry.hash

    def _admit(self, entry: Entry) -> None:
        match body := entry.body:
            case Genesis():
                raise SecondGenesisError("a ledger has one genesis, and its budget does not reset")
            case Reserve():
                self._not_before(body.day)
                self._reserve(entry, body)
            case Release() | Burnt():
                self._settle(body)
            case Anchor():
                body.over(entry.key_id).check()
                # What stands in the gap cannot be told; what comes after cannot have been countersigned.
                if body.seq >= entry.seq or self._hashes.get(body.seq, body.head) != body.head:
                    raise ForkError(f"a server countersigned another entry {body.seq} than this chain holds")
            case Close():
                self._not_before(body.day)
                if set(self._reserves) - set(self._outcomes):
                    raise OpenReservationError("a ledger closes when every reservation is released or burnt")
                if self._spent is not None and body.spent != self._spent:
                    raise WrongTotalError(f"closed at {body.spent}, but {self._spent} were charged")
                self._closed = True

    def _reserve(self, entry: Entry, body: Reserve) -> None:
        if body.genesis != self._first.hash:
            raise WrongGenesisError("the reservation refers to another genesis")
        request = (body.run, body.round, body.attempt)
        if request in self._requests:
            raise SecondReservationError(
                f"run {body.run} round {body.round} attempt {body.attempt} is reserved"
            )
        check_charge(body, self.genesis)
        if self._spent is not None and body.spent != self._spent + body.charge:
            raise WrongTotalError(f"the total is said to be {body.spent}, but is {self._spent + body.charge}")
        self._spent, self._reserves[entry.hash] = body.spent, body
        self._requests.add(request)

    def _settle(self, body: Release | Burnt) -> None:
        match self._outcomes.get(body.reservation):
            case Burnt():
                raise BurntReservationError("nothing comes of a reservation that was burnt")
            case Release() if isinstance(body, Release):
                raise SecondReleaseError("a second release on one reservation")
            case Release():
                raise ReleasedReservationError("a reservation that was released cannot burn")
        reserve = self._reserves.get(body.reservation)
        if isinstance(body, Release) and reserve is not None:
            check_content(body, reserve)
        self._outcomes[body.reservation] = body

    def _not_before(self, day: str) -> None:
        if day < self._day:
            raise ClockBackwardsError(f"{day} comes after {self._day}")
        self._day = day
