"""Messages through real protobuf bytes: what we write comes back, and nothing else gets in."""

from __future__ import annotations

import hashlib
import io
import pickle
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from safetensors.torch import save as save_tensors

from common.phases import Phase
from common.privacy.entries import public_key_of
from common.requests import is_signed
from common.wire import (
    Reason,
    Refusal,
    Request,
    SignedRequest,
    Update,
    WireError,
    answer_from_records,
    answer_to_records,
    payload_bytes,
    request_from_records,
    request_to_records,
    state_digest,
    state_from_bytes,
    state_to_bytes,
)

STATE = {"b.weight": torch.arange(6.0).view(2, 3), "a": torch.tensor([0.5])}
REQUEST = Request(
    run="run-a", round=3, attempt=1, nonce="ab" * 16, plan='{"name": "x"}', state=STATE, site="cd" * 32
)
KEY = Ed25519PrivateKey.generate()


def sent(request: Request = REQUEST) -> RecordDict:
    """The content of the message that asks this."""
    return request_to_records(SignedRequest.of(request, KEY, expires=2**31))


def got(content: RecordDict) -> Request:
    """What a message asks, its signature apart."""
    return request_from_records(content).request()


def through_bytes(content: RecordDict) -> RecordDict:
    """As Flower sends it: protobuf, serialised and parsed again."""
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    data = recorddict_to_proto(content).SerializeToString()
    parsed = Proto()
    parsed.ParseFromString(data)
    result: RecordDict = recorddict_from_proto(parsed)
    return result


def same_state(first: Any, second: Any) -> bool:
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and torch.equal(first[name], second[name])
        for name in first
    )


def same_request(first: Request, second: Request) -> bool:
    plain = ("run", "round", "attempt", "nonce", "plan", "anchor", "phase", "site")
    return (
        all(getattr(first, name) == getattr(second, name) for name in plain)
        and same_state(first.state, second.state)
        and same_state(first.released, second.released)
        and first.model_digest == second.model_digest
    )


states = st.dictionaries(
    st.text(min_size=1, max_size=12),
    stnp.arrays(
        np.float32,
        stnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=st.floats(width=32),
    ).map(lambda array: torch.from_numpy(np.array(array))),
    min_size=1,
    max_size=4,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    state=states,
    released=states | st.just({}),
    anchor=st.none() | st.binary(max_size=40),
    run=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}", fullmatch=True),
    plan=texts,
    round_=st.integers(1, 2**31),
    phase=st.sampled_from(Phase),
)
@settings(max_examples=60, deadline=None)
def test_requests_come_back_as_they_were(
    state: Any, released: Any, anchor: bytes | None, run: str, plan: str, round_: int, phase: Phase
) -> None:
    state = {name: torch.nan_to_num(tensor) for name, tensor in state.items()}
    released = {name: torch.nan_to_num(tensor) for name, tensor in released.items()}
    request = Request(
        run=run,
        round=round_,
        attempt=2,
        nonce="00" * 16,
        plan=plan,
        state=state,
        released=released,
        anchor=anchor,
        phase=phase,
        site="ef" * 32,
    )
    content = through_bytes(sent(request))
    assert same_request(got(content), request)
    signed = request_from_records(content)
    assert is_signed(signed.statement, signed.signature, public_key_of(KEY))
    assert signed.fits()
    like = SignedRequest.of(replace(request, site="01" * 32), KEY, expires=7, like=signed)
    assert like == SignedRequest.of(replace(request, site="01" * 32), KEY, expires=7)


