"""A corpus of bad replies: each is an honest reply with one thing changed, and names why it is left out.

The attacker is the site itself, with its key and its ledger, or a stranger who has seen what others sent.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.torch import save as save_tensors
from torch import Tensor

from common.privacy.entries import Entry
from common.privacy.mechanisms import Event, PoissonSubsampledGaussian
from common.privacy.receipts import Receipt, Request
from common.privacy.renyi import charge_at
from common.wire import Update, answer_to_records, state_to_bytes
from server.admission import Expectation
from server.registry import Registry
from tests.common.privacy.honest_chain import SITE, STRANGER, TRAINING, Writer, digest

State = dict[str, Tensor]
SHAPES = {"head.weight": (4, 3), "prior": (5,)}
OTHER_SITE = Ed25519PrivateKey.from_private_bytes(b"o" * 32)


def asked(run: str = "run-a", round_: int = 3) -> Request:
    return Request(run, round_, digest(f"{run}/{round_}".encode()), "a" * 64, "b" * 64, attempt=1)


def expectation(request: Request | None = None) -> Expectation:
    return Expectation(
        request=request or asked(),
        shapes=SHAPES,
        norm_bound=100.0,
        event=TRAINING,
        clip_norm=1.0,
        normaliser=50.0,
        learning_rate=0.1,
    )


def update(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def reserve(
    site: Writer, request: Request, *, event: Event = TRAINING, attempt: int = 1, **changes: object
) -> Entry:
    body = site.reserve_body(request.run, request.round, attempt, event=event)
    body = replace(body, nonce=request.nonce, plan_hash=request.plan_hash, model_hash=request.model_hash)
    body = replace(body, **{"learning_rate": 0.1, **changes})  # type: ignore[arg-type]
    site.spent = body.spent
    return site.add(body)


def receipt(site: Writer, first: int) -> Receipt:
    return Receipt(site.entries[0], tuple(site.entries[first:]))


def answered(
    site: Writer,
    state: State,
    request: Request | None = None,
    *,
    event: Event = TRAINING,
    attempt: int = 1,
    **changes: object,
) -> Receipt:
    """The site reserves and releases this update; the receipt begins at the reservation."""
    first = len(site.entries)
    entry = reserve(site, request or asked(), event=event, attempt=attempt, **changes)
    site.release(entry, state_to_bytes(state))
    return receipt(site, first)


@dataclass
class Scene:
    """A server's registry, one enrolled site with one round behind it, and another enrolled site."""

    registry: Registry
    site: Writer = field(default_factory=Writer)
    other: Writer = field(default_factory=lambda: Writer(OTHER_SITE))
    taken: list[str] = field(default_factory=list)

    @property
    def key_id(self) -> str:
        return self.site.entries[0].key_id


_FILES: dict[str, bytes] = {}


def scene(folder: Path) -> Scene:
    """A fresh scene. Nothing in it is random but the server's key, so that its files are made once and copied."""
    if _FILES:
        folder.mkdir(mode=0o700, parents=True)
        for name, data in _FILES.items():
            (folder / name).write_bytes(data)
            (folder / name).chmod(0o600)
    it = Scene(Registry(folder))
    answered(it.site, update(1), asked("run-a", 2))
    if not _FILES:
        it.registry.enroll("north", it.site.entries[0])
        it.registry.enroll("south", it.other.entries[0])
        it.registry.accept(it.registry.chain(it.key_id).extended(it.site.entries[1:]))
        _FILES.update((file.name, file.read_bytes()) for file in folder.iterdir())
    return it


def reply(state: State, signed: Receipt) -> RecordDict:
    return answer_to_records(Update.of(state, signed.to_bytes()))


Case = Callable[[Scene], RecordDict]
CASES: dict[str, tuple[str, str, Case]] = {}


def bad(name: str, reason: str, explanation: str = "") -> Callable[[Case], Case]:
    """Keeps a case, with its reason and words of its explanation."""

    def keep(case: Case) -> Case:
        assert name not in CASES
        CASES[name] = (reason, explanation, case)
        return case

    return keep


# --- values, all of them signed for by the site


def valued(name: str, reason: str, change: Callable[[State], object], explanation: str = "") -> None:
    def case(it: Scene) -> RecordDict:
        state = update()
        change(state)
        return reply(state, answered(it.site, state))

    bad(name, reason, explanation)(case)


def _put(name: str, value: Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: value})


