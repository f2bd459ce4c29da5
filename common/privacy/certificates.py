"""The certificate of a withdrawal: the end of a site's chain, and beside it what that says in words.

The words are made from the signed part and never trusted: a file in which they differ is refused. What a
certificate proves alone is what the site signed; that it extends what a server saw needs that server's copy of the
chain (`simulations/audit/certificate.py`).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from common.privacy.canonical import TooLongError, Value, decode_any_spelling, encode
from common.privacy.chain_end import check_end
from common.privacy.enrolment import fingerprint
from common.privacy.entries import Close, Entry, Genesis
from common.privacy.faults import (
    MalformedEntryError,
    MissingCloseError,
    OverCapError,
    UnknownFormatError,
    WrongWordsError,
)
from common.privacy.fields import exactly
from common.privacy.mechanisms import number_to_text
from common.privacy.renyi import NANO, renyi_to_epsilon

FORMAT = "fedtide/certificate/1"
LONGEST_CERTIFICATE = 1 << 25


@dataclass(frozen=True, slots=True)
class ClosingCertificate:
    """The site's signed word that its ledger is closed, with what it spent in all.

    Attributes:
        genesis: the ledger's first entry.
        entries: consecutive entries of its chain, the last of which is the CLOSE: from the successor of a head that
            every server which countersigned one holds, so that each can join them to its copy. In certificates
            from before there was a format: the CLOSE alone.
    """

    genesis: Entry
    entries: tuple[Entry, ...]

    @property
    def close(self) -> Close:
        """The closing entry's body.

        Raises:
            MissingCloseError: the last entry is no CLOSE.
        """
        if not self.entries or not isinstance(body := self.entries[-1].body, Close):
            raise MissingCloseError("a closing certificate ends in a CLOSE entry")
        return body

    def verify(self) -> Close:
        """The closing entry, after all that can be told from the certificate alone: form, signatures, order, charges.

        Raises:
            ReceiptError: its subclass names the first fault.
        """
        close, genesis = self.close, check_end(self.genesis, self.entries)
        if close.spent > genesis.cap:
            raise OverCapError(f"{close.spent} nano-units were charged, but the cap is {genesis.cap}")
        return close

    def epsilon_bound(self) -> float:
        """What the amount spent comes to for one user at the genesis' delta, by the ledger's own filter.

        A filter is proven for its cap; the amount that happens to be spent is a bound only if it was fixed in advance.
        0 where nothing was charged; else rounded up to four decimals, and never above the epsilon promised.
        """
        genesis, spent = self._genesis, self.close.spent
        if not spent:
            return 0.0
        bound = renyi_to_epsilon(spent / NANO, genesis.delta, genesis.order)
        return min(math.ceil(bound * 10_000) / 10_000, genesis.epsilon)

    def in_words(self) -> list[str]:
        """What the signed part says, in plain English. Its wording belongs to `FORMAT`: another needs another number.

        Raises:
            ReceiptError: there is no genesis, or no CLOSE.
        """
        genesis, close = self._genesis, self.close
        share = f"{close.spent / genesis.cap:.1%}" if genesis.cap else "all"
        delta = number_to_text(genesis.delta)
        return [
            f"The site withdrew on {close.day} (UTC): its ledger, begun on {genesis.day}, is closed, and nothing more "
            "may be charged or released on it. What was released before stays released.",
            f"It spent {close.spent} of {genesis.cap} nano-units of Renyi divergence at order {genesis.order} "
            f"({share} of its budget).",
            "If the site did what it signed, what was released about any one user of it, with all of that user's "
            f"events, is within epsilon {number_to_text(genesis.epsilon)} at delta {delta} (add or remove one user), "
            "whatever was asked for: that was promised when the ledger began. The amount spent comes to epsilon "
            f"{number_to_text(self.epsilon_bound())}, which is a bound only if that amount was fixed in advance.",
            f"Signed by the ledger's key, whose id is {fingerprint(self.genesis.key_id)}. Compare it with the key that "
            "was enrolled.",
            "These sentences are made from the signed part and are not signed themselves: fedtide audit certificate "
            "FILE checks both, and docs/formats.md says how another program verifies the signed part.",
        ]

    @property
    def _genesis(self) -> Genesis:
        if not isinstance(body := self.genesis.body, Genesis):
            raise MalformedEntryError("a closing certificate begins with a GENESIS entry")
        return body

    def to_bytes(self) -> bytes:
        """The file: indented JSON, the words first.

        Raises:
            ReceiptError: it is no certificate, or longer than one may be.
        """
        value: Value = {
            "format": FORMAT,
            "in_words": list[Value](self.in_words()),
            "signed": {
                "entries": [entry.to_fields() for entry in self.entries],
                "genesis": self.genesis.to_fields(),
            },
        }
        encode(value, longest=LONGEST_CERTIFICATE)  # refuses what has no canonical form
        data = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("ascii")
        if len(data) > LONGEST_CERTIFICATE:
            raise TooLongError(f"{len(data)} bytes, but at most {LONGEST_CERTIFICATE} are allowed")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> ClosingCertificate:
        """The certificate in a file, of this format or from before there was one. Its signatures are not verified here.

        Blanks and the order of keys are free, since entries are verified over their canonical form.

        Raises:
            ReceiptError: its subclass names the fault; `WrongWordsError` where the words say something else than
                what was signed.
        """
        found = decode_any_spelling(data, longest=LONGEST_CERTIFICATE)
        if isinstance(found, dict) and set(found) == {"close", "genesis"}:
            return cls(Entry.from_fields(found["genesis"]), (Entry.from_fields(found["close"]),))
        if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
            raise UnknownFormatError(f"this version understands {FORMAT} only")
        fields = exactly(found, {"format", "in_words", "signed"})
        signed = exactly(fields["signed"], {"entries", "genesis"})
        if not isinstance(signed["entries"], list):
            raise MalformedEntryError("the entries of a certificate must be a list")
        entries = tuple(Entry.from_fields(entry) for entry in signed["entries"])
        certificate = cls(Entry.from_fields(signed["genesis"]), entries)
        if fields["in_words"] != certificate.in_words():
            raise WrongWordsError(
                "the words are not those that the signed part comes to: do not believe them"
            )
        return certificate
