"""Whether a sequence of signed entries is a ledger: order, hashes, signatures, charges, cap, and anchors.

A site verifies its own ledger with this, a server each segment that extends what it holds, an auditor the
whole. Entries by themselves are in `entries.py`, what holds between a few of them in `rules.py`, the receipt
that travels in `receipts.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from common.privacy.entries import Anchor, Burnt, Close, Entry, Genesis, Release, Reserve
from common.privacy.equivocation import EquivocationProof
from common.privacy.faults import (
    AfterCloseError,
    BurntReservationError,
    ClockBackwardsError,
    DetachedSegmentError,
    EmptyChainError,
    ForkError,
    KeyMismatchError,
    MissingReservationError,
    OpenReservationError,
    OverCapError,
    ReleasedReservationError,
    SecondGenesisError,
    SecondReleaseError,
    SecondReservationError,
    TruncatedError,
    UnknownKeyError,
    WrongGenesisError,
    WrongTotalError,
)
from common.privacy.renyi import RenyiFilter
from common.privacy.rules import check_amount, check_content, check_genesis, check_link
from common.privacy.spending import Spending, spending


@dataclass(frozen=True, slots=True)
class ChainReport:
    """What a verified chain comes to. Amounts in nano-units of Renyi divergence at the genesis' order."""

    key_id: str
    genesis: Genesis
    seq: int
    head: str
    cap: int
    spent: int
    reserved: int
    released: int
    burnt: int
    open: int
    anchors: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Chain:
    """A verified chain. Values, not to be changed: `extended` gives a longer one and leaves this as it is.

    Attributes:
        entries: all of them, by sequence number.
        genesis: the body of the first.
        filter: cap and charges so far.
        reservations: RESERVE entries by hash.
        outcomes: hash of a reservation -> its RELEASE or BURNT entry.
    """

    entries: list[Entry]
    genesis: Genesis
    filter: RenyiFilter
    reservations: dict[str, Entry] = field(default_factory=dict)
    outcomes: dict[str, Entry] = field(default_factory=dict)
    _keys: set[tuple[str, int, int]] = field(default_factory=set)
    _day: str = ""
    closed: bool = False

    @classmethod
    def begin(cls, genesis: Entry, *, key_id: str | None = None) -> Chain:
        """A chain of one entry; `key_id`, where given, is the only key that is accepted.

        Raises:
            ReceiptError: see `check_genesis`; `UnknownKeyError` for another key.
        """
        body = check_genesis(genesis)
        if key_id is not None and genesis.key_id != key_id:
            raise UnknownKeyError("the chain's key is not the one enrolled")
        return cls([genesis], body, RenyiFilter(body.order, body.cap), _day=body.day)

    @property
    def key_id(self) -> str:
        """Id of the key that signs this chain."""
        return self.entries[0].key_id

    @property
    def head(self) -> Entry:
        """The last entry."""
        return self.entries[-1]

    def extended(self, entries: Iterable[Entry]) -> Chain:
        """The chain with a segment added, which may repeat a part that is held already.

        Raises:
            DetachedSegmentError: the segment begins after the head's successor.
            ForkError: it contradicts an entry held; `.proof` shows the equivocation to anyone.
            ReceiptError: any other fault of an entry or of its place.
        """
        builder = _Builder(self)
        for entry in entries:
            builder.add(entry)
        return builder.chain()

    def check_heads(self, anchored_heads: Mapping[int, str]) -> None:
        """Whether the chain holds the heads that were anchored: sequence number -> hash.

        Raises:
            TruncatedError: it ends before one of them.
            ForkError: it holds another entry there.
        """
        for seq, head in sorted(anchored_heads.items()):
            if seq >= len(self.entries):
                raise TruncatedError(f"head {seq} was anchored, but the chain ends at {self.head.seq}")
            if self.entries[seq].hash != head:
                raise ForkError(f"entry {seq} is not the one that was anchored: history was rewritten")

    def spending(self, until: int | None = None) -> Spending:
        """What all charges in it come to in epsilon, over all runs.

        Args:
            until: the last entry that counts; None: all of them.

        Raises:
            ContradictionError: the charges do not add up to what is spent.
        """
        reserves = [
            entry.body
            for entry in self.reservations.values()
            if isinstance(entry.body, Reserve) and (until is None or entry.seq <= until)
        ]
        spent = self.filter.spent if until is None else max((body.spent for body in reserves), default=0)
        return spending(self.genesis, reserves, spent)

    def report(self) -> ChainReport:
        """What the chain comes to."""
        burnt = sum(isinstance(entry.body, Burnt) for entry in self.outcomes.values())
        return ChainReport(
            key_id=self.key_id,
            genesis=self.genesis,
            seq=self.head.seq,
            head=self.head.hash,
            cap=self.filter.cap,
            spent=self.filter.spent,
            reserved=len(self.reservations),
            released=len(self.outcomes) - burnt,
            burnt=burnt,
            open=len(self.reservations) - len(self.outcomes),
            anchors=sum(isinstance(entry.body, Anchor) for entry in self.entries),
            closed=self.closed,
        )