valued("NaN in the update", "not_finite", lambda state: state["prior"].fill_(float("nan")))
valued("one infinity in the update", "not_finite", lambda state: state["prior"][2:3].fill_(float("inf")))
valued("all zero", "all_zero", lambda state: [each.zero_() for each in state.values()])
valued("over the norm bound", "over_norm", lambda state: state["prior"].mul_(1000.0))
valued("norm at the end of float32", "over_norm", lambda state: state["prior"].fill_(3e38))
valued("another shape", "wrong_shape", _put("prior", torch.ones(6)))
valued("transposed", "wrong_shape", lambda state: state.update({"head.weight": state["head.weight"].T}))
valued("an extra tensor", "wrong_tensors", _put("losses", torch.ones(2)))
valued("a tensor left out", "wrong_tensors", lambda state: state.pop("prior"))
valued("a tensor renamed", "wrong_tensors", lambda state: state.update({"Prior": state.pop("prior")}))


# --- digest and mechanism


@bad("update swapped after signing", "wrong_digest")
def _(it: Scene) -> RecordDict:
    return reply(update(7), answered(it.site, update()))


@bad("one bit of the update flipped", "wrong_digest")
def _(it: Scene) -> RecordDict:
    state = update()
    signed = answered(it.site, state)
    state["prior"].view(torch.int32)[0] ^= 1
    return reply(state, signed)


def stated(name: str, says: str, **changes: object) -> None:
    def case(it: Scene) -> RecordDict:
        state = update()
        return reply(state, answered(it.site, state, **changes))  # type: ignore[arg-type]

    bad(name, "wrong_mechanism", f"another {says}")(case)


stated("less noise, honestly charged", "mechanism", event=PoissonSubsampledGaussian(0.05, 0.9, 10))
stated("a larger rate, honestly charged", "mechanism", event=PoissonSubsampledGaussian(0.06, 1.0, 10))
stated("more steps, honestly charged", "mechanism", event=PoissonSubsampledGaussian(0.05, 1.0, 11))
stated("less noise multiplied", "clip norm", clip_norm=0.5)
stated("another normaliser", "normaliser", normaliser=49.0)
stated("another learning rate", "learning rate", learning_rate=0.2)
stated("no learning rate", "learning rate", learning_rate=None)


# --- replays


def replayed(name: str, request: Request, says: str) -> None:
    def case(it: Scene) -> RecordDict:
        state = update()
        return reply(state, answered(it.site, state, request, attempt=request.attempt or 0))

    bad(name, "wrong_request", says)(case)


replayed("from another run", replace(asked(), run="run-z"), "another run")
replayed("from another round", replace(asked(), round=4), "another round")
replayed("for another nonce", replace(asked(), nonce="9" * 32), "another nonce")
replayed("for another model", replace(asked(), model_hash="9" * 64), "another model_hash")
replayed("for another plan", replace(asked(), plan_hash="9" * 64), "another plan_hash")
replayed("for another attempt", replace(asked(), attempt=2), "another attempt")


@bad("last round's reply sent again", "wrong_request", "another round, nonce")
def _(it: Scene) -> RecordDict:
    return reply(update(1), receipt(it.site, 1))


@bad("another site's reply sent by a stranger", "second_update")
def _(it: Scene) -> RecordDict:
    state = update()
    it.taken.append(it.key_id)
    return reply(state, answered(it.site, state))


# --- keys, chains, anchored heads


@bad("a key that nobody enrolled", "not_enrolled")
def _(it: Scene) -> RecordDict:
    state = update()
    return reply(state, answered(Writer(STRANGER), state))


@bad("a new ledger under the old key", "wrong_genesis")
def _(it: Scene) -> RecordDict:
    state = update()
    return reply(state, answered(Writer(SITE, epsilon=80.0), state))


@bad("another site's genesis over one's own entries", "key_mismatch")
def _(it: Scene) -> RecordDict:
    state = update()
    signed = answered(it.other, state)
    return reply(state, Receipt(it.site.entries[0], signed.entries))


@bad("entries withheld", "detached_segment")
def _(it: Scene) -> RecordDict:
    state = update()
    reserve(it.site, asked("run-b", 1))
    return reply(state, answered(it.site, state))


@bad("ledger rolled back behind the anchored head", "fork")
def _(it: Scene) -> RecordDict:
    state = update()
    restored = Writer()  # from a backup of before the last round
    return reply(state, answered(restored, state))


@bad("history rewritten with twice the noise", "fork")
def _(it: Scene) -> RecordDict:
    state = update()
    lying = Writer()
    answered(lying, update(1), asked("run-a", 2), event=PoissonSubsampledGaussian(0.05, 2.0, 10))
    answered(lying, state)
    return reply(state, receipt(lying, 1))


