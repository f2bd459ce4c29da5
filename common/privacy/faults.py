"""Why a receipt, an entry or a ledger is refused: one error for each fault, each with a short machine name.

The names (`reason`) go into a run's record, and never change their meaning. Messages name public values
only: nothing in an entry depends on a user's data, so nothing in a message does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from common.privacy.equivocation import EquivocationProof


class ReceiptError(ValueError):
    """What was received does not verify. `reason` is the fault's machine name."""

    reason: ClassVar[str] = "refused"


# --- one entry by itself


class MalformedEntryError(ReceiptError):
    """A field is missing, unknown, or of another type."""

    reason = "malformed_entry"


class UnknownFormatError(ReceiptError):
    """Another format, or another version of it."""

    reason = "unknown_format"


class UnknownKindError(ReceiptError):
    """A kind of entry that this version does not understand."""

    reason = "unknown_kind"


class BadFieldError(ReceiptError):
    """A value out of its bounds, or not in its canonical spelling."""

    reason = "bad_field"


class UnknownEventError(ReceiptError):
    """An event of an unknown mechanism, or with missing or unknown fields."""

    reason = "unknown_mechanism"


class BadEventError(ReceiptError):
    """An event of a known mechanism with a number out of bounds."""

    reason = "bad_event"


class WrongUnitError(ReceiptError):
    """The privacy unit is not one user."""

    reason = "wrong_unit"


class WrongAdjacencyError(ReceiptError):
    """The adjacency is not add-or-remove-one; its epsilons compare with no one else's here."""

    reason = "wrong_adjacency"


class KeyMismatchError(ReceiptError):
    """An entry names another key than its chain's."""

    reason = "key_mismatch"


class UnknownKeyError(ReceiptError):
    """The chain's key is not the one that was enrolled."""

    reason = "unknown_key"


class BadSignatureError(ReceiptError):
    """The signature is not the named key's over this entry."""

    reason = "bad_signature"


# --- the order of entries


class EmptyChainError(ReceiptError):
    """No entries at all."""

    reason = "empty"


class MissingGenesisError(ReceiptError):
    """A chain that does not begin with its genesis."""

    reason = "missing_genesis"


class SecondGenesisError(ReceiptError):
    """A genesis after the beginning: budgets do not reset."""

    reason = "second_genesis"


class SequenceGapError(ReceiptError):
    """A sequence number is left out."""

    reason = "sequence_gap"


class SequenceRepeatedError(ReceiptError):
    """A sequence number comes again."""

    reason = "sequence_repeated"


class WrongPreviousHashError(ReceiptError):
    """The entry does not follow the one before it."""

    reason = "wrong_previous_hash"


class ClockBackwardsError(ReceiptError):
    """A date before that of an earlier entry."""

    reason = "clock_backwards"


class AfterCloseError(ReceiptError):
    """Something other than an anchor follows the site's withdrawal."""

    reason = "after_close"


# --- what was charged, and what for


class WrongCapError(ReceiptError):
    """The genesis' cap is not what its epsilon, delta and order imply."""

    reason = "wrong_cap"


class WrongChargeError(ReceiptError):
    """The charge is not what the event costs."""

    reason = "wrong_charge"


class WrongTotalError(ReceiptError):
    """The running total is not the sum of the charges."""

    reason = "wrong_total"


class OverCapError(ReceiptError):
    """More is charged than the cap admits."""

    reason = "over_cap"


class WrongGenesisError(ReceiptError):
    """A reservation refers to another genesis than its chain's."""

    reason = "wrong_genesis"


class SecondReservationError(ReceiptError):
    """The same run, round and attempt is reserved twice."""

    reason = "second_reservation"


class MissingReservationError(ReceiptError):
    """A release or a burn without its reservation."""

    reason = "missing_reservation"


class SecondReleaseError(ReceiptError):
    """A second release on one reservation."""

    reason = "second_release"


class BurntReservationError(ReceiptError):
    """A release on a reservation that was burnt, or a burn of one that was burnt."""

    reason = "burnt_reservation"


class ReleasedReservationError(ReceiptError):
    """A burn of a reservation that was released."""

    reason = "released_reservation"


class WrongContentError(ReceiptError):
    """A release whose content its reservation's mechanism does not cover."""

    reason = "wrong_content"


class OpenReservationError(ReceiptError):
    """The ledger is closed while a reservation is neither released nor burnt."""

    reason = "open_reservation"


# --- against what others hold


class ForkError(ReceiptError):
    """The chain contradicts a head that was anchored, or an entry that was seen: history was rewritten.

    `proof`, where both entries are at hand, convinces anyone who has the site's public key.
    """

    reason = "fork"

    def __init__(self, message: str, *, proof: EquivocationProof | None = None) -> None:
        super().__init__(message)
        self.proof = proof


class TruncatedError(ReceiptError):
    """The chain ends before a head that was anchored."""

    reason = "truncated"


class DetachedSegmentError(ReceiptError):
    """A segment begins after the head it should extend: entries in between are withheld."""

    reason = "detached_segment"


class BadAnchorError(ReceiptError):
    """A countersignature that is not the named server key's over this head."""

    reason = "bad_anchor"


class NoEquivocationError(ReceiptError):
    """What is offered as a proof of equivocation proves none."""

    reason = "no_equivocation"


# --- against the update, and against what the server asked for


class WrongDigestError(ReceiptError):
    """The update's bytes are not those that were released."""

    reason = "wrong_digest"


class MissingReleaseError(ReceiptError):
    """A receipt that does not end in a release."""

    reason = "missing_release"


class WrongRequestError(ReceiptError):
    """A receipt for another run, round, attempt, nonce, plan or model: a replay."""

    reason = "wrong_request"


# --- of a withdrawal's certificate


class MissingCloseError(ReceiptError):
    """A certificate that does not end in a CLOSE."""

    reason = "missing_close"


class WrongWordsError(ReceiptError):
    """A certificate whose words say something else than what was signed."""

    reason = "wrong_words"
