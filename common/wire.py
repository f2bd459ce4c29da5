"""Requests, updates, receipts and refusals as Flower records: the only module that knows the message format.

A request travels with the server's signed statement of it (`requests.py`), and the tensors in it are not looked at
before that was verified. A reply carries an update with its receipt, or a refusal with a reason from a fixed list;
nothing else has a place in it. What arrives is checked against this schema before anything looks at it.

Tensors travel as one array of bytes, which are those that receipts quote: Flower carries each array, and each chunk
of it, by calls of its own from process to process, and calls are most of what a round costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from common.phases import Phase
from common.requests import LONGEST_STATEMENT, Statement

MESSAGE_TYPES = {
    Phase.POPULARITY: "query",
    Phase.TRANSITIONS: "query",
    Phase.UPDATE: "train",
    Phase.METRICS: "evaluate",
}
"""Flower's type of the message that asks for each phase; the phase itself stands in the message."""

State = Mapping[str, Tensor]

_MOST_TENSORS = 100_000
_BROADCAST = (torch.float32, torch.bfloat16)
_UPDATE = (*_BROADCAST, torch.int8)
_TENSORS, _FORM = "tensors", "safetensors"
_RELEASED = "released/"
"""Before the names of what was released before, where it travels beside parameters: no parameter's name has a slash."""


class WireError(ValueError):
    """A message does not have the form that this module writes. Never quotes what it found."""


class Reason(StrEnum):
    """Why a site refuses: all that a refusal says."""

    BUDGET = "budget"
    CLOSED = "closed"
    POLICY = "policy"
    PLAN = "plan"
    MODEL = "model"
    FAILED = "failed"
    EXPIRED = "expired"
    ORIGIN = "origin"


@dataclass(frozen=True)
class Request:
    """What the server asks of a site in a round.

    Attributes:
        run: the run's name, a public word.
        round, attempt: counted from 1.
        nonce: hex, another for each run, round, attempt and site: binds a receipt to this federation.
        plan: the calibrated plan as JSON.
        anchor: the server's countersignature over the head of the site's chain that it holds, as canonical
            bytes, or None before the first.
        state: the broadcast trainable parameters; empty where statistics are asked for.
        phase: what is asked for.
        released: what statistics were released before, by the names of `common.sums`, summed over sites.
        site: the id of the ledger key of the site that is asked; empty where nobody is asked yet.
    """

    run: str
    round: int
    attempt: int
    nonce: str
    plan: str
    state: State
    anchor: bytes | None = None
    phase: Phase = Phase.UPDATE
    released: State = field(default_factory=dict)
    site: str = ""

    @cached_property
    def model_digest(self) -> str:
        """sha256 of all that is broadcast: the parameters, and beside them what was released before."""
        return _model_digest(self.state, self.released)


@dataclass(frozen=True)
class SignedRequest:
    """A request as it travels: what the server says of it and signs, and what that is about. Nothing is believed yet.

    Attributes:
        statement: the bytes of a `Statement`.
        signature: the server's over them.
        plan, anchor: as in `Request`.
        broadcast: the parameters and released statistics, as bytes.
    """

    statement: bytes
    signature: bytes
    plan: str
    anchor: bytes | None
    broadcast: bytes

    @classmethod
    def of(
        cls, request: Request, key: Ed25519PrivateKey, *, expires: int, like: SignedRequest | None = None
    ) -> SignedRequest:
        """The server's word for a request.

        Args:
            expires: whole seconds since 1970.
            like: another one with the same parameters and released statistics, whose bytes and digests are used again.

        Raises:
            ReceiptError: a field of the request is out of bounds, or it names no site.
        """
        if like is None:
            broadcast = state_to_bytes(_together(_halves(request.state), request.released))
            digests = _sha256(broadcast), request.model_digest, state_digest(request.released)
        else:
            broadcast, said = like.broadcast, like.said
            digests = said.broadcast, said.model, said.released
        statement = Statement(
            site=request.site,
            expires=expires,
            run=request.run,
            round=request.round,
            attempt=request.attempt,
            nonce=request.nonce,
            phase=request.phase.value,
            plan=_sha256(request.plan.encode()),
            anchor=None if request.anchor is None else _sha256(request.anchor),
            broadcast=digests[0],
            model=digests[1],
            released=digests[2],
        ).to_bytes()
        return cls(statement, key.sign(statement), request.plan, request.anchor, broadcast)

    @cached_property
    def said(self) -> Statement:
        """The statement.

        Raises:
            ReceiptError: it is none.
        """
        return Statement.from_bytes(self.statement)

    def fits(self) -> bool:
        """Whether plan, anchor and broadcast are those that the statement is about; looks into none of them."""
        anchor = None if self.anchor is None else _sha256(self.anchor)
        found = _sha256(self.plan.encode()), anchor, _sha256(self.broadcast)
        return found == (self.said.plan, self.said.anchor, self.said.broadcast)

    def request(self) -> Request:
        """What is asked, with its tensors, into which nobody may write.

        Raises:
            WireError: the broadcast cannot be read, or is another than the statement says.
            ReceiptError: the statement is none.
        """
        said, broadcast = self.said, _broadcast(self.broadcast)
        if (broadcast.digest, broadcast.released_digest) != (said.model, said.released):
            raise WireError("the broadcast is not what the statement says")
        request = Request(
            run=said.run,
            round=said.round,
            attempt=said.attempt,
            nonce=said.nonce,
            plan=self.plan,
            state=broadcast.state,
            anchor=self.anchor,
            phase=Phase(said.phase),
            released=broadcast.released,
            site=said.site,
        )
        vars(request)["model_digest"] = broadcast.digest  # of these very tensors
        return request