@bad("charge 0", "wrong_charge")
def _(it: Scene) -> RecordDict:
    state, first = update(), len(it.site.entries)
    body = it.site.reserve_body("run-a", 3, 1)
    request = asked()
    body = replace(body, nonce=request.nonce, charge=0, spent=it.site.spent)
    it.site.release(it.site.add(body), state_to_bytes(state))
    return reply(state, receipt(it.site, first))


@bad("over its cap", "over_cap")
def _(it: Scene) -> RecordDict:
    state, genesis = update(), it.site.genesis
    while it.site.spent + charge_at(TRAINING, genesis.order, genesis.cap) <= genesis.cap:
        reserve(it.site, asked("run-b", len(it.site.entries)))
    first = len(it.registry.chain(it.key_id).entries)
    answered(it.site, state)
    return reply(state, receipt(it.site, first))


@bad("a second release on one reservation", "second_release")
def _(it: Scene) -> RecordDict:
    state, first = update(), len(it.site.entries)
    reservation = reserve(it.site, asked())
    it.site.release(reservation, state_to_bytes(update(3)))
    it.site.release(reservation, state_to_bytes(state))
    return reply(state, receipt(it.site, first))


@bad("statistics where an update was asked", "wrong_content")
def _(it: Scene) -> RecordDict:
    state, first = update(), len(it.site.entries)
    it.site.release(reserve(it.site, asked()), state_to_bytes(state), content="statistics")
    return reply(state, receipt(it.site, first))


@bad("signed by another's key", "bad_signature")
def _(it: Scene) -> RecordDict:
    state = update()
    signed = answered(it.site, state)
    forged = replace(signed.entries[-1], signature="0" * 128)
    return reply(state, Receipt(signed.genesis, (*signed.entries[:-1], forged)))


@bad("a receipt that ends before its release", "missing_release")
def _(it: Scene) -> RecordDict:
    state = update()
    signed = answered(it.site, state)
    return reply(state, Receipt(signed.genesis, signed.entries[:-1]))


# --- messages of another form


def formed(name: str, says: str, change: Callable[[RecordDict], object], reason: str = "malformed") -> None:
    def case(it: Scene) -> RecordDict:
        state = update()
        content = reply(state, answered(it.site, state))
        change(content)
        return content

    bad(name, reason, says)(case)


def _array(data: bytes, dtype: str = "uint8", stype: str = "safetensors") -> Array:
    return Array(dtype=dtype, shape=(len(data),), stype=stype, data=data)


def _headed(header: bytes, body: bytes = b"") -> bytes:
    """Bytes in safetensors' form, whatever the header."""
    return len(header).to_bytes(8, "little") + header + body


def _one(dtype: str, size: int, begin: int = 0, *, name: str = "prior") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":[{size}],"data_offsets":[{begin},{begin + 4 * size}]}}'


def _records(change: Callable[[ArrayRecord], object]) -> Callable[[RecordDict], object]:
    def apply(content: RecordDict) -> None:
        record = content["update"]
        assert isinstance(record, ArrayRecord)
        change(record)

    return apply


def _with_array(array: Array) -> Callable[[RecordDict], object]:
    return _records(lambda record: record.update({"tensors": array}))


def _with_data(data: bytes) -> Callable[[RecordDict], object]:
    return _with_array(_array(data))


def _with_prior(prior: Tensor) -> Callable[[RecordDict], object]:
    return _with_data(state_to_bytes({**update(), "prior": prior}))


def _with_receipt(record: object) -> Callable[[RecordDict], object]:
    return lambda content: content.update({"receipt": record})  # type: ignore[dict-item]


_ONE_FORM = "an update with its receipt"
formed("no receipt", _ONE_FORM, lambda content: content.pop("receipt"))
formed("no update", _ONE_FORM, lambda content: content.pop("update"))
formed("nothing at all", _ONE_FORM, lambda content: content.clear())
formed("metrics slipped in", _ONE_FORM, lambda it: it.update({"m": MetricRecord({"num-examples": 1042})}))
formed(
    "an update and a refusal", _ONE_FORM, lambda it: it.update({"refusal": ConfigRecord({"reason": "no"})})
)
formed(
    "a refusal with a reason of its own",
    "one of the known reasons",
    lambda it: (it.clear(), it.update({"refusal": ConfigRecord({"reason": "loss was 0.31"})})),
)
formed(
    "a refusal that says more",
    "one of the known reasons",
    lambda it: (it.clear(), it.update({"refusal": ConfigRecord({"reason": "budget", "users": 1042})})),
)
_NO_BYTES, _NO_ARRAY, _NOT_READ, _NOT_ONE = (
    "must be bytes in",
    "must be one array",
    "cannot be read",
    "one encoding",
)
for _dtype in (torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64):
    formed(f"{_dtype}", "not float32", _with_prior(torch.zeros(5, dtype=_dtype)))
