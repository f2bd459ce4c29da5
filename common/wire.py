"""Requests, updates, receipts and refusals as Flower records: the only module that knows the message format.

A reply carries an update with its receipt, or a refusal with a reason from a fixed list; nothing else has a
place in it. What arrives is checked against this schema before anything looks at it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from common.phases import Phase

MESSAGE_TYPES = {
    Phase.POPULARITY: "query",
    Phase.TRANSITIONS: "query",
    Phase.UPDATE: "train",
    Phase.METRICS: "evaluate",
}
"""Flower's type of the message that asks for each phase; the phase itself stands in the message."""

State = Mapping[str, Tensor]

_MOST_TENSORS = 100_000
_PLAIN: dict[np.dtype[Any], torch.dtype] = {np.dtype(np.float32): torch.float32}
_HALVED: dict[np.dtype[Any], torch.dtype] = {**_PLAIN, np.dtype(np.int16): torch.bfloat16}
_ROUNDED: dict[np.dtype[Any], torch.dtype] = {
    **_HALVED,
    np.dtype(np.int8): torch.int8,
}


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


@dataclass(frozen=True)
class Request:
    """What the server asks of a site in a round.

    Attributes:
        run: the run's name, a public word.
        round, attempt: counted from 1.
        nonce: hex, fresh for each round: binds a receipt to this federation.
        plan: the calibrated plan as JSON.
        anchor: the server's countersignature over the head of the site's chain that it holds, as canonical
            bytes, or None before the first.
        state: the broadcast trainable parameters; empty where statistics are asked for.
        phase: what is asked for.
        released: what statistics were released before, by the names of `common.sums`, summed over sites.
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

    @cached_property
    def model_digest(self) -> str:
        """sha256 of all that is broadcast: the parameters, and beside them what was released before."""
        return _model_digest(self.state, self.released)


@dataclass(frozen=True)
class Update:
    """A release and the receipt that travels with it: the change of the trainable parameters, or a noisy sum.

    Attributes:
        state: the release as it travels, in the plan's precision: the receipt is over these very bytes.
    """

    state: State
    receipt: bytes


@dataclass(frozen=True)
class Refusal:
    """An explicit no."""

    reason: Reason


def state_to_bytes(state: State) -> bytes:
    """The one encoding of parameters whose sha256 receipts and checkpoints quote (safetensors)."""
    data: bytes = save_tensors({name: state[name].detach().cpu().contiguous() for name in sorted(state)})
    return data


def state_from_bytes(data: bytes) -> dict[str, Tensor]:
    """What `state_to_bytes` wrote."""
    state: dict[str, Tensor] = load_tensors(data)
    return state


def state_digest(state: State) -> str:
    """sha256 of `state_to_bytes`, hex."""
    return hashlib.sha256(state_to_bytes(state)).hexdigest()


def _model_digest(state: State, released: State) -> str:
    return state_digest({**state, **{f"released/{name}": tensor for name, tensor in released.items()}})


def _arrays(state: State) -> ArrayRecord:
    return ArrayRecord({name: Array(_array(state[name].detach().cpu())) for name in sorted(state)})


def _halves(state: State) -> dict[str, Tensor]:
    """The same, and in bfloat16 where that holds every bit: what is broadcast in a plan's bfloat16, or zeros."""
    found = {}
    for name, tensor in state.items():
        bits = tensor.detach().cpu().contiguous().view(torch.int32)
        whole = bool((bits & 0xFFFF).any())
        found[name] = tensor if whole else (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return found


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """numpy knows no bfloat16, so its bits travel."""
    found: npt.NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def _state(
    record: ArrayRecord, fewest: int = 1, forms: Mapping[np.dtype[Any], torch.dtype] = _PLAIN
) -> dict[str, Tensor]:
    """The tensors of a record.

    Args:
        forms: numpy's types that may come, and what their bits are.
    """
    if not fewest <= len(record) <= _MOST_TENSORS:
        raise WireError(f"a message carries {len(record)} tensors")
    state = {}
    for name in sorted(record):
        try:
            array = record[name].numpy()
        except (
            Exception
        ) as error:  # numpy's parser of foreign bytes raises what it likes (BadZipFile, MemoryError)
            raise WireError("a tensor cannot be read") from error
        if not isinstance(array, np.ndarray) or array.dtype not in forms:
            raise WireError(
                f"a tensor is not {' or '.join(str(form).split('.')[1] for form in forms.values())}"
            )
        state[name] = torch.from_numpy(np.array(array, order="C")).view(forms[array.dtype])
    return state


@dataclass(frozen=True)
class _Broadcast:
    """What all sites get in a round, read once where one process answers for many of them.

    Attributes:
        model, released: the records that it was read from.
    """

    model: ArrayRecord
    released: ArrayRecord
    state: dict[str, Tensor]
    released_state: dict[str, Tensor]
    digest: str


_last_broadcast: list[_Broadcast] = []


def _broadcast(model: ArrayRecord, released: ArrayRecord) -> _Broadcast:
    """The numbers in the two records; nobody may write into them.

    Raises:
        WireError: they hold something else.
    """
    last = next(iter(_last_broadcast), None)
    if last is not None and (last.model, last.released) == (model, released):
        return last
    state = {name: tensor.float() for name, tensor in _state(model, fewest=0, forms=_HALVED).items()}
    statistics = _state(released, fewest=0)
    found = _Broadcast(model, released, state, statistics, _model_digest(state, statistics))
    _last_broadcast[:] = [found]
    return found


def request_to_records(request: Request, like: RecordDict | None = None) -> RecordDict:
    """The content of a request message.

    Args:
        like: of another request with the same parameters and released statistics, whose arrays are used again.
    """
    return RecordDict(
        {
            "model": _arrays(_halves(request.state)) if like is None else like["model"],
            "released": _arrays(request.released) if like is None else like["released"],
            "round": ConfigRecord(
                {
                    "run": request.run,
                    "round": request.round,
                    "attempt": request.attempt,
                    "nonce": request.nonce,
                    "plan": request.plan,
                    "phase": request.phase.value,
                    # Flower's byte counter fails on empty strings, so "none" stands for none.
                    "anchor": "none" if request.anchor is None else request.anchor.hex(),
                }
            ),
        }
    )


def request_from_records(content: RecordDict) -> Request:
    """The request in a message.

    Raises:
        WireError: it has another form.
    """
    if set(content) != {"model", "released", "round"}:
        raise WireError("a request must carry a model, what was released, and a round")
    model, released, fields = content["model"], content["released"], content["round"]
    if not (
        isinstance(model, ArrayRecord)
        and isinstance(released, ArrayRecord)
        and isinstance(fields, ConfigRecord)
    ):
        raise WireError("a request carries records of the wrong type")
    if set(fields) != {"run", "round", "attempt", "nonce", "plan", "phase", "anchor"}:
        raise WireError("a request has missing or unknown fields")
    texts = {name: fields[name] for name in ("run", "nonce", "plan", "phase", "anchor")}
    numbers = {name: fields[name] for name in ("round", "attempt")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise WireError("run, nonce, plan, phase and anchor must be text")
    if texts["phase"] not in set(Phase):
        raise WireError("a request asks for an unknown phase")
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in numbers.values()):
        raise WireError("round and attempt must be whole numbers")
    try:
        anchor = None if texts["anchor"] == "none" else bytes.fromhex(str(texts["anchor"]))
    except ValueError as error:
        raise WireError("an anchor must be hex") from error
    broadcast = _broadcast(model, released)
    request = Request(
        anchor=anchor,
        run=str(texts["run"]),
        nonce=str(texts["nonce"]),
        plan=str(texts["plan"]),
        round=int(str(numbers["round"])),
        attempt=int(str(numbers["attempt"])),
        phase=Phase(str(texts["phase"])),
        state=broadcast.state,
        released=broadcast.released_state,
    )
    vars(request)["model_digest"] = broadcast.digest  # of these very tensors
    return request


def answer_to_records(answer: Update | Refusal) -> RecordDict:
    """The content of a reply message."""
    if isinstance(answer, Refusal):
        return RecordDict({"refusal": ConfigRecord({"reason": answer.reason.value})})
    return RecordDict({"update": _arrays(answer.state), "receipt": ConfigRecord({"entries": answer.receipt})})


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
    update, receipt = content["update"], content["receipt"]
    if not isinstance(update, ArrayRecord) or not isinstance(receipt, ConfigRecord):
        raise WireError("a reply carries records of the wrong type")
    if set(receipt) != {"entries"} or not isinstance(receipt["entries"], bytes):
        raise WireError("a receipt must be bytes, and nothing else")
    return Update(state=_state(update, forms=_ROUNDED), receipt=receipt["entries"])


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