@dataclass(frozen=True)
class Update:
    """A release and the receipt that travels with it: the change of the trainable parameters, or a noisy sum.

    Attributes:
        data: the release as it travels, in the plan's precision, as `state_to_bytes` gives it: what the receipt is
            over.
    """

    data: bytes
    receipt: bytes

    @classmethod
    def of(cls, state: State, receipt: bytes) -> Update:
        """The update with these tensors."""
        return cls(state_to_bytes(state), receipt)

    @cached_property
    def state(self) -> State:
        """Its tensors."""
        return state_from_bytes(self.data)


@dataclass(frozen=True)
class Refusal:
    """An explicit no."""

    reason: Reason


def state_to_bytes(state: State) -> bytes:
    """The one encoding of parameters whose sha256 receipts and checkpoints quote (safetensors)."""
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):  # numpy knows none
        data: bytes = save_tensors(tensors)
    else:  # the same bytes, six times as fast
        data = save_arrays({name: tensor.numpy() for name, tensor in tensors.items()})
    return data


def state_from_bytes(data: bytes) -> dict[str, Tensor]:
    """What `state_to_bytes` wrote."""
    state: dict[str, Tensor] = load_tensors(data)
    return state


def state_digest(state: State) -> str:
    """sha256 of `state_to_bytes`, hex."""
    return _sha256(state_to_bytes(state))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _together(state: State, released: State) -> dict[str, Tensor]:
    return {**state, **{f"{_RELEASED}{name}": tensor for name, tensor in released.items()}}


def _model_digest(state: State, released: State) -> str:
    return state_digest(_together(state, released))


