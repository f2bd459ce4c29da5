"""Which updates may be aggregated, and why not: schema, key, chain, request, digest, values and bounds, in turn.

A plain function of an answer and what the server holds. What is not admitted is never added to anything.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from flwr.app import RecordDict

from common.privacy.chain import Chain
from common.privacy.faults import ForkError, ReceiptError
from common.privacy.receipts import Receipt, Request, check_receipt
from common.wire import Refusal, State, Update, WireError, answer_from_records, state_to_bytes
from server.registry import Registry, RegistryError


@dataclass(frozen=True)
class Admitted:
    """An update that may be aggregated, and its site's chain extended by the receipt."""

    site: str
    key_id: str
    state: State
    chain: Chain
    receipt: Receipt


@dataclass(frozen=True)
class LeftOut:
    """An answer that is not aggregated.

    Attributes:
        reason: one word, for records and metrics.
        explanation: one line, of the server's own making; nothing that a site wrote.
        refused: whether the site itself said no.
        site: its name, where a verified key tells it.
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
    """

    request: Request
    shapes: Mapping[str, tuple[int, ...]]
    norm_bound: float
    event: object
    clip_norm: float
    normaliser: float
    learning_rate: float | None


def admit(
    content: RecordDict, expected: Expectation, registry: Registry, taken: Collection[str]
) -> Admitted | LeftOut:
    """Decides on one answer.

    Args:
        content: of the reply, as received.
        expected: what was asked for.
        registry: keys, chains and anchored heads.
        taken: key ids whose updates were admitted in this round already.
    """
    try:
        answer = answer_from_records(content)
    except WireError as error:
        return LeftOut("malformed", str(error))
    if isinstance(answer, Refusal):
        return LeftOut(answer.reason.value, "the site refused", refused=True)
    try:
        receipt = Receipt.from_bytes(answer.receipt)
    except ReceiptError as error:
        return _fault(error)
    site = registry.site(receipt.genesis.key_id)
    if site is None:
        return LeftOut("not-enrolled", "the receipt's key is not enrolled")
    if site.barred:
        return LeftOut("barred", "the site signed two histories of its ledger", site=site.name)
    if site.key_id in taken:
        return LeftOut(
            "second-update", "the site's update of this round was admitted already", site=site.name
        )
    try:
        held = registry.chain(site.key_id)
        chain = check_receipt(receipt, state_to_bytes(answer.state), expected.request, held)
    except ForkError as error:
        if error.proof is not None:
            registry.bar(site.key_id, error.proof)
        return _fault(error, site.name)
    except (ReceiptError, RegistryError) as error:
        return _fault(error, site.name)
    fault = _mechanism_fault(receipt, expected) or _value_fault(answer, expected)
    if fault is not None:
        return LeftOut(*fault, site=site.name)
    return Admitted(site=site.name, key_id=site.key_id, state=answer.state, chain=chain, receipt=receipt)


def _mechanism_fault(receipt: Receipt, expected: Expectation) -> tuple[str, str] | None:
    reserve = receipt.reserve
    stated = (reserve.event, reserve.clip_norm, reserve.normaliser, reserve.learning_rate)
    asked = (expected.event, expected.clip_norm, expected.normaliser, expected.learning_rate)
    if stated != asked:
        return "wrong-mechanism", "the receipt states another mechanism than the plan's"
    return None


def _value_fault(update: Update, expected: Expectation) -> tuple[str, str] | None:
    shapes = {name: tuple(tensor.shape) for name, tensor in update.state.items()}
    if shapes != dict(expected.shapes):
        return "wrong-shape", "the update's tensors are not the model's"
    squares = torch.zeros((), dtype=torch.float64)
    for tensor in update.state.values():
        if not bool(tensor.isfinite().all()):
            return "not-finite", "the update holds values that are not finite"
        squares += tensor.double().square().sum()
    if float(squares) == 0.0:
        return "all-zero", "the update is zero everywhere, which noise never is"
    if float(squares) ** 0.5 > expected.norm_bound:
        return "over-norm", f"the update's norm is above the bound of {expected.norm_bound:g}"
    return None


def _fault(error: ReceiptError | RegistryError, site: str | None = None) -> LeftOut:
    if isinstance(error, RegistryError):
        return LeftOut("not-enrolled", "the receipt's key is not enrolled", site=site)
    reason = getattr(error, "reason", None) or re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()
    return LeftOut(str(reason), str(error), site=site)
