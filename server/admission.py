"""Which updates may be aggregated, and why not: schema, key, chain, request, digest, values and bounds, in turn.

A plain function of an answer and what the server holds. What is not admitted is never added to anything, and
whatever a reply holds, the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from flwr.app import RecordDict

from common.config import Precision
from common.precision import EncodingError, check_form, decoded
from common.privacy.chain import Chain
from common.privacy.faults import ForkError, ReceiptError, WrongRequestError
from common.privacy.receipts import Receipt, Request, check_receipt
from common.wire import Refusal, State, Update, WireError, answer_from_records
from server.registry import Registry


@dataclass(frozen=True)
class Admitted:
    """An update that may be aggregated, and its site's chain extended by the receipt.

    Attributes:
        state: float32.
        data: the same as it travelled, which is what the receipt is over.
    """

    site: str
    key_id: str
    state: State
    data: bytes
    chain: Chain
    receipt: Receipt


@dataclass(frozen=True)
class LeftOut:
    """An answer that is not aggregated.

    Attributes:
        reason: one word, for records and metrics: a fault's (`privacy/faults.py`), a refusal's, or one of ours.
        explanation: one line, of the server's own making; nothing that a site wrote.
        refused: whether the site itself said no.
        site: the name that the receipt's key is enrolled under: whose it claims to be. Anyone may send a copy of
            another's receipt, so of a fault it proves nothing; only a proof of equivocation bars a site.
    """

    reason: str
    explanation: str
    refused: bool = False
    site: str | None = None


@dataclass(frozen=True)
class Expectation:
    """What the server asked for in this round.

    Attributes:
        request: the fields that a reservation must repeat.
        shapes: name -> shape of every tensor of an update.
        norm_bound: the largest L2 norm that an update may have; it bounds nonsense, and protects nobody's privacy.
        event: the canonical fields of the event that must have been charged.
        clip_norm, normaliser, learning_rate: what the receipt must state of the mechanism.
        content: what the receipt must say was released: "update", "statistics" or "metrics".
        precision: how the update's numbers travel.
    """

    request: Request
    shapes: Mapping[str, tuple[int, ...]]
    norm_bound: float
    event: object
    clip_norm: float
    normaliser: float
    learning_rate: float | None
    content: str = "update"
    precision: Precision = "float32"

    def of(self, nonce: str) -> Expectation:
        """The same, asked with another nonce."""
        return replace(self, request=replace(self.request, nonce=nonce))


def admit(
    content: RecordDict, expected: Expectation, registry: Registry, taken: Collection[str]
) -> Admitted | LeftOut:
    """Decides on one answer. Nothing in an answer makes this raise; a registry that cannot be read does.

    Args:
        content: of the reply, as received.
        expected: what was asked for.
        registry: keys, chains and anchored heads.
        taken: key ids whose updates were admitted in this round already.
    """
    answer = _read(content)
    if isinstance(answer, LeftOut):
        return answer
    update, receipt = answer
    site = registry.site(receipt.genesis.key_id)
    if site is None:
        return LeftOut("not_enrolled", "the receipt's key is not enrolled")
    if site.barred:
        return LeftOut("barred", "the site signed two histories of its ledger", site=site.name)
    if site.out:
        return LeftOut(site.out, f"the server's owner has {site.out} the site", site=site.name)
    if site.key_id in taken:
        return LeftOut(
            "second_update", "the site's update of this round was admitted already", site=site.name
        )
    held = registry.chain(site.key_id)
    checked = _check(update, receipt, expected, held)
    if isinstance(checked, ForkError) and checked.proof is not None:
        registry.bar(site.key_id, checked.proof)
    if isinstance(checked, Exception):
        return _fault(checked, site.name)
    if isinstance(checked, LeftOut):
        return replace(checked, site=site.name)
    chain, state = checked
    return Admitted(
        site=site.name, key_id=site.key_id, state=state, data=update.data, chain=chain, receipt=receipt
    )


def _read(content: RecordDict) -> tuple[Update, Receipt] | LeftOut:
    """The update and its receipt, by their form alone; what a stranger sent may fail in any way whatever."""
    try:
        answer = answer_from_records(content)
        if isinstance(answer, Refusal):
            return LeftOut(answer.reason.value, "the site refused", refused=True)
        return answer, Receipt.from_bytes(answer.receipt)
    except WireError as error:
        return LeftOut("malformed", str(error))
    except Exception as error:
        return _fault(error)


def _check(
    update: Update, receipt: Receipt, expected: Expectation, held: Chain
) -> tuple[Chain, State] | LeftOut | Exception:
    """The chain with the receipt, and the update decoded, or why not. Looks at what was sent, touches nothing."""
    try:
        chain = check_receipt(receipt, update.data, expected.request, held)
        if fault := _mechanism_fault(receipt, expected):
            return fault
        check_form(update.state, expected.shapes, expected.precision)
        state = decoded(update.state)
        return _value_fault(state, expected) or (chain, state)
    except EncodingError as error:  # in words of our own
        return LeftOut(error.reason, str(error))
    except Exception as error:
        return error


def _mechanism_fault(receipt: Receipt, expected: Expectation) -> LeftOut | None:
    reserve = receipt.reserve
    stated = {
        "mechanism": (reserve.event, expected.event),
        "clip norm": (reserve.clip_norm, expected.clip_norm),
        "normaliser": (reserve.normaliser, expected.normaliser),
        "learning rate": (reserve.learning_rate, expected.learning_rate),
        "content": (receipt.release.content, expected.content),
    }
    odd = [name for name, (said, asked) in stated.items() if said != asked]
    if odd:
        return LeftOut("wrong_mechanism", f"the receipt states another {', '.join(odd)} than the plan")
    return None


def _value_fault(state: State, expected: Expectation) -> LeftOut | None:
    values = torch.cat([tensor.flatten() for tensor in state.values()]).double()
    if not bool(values.isfinite().all()):
        return LeftOut("not_finite", "the update holds values that are not finite")
    norm = float(values.norm())
    if norm == 0.0:
        return LeftOut("all_zero", "the update is zero everywhere, which noise never is")
    if norm > expected.norm_bound:
        return LeftOut("over_norm", f"the update's norm is above the bound of {expected.norm_bound:g}")
    return None


def _fault(error: Exception, site: str | None = None) -> LeftOut:
    """A fault in the server's own words: messages of errors may quote what the site wrote."""
    if isinstance(error, WrongRequestError):  # names fields of the request, and nothing of the reply's
        return LeftOut(error.reason, str(error), site=site)
    if isinstance(error, ReceiptError):
        said = (type(error).__doc__ or "").split("\n\n")[0]
        return LeftOut(error.reason, " ".join(said.split()), site=site)
    return LeftOut("malformed", f"the reply cannot be read ({type(error).__name__})", site=site)