def _halves(state: State) -> dict[str, Tensor]:
    """The same, and in bfloat16 where that holds every bit: what is broadcast in a plan's bfloat16, or zeros."""
    found = {}
    for name, tensor in state.items():
        bits = tensor.detach().cpu().contiguous().view(torch.int32)
        whole = bool((bits & 0xFFFF).any())
        found[name] = tensor if whole else (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return found


def _record(data: bytes) -> ArrayRecord:
    """One array of what `state_to_bytes` gave."""
    return ArrayRecord({_TENSORS: Array(dtype="uint8", shape=(len(data),), stype=_FORM, data=data)})


def _data(record: object) -> bytes:
    """The bytes of `_record`.

    Raises:
        WireError: it carries something else, or something beside it.
    """
    if not isinstance(record, ArrayRecord) or set(record) != {_TENSORS}:
        raise WireError(f"tensors must be one array named {_TENSORS}, and nothing else")
    array = record[_TENSORS]
    data: bytes = array.data
    if (array.dtype, tuple(array.shape), array.stype) != ("uint8", (len(data),), _FORM):
        raise WireError(f"tensors must be bytes in the form of {_FORM}")
    return data


def _tensors(data: bytes, dtypes: Collection[torch.dtype], fewest: int = 1) -> dict[str, Tensor]:
    """The tensors in bytes that a stranger wrote.

    Raises:
        WireError: they are not what `state_to_bytes` makes of tensors of these types, to the last byte.
    """
    try:
        state = state_from_bytes(data)
        whole = state_to_bytes(state) == data
    except Exception as error:  # a parser of foreign bytes raises what it likes
        raise WireError("the tensors cannot be read") from error
    if not fewest <= len(state) <= _MOST_TENSORS:
        raise WireError(f"a message carries {len(state)} tensors")
    if any(tensor.dtype not in dtypes for tensor in state.values()):
        raise WireError(f"a tensor is not {' or '.join(str(dtype).split('.')[1] for dtype in dtypes)}")
    if not whole:
        raise WireError("the tensors are not in the one encoding that receipts quote")
    return state


@dataclass(frozen=True)
class _Broadcast:
    """What all sites get in a round, read once where one process answers for many of them."""

    data: bytes
    state: dict[str, Tensor]
    released: dict[str, Tensor]
    digest: str
    released_digest: str


_last_broadcast: list[_Broadcast] = []


def _broadcast(data: bytes) -> _Broadcast:
    """The parameters and released statistics in a request; nobody may write into them.

    Raises:
        WireError: the bytes hold something else.
    """
    last = next(iter(_last_broadcast), None)
    if last is not None and last.data == data:
        return last
    state, released = {}, {}
    for name, tensor in _tensors(data, _BROADCAST, fewest=0).items():
        if not name.startswith(_RELEASED):
            state[name] = tensor.float()
        elif tensor.dtype == torch.float32:
            released[name.removeprefix(_RELEASED)] = tensor
        else:
            raise WireError("a released statistic is not float32")
    found = _Broadcast(data, state, released, _model_digest(state, released), state_digest(released))
    _last_broadcast[:] = [found]
    return found


def request_to_records(signed: SignedRequest, like: RecordDict | None = None) -> RecordDict:
    """The content of a request message.

    Args:
        like: of another request with the same broadcast, whose record is used again.
    """
    said = {
        "statement": signed.statement,
        "signature": signed.signature,
        "plan": signed.plan,
        # Flower's byte counter fails on empty strings, so "none" stands for none.
        "anchor": "none" if signed.anchor is None else signed.anchor.hex(),
    }
    broadcast = _record(signed.broadcast) if like is None else like["broadcast"]
    return RecordDict({"broadcast": broadcast, "round": ConfigRecord(said)})


def request_from_records(content: RecordDict) -> SignedRequest:
    """The request in a message, of which nothing is known yet but its form: the signature is not verified here.

    Raises:
        WireError: it has another form.
    """
    if set(content) != {"broadcast", "round"}:
        raise WireError("a request must carry what is broadcast, and a round")
    fields = content["round"]
    if not isinstance(fields, ConfigRecord):
        raise WireError("a request carries records of the wrong type")
    if set(fields) != {"statement", "signature", "plan", "anchor"}:
        raise WireError("a request has missing or unknown fields")
    statement, signature, plan, anchor = (
        fields[name] for name in ("statement", "signature", "plan", "anchor")
    )
    if not isinstance(statement, bytes) or not isinstance(signature, bytes):
        raise WireError("statement and signature must be bytes")
    if not isinstance(plan, str) or not isinstance(anchor, str):
        raise WireError("plan and anchor must be text")
    if len(statement) > LONGEST_STATEMENT:
        raise WireError("a statement is too long")
    try:
        seen = None if anchor == "none" else bytes.fromhex(anchor)
        plan.encode()
    except ValueError as error:
        raise WireError("an anchor must be hex, and a plan text that has an encoding") from error
    return SignedRequest(statement, signature, plan, seen, _data(content["broadcast"]))


def answer_to_records(answer: Update | Refusal) -> RecordDict:
    """The content of a reply message."""
    if isinstance(answer, Refusal):
        return RecordDict({"refusal": ConfigRecord({"reason": answer.reason.value})})
    return RecordDict({"update": _record(answer.data), "receipt": ConfigRecord({"entries": answer.receipt})})


def answer_from_records(content: RecordDict) -> Update | Refusal:
    """The answer in a reply.

    Raises:
        WireError: it has another form.
    """
    if set(content) == {"refusal"}:
        record = content["refusal"]
        if isinstance(record, ConfigRecord) and set(record) == {"reason"}:
            reason = record["reason"]
            if isinstance(reason, str) and reason in set(Reason):
                return Refusal(Reason(reason))
        raise WireError("a refusal must give one of the known reasons, and nothing else")
    if set(content) != {"update", "receipt"}:
        raise WireError("a reply must carry an update with its receipt, or a refusal, and nothing else")
    receipt = content["receipt"]
    if not isinstance(receipt, ConfigRecord):
        raise WireError("a reply carries records of the wrong type")
    if set(receipt) != {"entries"} or not isinstance(receipt["entries"], bytes):
        raise WireError("a receipt must be bytes, and nothing else")
    data = _data(content["update"])
    update = Update(data, receipt["entries"])
    vars(update)["state"] = _tensors(data, _UPDATE)
    return update


def payload_bytes(content: RecordDict) -> int:
    """Bytes of a message's arrays and byte strings: what its content weighs on the wire, without framing."""
    total = 0
    for record in content.values():
        for value in record.values():
            if isinstance(value, Array):
                total += len(value.data)
            elif isinstance(value, bytes | str):
                total += len(value)
            else:
                total += 8
    return total
