"""What must hold within a genesis, a reservation, and between two entries, whoever looks and however little
else they hold. Whether a whole sequence is a ledger is in `chain.py`.
"""

from __future__ import annotations

from common.privacy.entries import NO_PREVIOUS, Entry, Genesis, Release, Reserve, key_id_of
from common.privacy.faults import (
    KeyMismatchError,
    MissingGenesisError,
    OverCapError,
    SequenceGapError,
    SequenceRepeatedError,
    WrongCapError,
    WrongChargeError,
    WrongContentError,
    WrongPreviousHashError,
    WrongTotalError,
)
from common.privacy.mechanisms import GaussianSum
from common.privacy.renyi import cap_of, charge_of, least_charge


def check_amount(reserve: Reserve, genesis: Genesis) -> None:
    """Whether a reservation charges what it must: anyone can tell from these two alone.

    That is `charge_at`; in ledgers from before there was a least charge it is `charge_of`, which still covers what
    the event costs. Nothing else is accepted, neither below nor between nor above.

    Raises:
        WrongChargeError.
    """
    exact = charge_of(reserve.event, genesis.order)
    due = max(exact, least_charge(genesis.cap))
    if reserve.charge not in (due, exact):
        raise WrongChargeError(f"the charge is {reserve.charge}, but the event is charged {due}")


def check_genesis(entry: Entry) -> Genesis:
    """The body of a valid first entry.

    Raises:
        ReceiptError: not a genesis, of another key, badly signed, or with a cap that its goal does not imply.
    """
    if not isinstance(entry.body, Genesis) or entry.seq != 0:
        raise MissingGenesisError("a ledger begins with its genesis at sequence number 0")
    genesis = entry.body
    if entry.key_id != key_id_of(genesis.public_key):
        raise KeyMismatchError("the genesis is signed by another key than it declares")
    entry.check_signature(genesis.public_key)
    if entry.prev != NO_PREVIOUS:
        raise WrongPreviousHashError("nothing may stand before the genesis")
    cap = cap_of(genesis.epsilon, genesis.delta, genesis.order)
    if genesis.cap != cap:
        raise WrongCapError(f"the cap is {genesis.cap}, but epsilon, delta and order imply {cap}")
    return genesis


def check_charge(reserve: Reserve, genesis: Genesis) -> None:
    """Whether a reservation, read alone with its genesis, charges what it must and stays under the cap.

    Raises:
        WrongChargeError, OverCapError, WrongTotalError.
    """
    check_amount(reserve, genesis)
    if reserve.spent < reserve.charge:
        raise WrongTotalError("the running total is less than the charge itself")
    if reserve.spent > genesis.cap:
        raise OverCapError(f"{reserve.spent} nano-units are charged, but the cap is {genesis.cap}")


def check_link(entry: Entry, previous: Entry) -> None:
    """Whether an entry follows another in sequence and by hash.

    Raises:
        SequenceRepeatedError, SequenceGapError, WrongPreviousHashError.
    """
    if entry.seq <= previous.seq:
        raise SequenceRepeatedError(f"entry {entry.seq} comes after entry {previous.seq}")
    if entry.seq > previous.seq + 1:
        raise SequenceGapError(f"entry {entry.seq} comes after entry {previous.seq}")
    if entry.prev != previous.hash:
        raise WrongPreviousHashError(f"entry {entry.seq} follows another entry {previous.seq} than this one")


def check_content(release: Release, reserve: Reserve) -> None:
    """Whether the mechanism reserved covers the content released: sums for figures, DP-SGD for updates.

    Raises:
        WrongContentError.
    """
    if isinstance(reserve.event, GaussianSum) == (release.content == "update"):
        raise WrongContentError(f"{reserve.event.kind} was reserved, which does not cover {release.content}")