class _Builder:
    """Adds entries to a copy of a chain, so that a segment with a fault leaves the chain as it was."""

    def __init__(self, chain: Chain) -> None:
        self.entries, self.genesis, self.filter = list(chain.entries), chain.genesis, chain.filter
        self.reservations, self.outcomes = dict(chain.reservations), dict(chain.outcomes)
        self.keys, self.day, self.closed = set(chain._keys), chain._day, chain.closed
        self.start = len(chain.entries)
        self.previous: Entry | None = None

    def chain(self) -> Chain:
        return Chain(
            self.entries,
            self.genesis,
            self.filter,
            self.reservations,
            self.outcomes,
            self.keys,
            self.day,
            self.closed,
        )

    def add(self, entry: Entry) -> None:
        if entry.key_id != self.entries[0].key_id:
            raise KeyMismatchError(f"entry {entry.seq} names another key than its chain's")
        entry.check_signature(self.genesis.public_key)
        if self.previous is not None:
            check_link(entry, self.previous)
        self.previous = entry
        if entry.seq < self.start:
            held = self.entries[entry.seq]
            if held.hash != entry.hash:
                raise ForkError(f"two entries {entry.seq} are signed", proof=EquivocationProof(held, entry))
            return
        if entry.seq > self.entries[-1].seq + 1 and len(self.entries) == self.start:
            raise DetachedSegmentError(f"entry {entry.seq} does not follow head {self.entries[-1].seq}")
        check_link(entry, self.entries[-1])
        self._admit(entry)
        self.entries.append(entry)

    def _admit(self, entry: Entry) -> None:
        body = entry.body
        if self.closed and not isinstance(body, Anchor):
            raise AfterCloseError(f"entry {entry.seq} ({entry.kind}) stands after the site's withdrawal")
        match body:
            case Genesis():
                raise SecondGenesisError("a ledger has one genesis, and its budget does not reset")
            case Reserve():
                self._not_before(body.day)
                self._reserve(entry, body)
            case Release():
                reserve = self._reservation(body.reservation)
                outcome = self.outcomes.get(body.reservation)
                if outcome is not None:
                    if isinstance(outcome.body, Burnt):
                        raise BurntReservationError("a release on a reservation that was burnt")
                    raise SecondReleaseError("a second release on one reservation")
                check_content(body, reserve)
                self.outcomes[body.reservation] = entry
            case Burnt():
                self._reservation(body.reservation)
                outcome = self.outcomes.get(body.reservation)
                if outcome is not None:
                    if isinstance(outcome.body, Burnt):
                        raise BurntReservationError("a reservation burns once")
                    raise ReleasedReservationError("a reservation that was released cannot burn")
                self.outcomes[body.reservation] = entry
            case Anchor():
                body.over(entry.key_id).check()
                if body.seq >= len(self.entries) or self.entries[body.seq].hash != body.head:
                    raise ForkError(f"a server countersigned another entry {body.seq} than this chain holds")
            case Close():
                self._not_before(body.day)
                if len(self.outcomes) != len(self.reservations):
                    raise OpenReservationError("a ledger closes when every reservation is released or burnt")
                if body.spent != self.filter.spent:
                    raise WrongTotalError(f"closed at {body.spent}, but {self.filter.spent} were charged")
                self.closed = True

    def _not_before(self, day: str) -> None:
        if day < self.day:
            raise ClockBackwardsError(f"{day} comes after {self.day}")
        self.day = day

    def _reservation(self, reservation: str) -> Reserve:
        entry = self.reservations.get(reservation)
        if entry is None or not isinstance(entry.body, Reserve):
            raise MissingReservationError("there is no such reservation in this chain")
        return entry.body

    def _reserve(self, entry: Entry, body: Reserve) -> None:
        if body.genesis != self.entries[0].hash:
            raise WrongGenesisError("the reservation refers to another genesis")
        key = (body.run, body.round, body.attempt)
        if key in self.keys:
            raise SecondReservationError(
                f"run {body.run} round {body.round} attempt {body.attempt} is reserved"
            )
        check_amount(body, self.genesis)
        if not self.filter.fits(body.charge):
            raise OverCapError(
                f"a charge of {body.charge} does not fit: {self.filter.cap - self.filter.spent} are left"
            )
        self.filter = self.filter.charged(body.charge)
        if body.spent != self.filter.spent:
            raise WrongTotalError(f"the total is said to be {body.spent}, but is {self.filter.spent}")
        self.keys.add(key)
        self.reservations[entry.hash] = entry


def verified_chain(
    entries: Sequence[Entry],
    *,
    anchored_heads: Mapping[int, str] | None = None,
    key_id: str | None = None,
) -> Chain:
    """The chain that these entries are, from the genesis on.

    Args:
        entries: in order.
        anchored_heads: sequence number -> hash, as a server or an auditor holds them.
        key_id: the enrolled key, where there is one.

    Raises:
        ReceiptError: its subclass names the first fault.
    """
    if not entries:
        raise EmptyChainError("there are no entries")
    chain = Chain.begin(entries[0], key_id=key_id).extended(entries)
    chain.check_heads(anchored_heads or {})
    return chain


def verify_chain(
    entries: Sequence[Entry],
    *,
    anchored_heads: Mapping[int, str] | None = None,
    key_id: str | None = None,
) -> ChainReport:
    """`verified_chain`, as a report."""
    return verified_chain(entries, anchored_heads=anchored_heads, key_id=key_id).report()