@given(state=states, receipt=st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_updates_come_back_bit_for_bit(state: Any, receipt: bytes) -> None:
    answer = answer_from_records(through_bytes(answer_to_records(Update.of(state, receipt))))
    assert isinstance(answer, Update)
    assert answer.receipt == receipt
    assert state_to_bytes(answer.state) == state_to_bytes(state)  # NaN and -0.0 included


@pytest.mark.parametrize("reason", Reason)
def test_refusals_come_back_with_one_known_word(reason: Reason) -> None:
    content = through_bytes(answer_to_records(Refusal(reason)))
    assert answer_from_records(content) == Refusal(reason)
    assert {name: dict(record) for name, record in content.items()} == {"refusal": {"reason": reason.value}}


def test_a_parameter_that_is_no_contiguous_block_travels_too() -> None:
    state = {"t": torch.arange(6.0).view(2, 3).T, "leaf": torch.nn.Parameter(torch.ones(2))}
    answer = answer_from_records(through_bytes(answer_to_records(Update.of(state, b"r"))))
    assert isinstance(answer, Update)
    assert answer.state["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def packed(data: bytes, dtype: str = "uint8", stype: str = "safetensors", *, longer: int = 0) -> ArrayRecord:
    """The record of an update, or of a broadcast, with these bytes."""
    array = Array(dtype=dtype, shape=(len(data) + longer,), stype=stype, data=data)
    return ArrayRecord({"tensors": array})


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.ones(1, dtype=np.float32))
    return file.getvalue()


def tensors(**values: Any) -> ArrayRecord:
    return packed(state_to_bytes({name: torch.as_tensor(value) for name, value in values.items()}))


def headed(header: str, body: bytes = b"\0" * 8) -> ArrayRecord:
    return packed(len(header).to_bytes(8, "little") + header.encode() + body)


ONE = '"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
WHOLE = state_to_bytes({"x": torch.ones(2)})
GOOD = packed(WHOLE)
RECEIPT = ConfigRecord({"entries": b"r"})

BAD_ARRAYS = {
    "no array": ArrayRecord(),
    "an array beside": ArrayRecord({**GOOD, "losses": Array(np.ones(2, dtype=np.float32))}),
    "an array of another name": ArrayRecord({"x": GOOD["tensors"]}),
    "numpy's array": ArrayRecord({"tensors": Array(np.ones(2, dtype=np.float32))}),
    "numpy's bytes": ArrayRecord({"tensors": Array(np.frombuffer(WHOLE, dtype=np.uint8))}),
    "float64": tensors(w=np.ones(2)),
    "float16": tensors(w=np.ones(2, dtype=np.float16)),
    "int64": tensors(w=np.ones(2, dtype=np.int64)),
    "bool": tensors(w=np.ones(2, dtype=np.bool_)),
    "complex": tensors(w=np.ones(2, dtype=np.complex64)),
    "one of two is float64": tensors(v=np.ones(2, dtype=np.float32), w=np.ones(2)),
    "dtype that says more": packed(WHOLE, dtype="loss 0.3"),
    "serialisation that says more": packed(WHOLE, stype="user 7"),
    "shape that says more": packed(WHOLE, longer=7),
    "no bytes": packed(b""),
    "noise": packed(b"noise and more noise"),
    "numpy's file": packed(saved(np.ones(2, dtype=np.float32))),
    "zip": packed(zipped()),
    "pickle": packed(pickle.dumps({"x": 1})),
    "cut short": packed(WHOLE[:-3]),
    "bytes behind": packed(WHOLE + b"more"),
    "a header beyond all memory": packed((1 << 62).to_bytes(8, "little") + b"{}"),
    "a shape beyond all memory": headed(ONE.replace("[2]", "[99999999999999]").join("{}")),
    "a shape that overflows": headed(ONE.replace("[2]", "[4294967296,4294967296,2]").join("{}")),
    "a shape below zero": headed(ONE.replace("[2]", "[-2]").join("{}")),
    "an unknown type": headed(ONE.replace("F32", "F99").join("{}")),
    "words in the header": packed(save_tensors({"x": torch.ones(2)}, metadata={"loss": "0.3"})),
    "blanks in the header": headed("{ " + ONE + "}"),
    "a name twice": headed("{" + ONE + "," + ONE + "}"),
    "two names for the same bytes": headed("{" + ONE + "," + ONE.replace("x", "y") + "}"),
    "no numbers for a name": headed("{" + ONE + "}", b""),
    "deep": headed("[" * 60_000),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_an_update_with_bad_tensors_is_refused(name: str) -> None:
    with pytest.raises(WireError):
        answer_from_records(RecordDict({"update": BAD_ARRAYS[name], "receipt": RECEIPT}))


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_request_with_bad_tensors_is_refused(name: str) -> None:
    content = sent()
    content["broadcast"] = BAD_ARRAYS[name]
    with pytest.raises(WireError):
        got(content)


def signed_over(state: dict[str, torch.Tensor]) -> Request:
    """What a server that signed these tensors, whatever they are, is taken to ask."""
    signed, data = SignedRequest.of(REQUEST, KEY, expires=2**31), state_to_bytes(state)
    digest = hashlib.sha256(data).hexdigest()
    apart: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
    for name, tensor in state.items():
        apart[name.startswith("released/")][name.removeprefix("released/")] = tensor.float()
    model = replace(REQUEST, state=apart[False], released=apart[True]).model_digest
    said = replace(signed.said, broadcast=digest, model=model, released=state_digest(apart[True])).to_bytes()
    whole = replace(signed, statement=said, signature=KEY.sign(said), broadcast=data)
    assert whole.fits()
    return got(request_to_records(whole))


def test_what_an_update_and_a_broadcast_may_be_made_of() -> None:
    """An update may have been rounded; parameters may be halves; statistics are float32; no update is empty."""
    for dtype, update, parameter, statistic in (
        (torch.float32, True, True, True),
        (torch.bfloat16, True, True, False),
        (torch.int8, True, False, False),
    ):
        one = torch.ones(2, dtype=dtype)
        contents = [
            (answer_from_records, {"update": tensors(w=one), "receipt": RECEIPT}, update),
            (signed_over, {"w": one}, parameter),
            (signed_over, {"released/w": one}, statistic),
        ]
        for read, content, allowed in contents:
            with nullcontext() if allowed else pytest.raises(WireError):
                read(RecordDict(content) if read is answer_from_records else content)  # type: ignore[operator]
    with pytest.raises(WireError):
        answer_from_records(RecordDict({"update": tensors(), "receipt": RECEIPT}))


def test_an_update_is_the_very_bytes_that_travelled() -> None:
    update = Update.of(STATE, b"r")
    found = answer_from_records(through_bytes(answer_to_records(update)))
    assert found == update
    assert update.data == state_to_bytes(STATE)
    assert same_state(update.state, STATE)


def test_a_message_is_six_objects_however_many_tensors_it_carries() -> None:
    """Flower carries each by a call from process to process: message, content, two records, array, chunk."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    many = {f"{place:03d}": torch.full((3,), float(place)) for place in range(200)}
    for content in (
        sent(replace(REQUEST, state=many, released=many)),
        answer_to_records(Update.of(many, b"r")),
    ):
        message = Message(content, dst_node_id=5, message_type="train")
        assert len(get_all_nested_objects(message)) == 6


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"update": GOOD},
        {"receipt": RECEIPT},
        {"update": GOOD, "receipt": RECEIPT, "more": RECEIPT},
        {"update": GOOD, "receipt": RECEIPT, "loss": MetricRecord({"loss": 1.0})},
        {"update": GOOD, "receipt": RECEIPT, "refusal": ConfigRecord({"reason": "budget"})},
        {"update": RECEIPT, "receipt": RECEIPT},
        {"update": GOOD, "receipt": GOOD},
        {"update": GOOD, "receipt": ConfigRecord({})},
        {"update": GOOD, "receipt": ConfigRecord({"entries": "text"})},
        {"update": GOOD, "receipt": ConfigRecord({"entries": [b"r"]})},
        {"update": GOOD, "receipt": ConfigRecord({"entries": b"r", "users": 7})},
        {"refusal": ConfigRecord({})},
        {"refusal": ConfigRecord({"reason": "because user 7 said so"})},
        {"refusal": ConfigRecord({"reason": "budget", "detail": "left: 0.1"})},
        {"refusal": ConfigRecord({"reason": ["budget"]})},
        {"refusal": ConfigRecord({"reason": 1})},
        {"refusal": ConfigRecord({"reason": "Budget"})},
        {"refusal": MetricRecord({"reason": 1.0})},
        {"refusal": GOOD},
    ],
    ids=lambda content: ",".join(content) or "nothing",
)
def test_a_malformed_reply_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        answer_from_records(RecordDict(content))
    assert "7" not in str(caught.value)  # what was found is never quoted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("statement", "text"),
        ("statement", 3),
        ("statement", [b"bytes"]),
        ("statement", b"x" * 4097),
        ("signature", "text"),
        ("signature", True),
        ("plan", ["{}"]),
        ("plan", b"{}"),
        ("anchor", "not hex"),
        ("anchor", "abc"),
        ("anchor", b"ab"),
        ("more", 1),
    ],
)
def test_a_malformed_request_is_refused(field: str, value: Any) -> None:
    content = sent()
    content["round"][field] = value
    with pytest.raises(WireError):
        request_from_records(content)


@pytest.mark.parametrize("field", ["statement", "signature", "plan", "anchor"])
def test_a_request_without_a_field_is_refused(field: str) -> None:
    content = sent()
    del content["round"][field]
    with pytest.raises(WireError):
        request_from_records(content)


@pytest.mark.parametrize("record", ["broadcast", "round"])
def test_a_request_without_a_record_or_with_another_is_refused(record: str) -> None:
    content = sent()
    del content[record]
    with pytest.raises(WireError):
        request_from_records(content)
    content[record] = MetricRecord({"x": 1})
    with pytest.raises(WireError):
        request_from_records(content)


scalars = st.integers(-(2**31), 2**31) | st.floats() | st.booleans() | texts | st.binary(max_size=9)
configs = st.dictionaries(
    st.sampled_from(["statement", "signature", "plan", "anchor", "reason", "entries", "odd"]),
    scalars | st.lists(st.integers(0, 9), max_size=3),
    max_size=7,
).map(ConfigRecord)
records = configs | st.sampled_from([GOOD, MetricRecord({"x": 1.0}), *BAD_ARRAYS.values()])
contents = st.dictionaries(
    st.sampled_from(["broadcast", "round", "update", "receipt", "refusal", "odd"]),
    records,
    max_size=4,
)


@given(content=contents)
@settings(max_examples=300, deadline=None)
def test_anything_else_is_a_wire_error_or_exactly_an_answer(content: dict[str, Any]) -> None:
    try:
        answer = answer_from_records(RecordDict(dict(content)))
    except WireError:
        pass
    else:
        assert isinstance(answer, Update | Refusal)
        assert set(content) in ({"refusal"}, {"update", "receipt"})
    try:
        request_from_records(RecordDict(dict(content)))
    except WireError:
        return
    assert set(content) == {"broadcast", "round"}


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_for_tensors_are_refused(data: bytes) -> None:
    for prefix in (b"", len(data).to_bytes(8, "little"), WHOLE, WHOLE[:40]):
        if prefix + data != WHOLE:
            with pytest.raises(WireError):
                answer_from_records(RecordDict({"update": packed(prefix + data), "receipt": RECEIPT}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_whichever_writer_is_used_the_bytes_are_safetensors_own(dtype: torch.dtype) -> None:
    state = {
        "b": torch.arange(6).view(2, 3).to(dtype),
        "a": torch.ones(5),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(1.5),
    }
    assert state_to_bytes(state) == save_tensors(state)
    assert state_to_bytes({}) == save_tensors({})


def test_the_digest_is_that_of_names_shapes_and_bits() -> None:
    assert state_digest(STATE) == state_digest(dict(reversed(STATE.items())))
    assert state_digest(STATE) == state_digest(state_from_bytes(state_to_bytes(STATE)))
    others = [
        {**STATE, "a": torch.tensor([0.25])},
        {**STATE, "a": torch.tensor([[0.5]])},
        {"c": STATE["a"], "b.weight": STATE["b.weight"]},
        {"a": STATE["a"]},
    ]
    assert len({state_digest(state) for state in (STATE, *others)}) == 5
    assert REQUEST.model_digest == state_digest(STATE)
    beside = Request(
        run="run-a",
        round=3,
        attempt=1,
        nonce="",
        plan="",
        state=STATE,
        released={"popularity": torch.ones(2)},
    )
    assert beside.model_digest != REQUEST.model_digest  # what was released before is part of what is asked


def test_what_all_sites_get_is_read_once_and_each_other_broadcast_anew() -> None:
    nudged = {**STATE, "a": torch.nextafter(STATE["a"], torch.tensor(1.0))}
    swapped = replace(REQUEST, state={}, released=STATE)
    asked = [REQUEST, replace(REQUEST, nonce="cd" * 16), replace(REQUEST, state=nudged), swapped, REQUEST]
    read = [got(through_bytes(sent(each))) for each in asked]
    assert all(same_request(found, each) for found, each in zip(read, asked, strict=True))
    assert [found.model_digest for found in read] == [replace(each).model_digest for each in read]
    assert read[0].state is read[1].state
    assert len({found.model_digest for found in read}) == 3


def test_payload_is_the_weight_of_what_a_message_carries() -> None:
    heavy = {"w": torch.zeros(1000)}
    assert 4000 < payload_bytes(answer_to_records(Update.of(heavy, b"r" * 500))) - 500 < 4200
    assert payload_bytes(answer_to_records(Refusal(Reason.BUDGET))) == len("budget")
