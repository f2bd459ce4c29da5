"""Updates rounded to bfloat16 and int8: unbiased, within their bounds, of the noised update alone, and read back."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from torch import Tensor

from common.config import Precision
from common.precision import (
    BLOCK,
    DTYPES,
    SCALES,
    EncodingError,
    blocks,
    broadcast,
    check_form,
    decoded,
    encoded,
)
from common.wire import (
    Request,
    SignedRequest,
    Update,
    answer_from_records,
    answer_to_records,
    payload_bytes,
    request_from_records,
    request_to_records,
    state_from_bytes,
    state_to_bytes,
)
from common.witness import WITNESS
from tests.common.test_wire import through_bytes

ROUNDED: tuple[Precision, ...] = ("bfloat16", "int8")
FEW = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda value: abs(value) < 1e38)


def noised(count: int = 700, seed: int = 0) -> dict[str, Tensor]:
    """An update of three tensors, one of them a witness, as large as noise and ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    values[::50] *= 10
    return {"b": values[: count // 2].view(-1, 2), "a": values[count // 2 :], WITNESS: torch.randn(9)}


def shapes_of(update: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in update.items()}


def test_the_mean_of_every_bfloat16_draw_is_the_value_itself() -> None:
    values = torch.tensor([1.2345, -1.2345, 3e-39, -7e-42, 3e38, 1e-3, 2.0, 0.0, 255.99, -1 + 2**-20])
    every = np.arange(1 << 16, dtype="<u2").tobytes()
    for value in values:
        back = decoded(encoded({"w": value.expand(1 << 16)}, "bfloat16", lambda count: every))["w"]
        assert float(back.double().mean()) == float(value)


def test_the_mean_of_int8_draws_is_the_value_itself_and_the_nearest_would_not_be() -> None:
    values = torch.zeros(BLOCK)
    values[:7] = torch.tensor([1.2345, -1.2345, 1e-3, -0.9999, 0.5, 0.0, 1e-30])
    rows = 1 << 12  # blocks, whose draws are spread evenly over all that there are
    update = {"w": values.expand(rows, -1)}
    scale = float(encoded(update, "int8")[SCALES][0])
    spread = np.repeat((np.arange(rows) << 20).astype("<u4"), BLOCK).tobytes()
    half = np.full(rows * BLOCK, 1 << 31, dtype="<u4").tobytes()

    def apart(draws: bytes) -> Tensor:
        return (decoded(encoded(update, "int8", lambda count: draws))["w"].double().mean(0) - values).abs()

    bound = scale / rows + 1e-6 * values.abs()
    assert bool((apart(spread) <= bound).all())
    assert not bool((apart(half) <= bound).all())  # always to the nearest


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_systems_own_draws_are_unbiased_and_differ(precision: Precision) -> None:
    update, rounds = noised(), 1000
    plain = torch.cat([update["a"], update["b"].flatten()]).double()
    total = torch.zeros_like(plain)
    for _ in range(rounds):
        back = decoded(encoded(update, precision))
        total += torch.cat([back["a"], back["b"].flatten()]).double() - plain
    by_place = encoded(update, "int8")[SCALES].double().repeat_interleave(BLOCK)[: plain.numel()]
    step = by_place if precision == "int8" else 2.0**-7 * plain.abs()
    off = (total / rounds).abs() / (
        0.5 * step / rounds**0.5
    )  # in standard errors of a draw of a half, or fewer
    assert 0.3 < float(off.max()) < 6
    a_half = b"\x00\x80" if precision == "bfloat16" else b"\x00\x00\x00\x80"
    nearest = decoded(encoded(update, precision, lambda count: a_half * (count // len(a_half))))
    kept = torch.cat([nearest["a"], nearest["b"].flatten()]).double() - plain
    assert float((kept.abs() / (0.5 * step / rounds**0.5)).max()) > 6  # the same each time
    once, again = (state_to_bytes(encoded(update, precision)) for _ in range(2))
    assert once != again


@given(
    values=stnp.arrays(np.float32, stnp.array_shapes(max_dims=2, max_side=40), elements=FEW),
    precision=st.sampled_from(ROUNDED),
)
@settings(max_examples=150, deadline=None)
def test_errors_stay_below_their_bounds_and_a_second_rounding_changes_nothing(
    values: Any, precision: Precision
) -> None:
    update = {"w": torch.from_numpy(np.array(values))}
    sent = encoded(update, precision)
    assert sent["w"].dtype == DTYPES[precision]
    back = decoded(sent)["w"].double()
    apart = (back - update["w"].double()).abs().flatten()
    if precision == "bfloat16":
        bound = 2.0**-7 * update["w"].double().abs().flatten() + 2.0**-133
        assert torch.equal(decoded(encoded(decoded(sent), precision))["w"].double(), back)
    else:
        by_place = sent[SCALES].double().repeat_interleave(BLOCK)[: apart.numel()]
        bound = by_place * (1 + 1e-5) + 2.0**-149
        largest = max(float(update["w"].abs().max()), 0.0)
        assert float(sent[SCALES].max()) <= largest / 127 * (1 + 1e-6) + 2.0**-149
    assert bool((apart <= bound).all())


@pytest.mark.parametrize("precision", ["float32", *ROUNDED])
@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_what_is_sent_is_what_is_read_through_bytes_and_messages(precision: Precision, count: int) -> None:
    update = {"w": torch.randn(count), WITNESS: torch.randn(5)}
    sent = encoded(update, precision)
    check_form(sent, shapes_of(update), precision)
    answer = answer_from_records(through_bytes(answer_to_records(Update.of(sent, b"r"))))
    assert isinstance(answer, Update)
    assert state_to_bytes(answer.state) == state_to_bytes(sent)
    kept = state_from_bytes(state_to_bytes(sent))
    for read in (answer.state, kept):
        back = decoded(read)
        assert set(back) == set(update)
        assert all(value.dtype == torch.float32 for value in back.values())
        assert all(torch.equal(back[name], decoded(sent)[name]) for name in update)
        assert torch.equal(back[WITNESS], update[WITNESS])
    if precision == "float32":
        assert state_to_bytes(sent) == state_to_bytes(update)


def test_int8_is_a_quarter_and_bfloat16_a_half() -> None:
    update = {"w": torch.randn(100 * BLOCK)}
    weights = {
        precision: sum(value.nbytes for value in encoded(update, precision).values()) for precision in DTYPES
    }
    assert weights["bfloat16"] * 2 == weights["float32"]
    assert weights["int8"] * 4 == weights["float32"] * (1 + 4 / BLOCK)


def test_the_variance_that_rounding_adds_to_noise_is_what_the_docstring_says() -> None:
    noise = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1))
    for precision, low, high in (("bfloat16", 4e-6, 7e-6), ("int8", 7e-5, 1.1e-4)):
        apart = decoded(encoded({"w": noise}, precision))["w"] - noise  # type: ignore[arg-type]
        assert low < float(apart.square().mean()) < high


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_rounded(precision: Precision, value: float) -> None:
    with pytest.raises(EncodingError, match="not finite"):
        encoded({"w": torch.tensor([1.0, value])}, precision)


def test_what_bfloat16_cannot_hold_is_said() -> None:
    largest = torch.full((400,), torch.finfo(torch.float32).max)
    with pytest.raises(EncodingError, match="too large for bfloat16"):
        encoded({"w": largest}, "bfloat16")
    assert decoded(encoded({"w": largest / 2}, "int8"))["w"].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 2e-44, 1e-38])
def test_blocks_of_nothing_and_of_almost_nothing_stay_on_the_grid(value: float) -> None:
    update = {"w": torch.full((BLOCK + 3,), value)}
    sent = encoded(update, "int8")
    assert int(sent["w"].abs().max()) <= 127
    assert float((decoded(sent)["w"] - update["w"]).abs().max()) <= max(float(sent[SCALES].max()), 2.0**-149)


def test_the_form_is_checked_by_name_before_anything_is_decoded() -> None:
    update = noised()
    shapes = shapes_of(update)
    sent = encoded(update, "int8")
    count = blocks(700)
    cases: dict[str, list[dict[str, Tensor]]] = {
        "wrong_tensors": [
            {name: value for name, value in sent.items() if name != SCALES},
            {**sent, "more": torch.zeros(1)},
            {name: value for name, value in sent.items() if name != WITNESS},
            update,
        ],
        "wrong_shape": [
            {**sent, SCALES: torch.ones(count + 1)},
            {**sent, SCALES: torch.ones(10**6)},
            {**sent, SCALES: torch.ones(0)},
            {**sent, SCALES: torch.ones(count, 1)},
            {**sent, "a": sent["a"][:-1]},
        ],
        "wrong_precision": [
            {**sent, "a": sent["a"].float()},
            {**sent, "a": sent["a"].to(torch.bfloat16)},
            {**sent, WITNESS: sent[WITNESS].to(torch.bfloat16)},
            {**sent, SCALES: sent[SCALES].to(torch.bfloat16)},
        ],
        "bad_scales": [
            {**sent, SCALES: torch.cat([torch.tensor([value]), sent[SCALES][1:]])}
            for value in (float("nan"), float("inf"), -1e-9)
        ],
    }
    check_form(sent, shapes, "int8")
    for reason, bad in cases.items():
        for each in bad:
            with pytest.raises(EncodingError) as caught:
                check_form(each, shapes, "int8")
            assert caught.value.reason == reason
    for precision in ("float32", "bfloat16"):
        with pytest.raises(EncodingError):
            check_form(sent, shapes, precision)


@pytest.mark.parametrize("scales", [None, torch.ones(2), torch.ones(10**6), torch.ones(1, 1)])
def test_a_file_whose_scales_do_not_fit_is_not_decoded(scales: Tensor | None) -> None:
    sent = {"w": torch.ones(9, dtype=torch.int8)} | ({} if scales is None else {SCALES: scales})
    with pytest.raises(EncodingError, match="number of scales"):
        decoded(sent)


def test_parameters_are_broadcast_to_the_nearest_and_the_same_each_time() -> None:
    state = noised()
    sent = broadcast(state, "bfloat16")
    assert state_to_bytes(sent) == state_to_bytes(broadcast(state, "bfloat16"))
    assert state_to_bytes(sent) == state_to_bytes(broadcast(sent, "bfloat16"))
    assert state_to_bytes(broadcast(state, "float32")) == state_to_bytes(state)
    for name, value in state.items():
        assert sent[name].dtype == torch.float32
        assert bool(((sent[name] - value).abs() <= 2.0**-8 * value.abs()).all())
        assert not torch.equal(sent[name], value)


def asked(state: dict[str, Tensor]) -> Request:
    return Request(run="run-a", round=1, attempt=1, nonce="ab" * 16, plan="{}", state=state, site="cd" * 32)


def sent(request: Request) -> RecordDict:
    return request_to_records(SignedRequest.of(request, Ed25519PrivateKey.generate(), expires=2**31))


def test_what_bfloat16_holds_whole_travels_as_it_and_comes_back_bit_for_bit() -> None:
    odd = torch.tensor([0.0, -0.0, float("inf"), -1e-40, 3e38, 1.5])
    state = {"w": torch.randn(4000), "odd": odd}
    state = broadcast(state, "bfloat16")
    state["w"].view(torch.int32)[0] = 0x7FC10000  # NaN with a load of its own
    content = through_bytes(sent(asked(state)))
    read = request_from_records(content).request()
    assert state_to_bytes(read.state) == state_to_bytes(state)
    assert read.model_digest == asked(state).model_digest
    assert 8000 < payload_bytes(content) < 9000
    state["w"].view(torch.int32)[7] ^= 1  # one bit that bfloat16 lacks, and the tensor travels whole
    content = through_bytes(sent(asked(state)))
    assert state_to_bytes(request_from_records(content).request().state) == state_to_bytes(state)
    assert payload_bytes(content) > 16000


def test_draws_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """No seed repeats a rounding, and nothing of the noise's stream is taken."""
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(state_to_bytes(encoded({"w": torch.linspace(-1, 1, 999)}, "int8")))
    assert states[0] != states[1]
    assert encoded.__defaults__ == (os.urandom,)