formed("no tensor in the update", "carries 0 tensors", _with_data(state_to_bytes({})))
formed("no array in the update", _NO_ARRAY, _records(lambda record: record.clear()))
formed(
    "an array beside the update", _NO_ARRAY, _records(lambda record: record.update({"losses": _array(b"")}))
)
formed(
    "the array renamed",
    _NO_ARRAY,
    _records(lambda record: record.update({"losses": record.pop("tensors")})),
)
formed("numpy's array", _NO_BYTES, _with_array(Array(np.zeros(5, dtype=np.float32))))
formed(
    "an array of another library", _NO_BYTES, _with_array(_array(state_to_bytes(update()), stype="user 1042"))
)
formed("an array of another type", _NO_BYTES, _with_array(_array(state_to_bytes(update()), dtype="loss 0.3")))
formed(
    "an array of another shape",
    _NO_BYTES,
    _with_array(Array(dtype="uint8", shape=(1042,), stype="safetensors", data=state_to_bytes(update()))),
)
formed("garbage for tensors", _NOT_READ, _with_data(b"\x00garbage" * 10))
formed("empty bytes for tensors", _NOT_READ, _with_data(b""))
formed("a pickle for tensors", _NOT_READ, _with_data(pickle.dumps(update())))
formed("16 TB in the header", _NOT_READ, _with_data(_headed(f"{{{_one('F32', 4 * 10**12)}}}".encode())))
formed("a header of 16 TB", _NOT_READ, _with_data((16 * 10**12).to_bytes(8, "little") + b"{}"))
formed("a header that is no header", _NOT_READ, _with_data(_headed(b"{'descr': (((((")))
formed("a header nested deep", _NOT_READ, _with_data(_headed(b"[" * 60_000)))
formed(
    "a type that nobody knows", _NOT_READ, _with_data(_headed(f"{{{_one('F99', 5)}}}".encode(), b"\0" * 20))
)
formed("bytes after the last tensor", _NOT_READ, _with_data(state_to_bytes(update()) + b"user 1042"))
formed("the last byte cut", _NOT_READ, _with_data(state_to_bytes(update())[:-1]))
formed(
    "two tensors in the same bytes",
    _NOT_READ,
    _with_data(_headed(f"{{{_one('F32', 5)},{_one('F32', 5, name='q')}}}".encode(), b"\0" * 20)),
)
formed(
    "words in the header",
    _NOT_ONE,
    _with_data(save_tensors(update(), metadata={"loss": "0.31 of user 1042"})),
)
formed("blanks in the header", _NOT_ONE, _with_data(_headed(f"{{ {_one('F32', 5)}}}".encode(), b"\0" * 20)))
formed(
    "tensors in another order",
    _NOT_ONE,
    _with_data(_headed(f"{{{_one('F32', 5)},{_one('F32', 2, 20, name='a')}}} ".encode(), b"\0" * 28)),
)
formed(
    "a tensor said twice",
    _NOT_ONE,
    _with_data(_headed(f"{{{_one('F32', 4)},{_one('F32', 5)}}}".encode(), b"\0" * 20)),
)
formed("a list for a receipt", "must be bytes", _with_receipt(ConfigRecord({"entries": [1, 2]})))
formed(
    "a receipt with a loss beside it",
    "must be bytes",
    _with_receipt(ConfigRecord({"entries": b"x", "loss": 0.3})),
)
formed("a receipt of metrics", "wrong type", _with_receipt(MetricRecord({"entries": 1})))
for _name, _data, _reason in (
    ("garbage", b"\xff\x00\xfe" * 40, "non_ascii"),
    ("no JSON", b"a receipt, I swear", "malformed_json"),
    ("empty", b"", "malformed_json"),
    ("a number of 100,000 digits", b"1" * 100_000, "whole_number"),
    ("100,000 brackets", b"[" * 100_000, "too_deep"),
    ("floats", b'{"entries":[],"format":"fedtide/receipt/1","genesis":1.5}', "float_number"),
    ("escape codes for a terminal", b'{"\\u001b[2J":"x"}', "non_ascii"),
):
    formed(f"a receipt of {_name}", "", _with_receipt(ConfigRecord({"entries": _data})), _reason)
