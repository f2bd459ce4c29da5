"""Admission of rounded updates: what was signed for is what travelled, and what is added up is what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor

from common.config import Precision
from common.precision import SCALES, decoded, encoded
from common.wire import state_to_bytes
from common.witness import WITNESS
from server import admission
from server.admission import Admitted, LeftOut, admit
from tests.server import bad_replies as corpus

State = dict[str, Tensor]
SHAPES = {**corpus.SHAPES, WITNESS: (6,)}
ROUNDED: tuple[Precision, ...] = ("bfloat16", "int8")


def update() -> State:
    return {**corpus.update(), WITNESS: torch.randn(6, generator=torch.Generator().manual_seed(9))}


def decide(it: corpus.Scene, content: RecordDict, precision: Precision) -> Admitted | LeftOut:
    expected = replace(corpus.expectation(), shapes=SHAPES, precision=precision)
    return admit(content, expected, it.registry, it.taken)


@pytest.fixture
def scene(tmp_path: Path) -> corpus.Scene:
    return corpus.scene(tmp_path / "registry")


@pytest.mark.parametrize("precision", ["float32", *ROUNDED])
def test_an_honest_rounded_update_is_admitted_decoded_and_kept_as_it_came(
    precision: Precision, scene: corpus.Scene
) -> None:
    plain = update()
    sent = encoded(plain, precision)
    verdict = decide(scene, corpus.reply(sent, corpus.answered(scene.site, sent)), precision)
    assert isinstance(verdict, Admitted)
    assert verdict.data == state_to_bytes(sent)
    assert {name: tuple(value.shape) for name, value in verdict.state.items()} == SHAPES
    for name, value in decoded(sent).items():
        assert verdict.state[name].dtype == torch.float32
        assert torch.equal(verdict.state[name], value)
        torch.testing.assert_close(value, plain[name], rtol=2**-7, atol=0.03)
    assert torch.equal(verdict.state[WITNESS], plain[WITNESS])


def changed(**tensors: Tensor) -> Callable[[State], State]:
    return lambda sent: {**sent, **tensors}


def scaled(value: float) -> Callable[[State], State]:
    return lambda sent: {**sent, SCALES: torch.full_like(sent[SCALES], value)}


BAD: dict[str, tuple[Precision, str, Callable[[State], State]]] = {
    "no scales": (
        "int8",
        "wrong_tensors",
        lambda sent: {name: value for name, value in sent.items() if name != SCALES},
    ),
    "scales where none belong": ("bfloat16", "wrong_tensors", changed(**{SCALES: torch.ones(1)})),
    "no witness": (
        "int8",
        "wrong_tensors",
        lambda sent: {name: value for name, value in sent.items() if name != WITNESS},
    ),
    "a scale too many": ("int8", "wrong_shape", changed(**{SCALES: torch.ones(2)})),
    "no scale": ("int8", "wrong_shape", changed(**{SCALES: torch.ones(0)})),
    "a million scales": ("int8", "wrong_shape", changed(**{SCALES: torch.ones(10**6)})),
    "a tensor of ten million": ("int8", "wrong_shape", changed(prior=torch.ones(10**7, dtype=torch.int8))),
    "a scale that is no number": ("int8", "bad_scales", scaled(float("nan"))),
    "a scale without an end": ("int8", "bad_scales", scaled(float("inf"))),
    "a negative scale": ("int8", "bad_scales", scaled(-0.1)),
    "a scale that makes it infinite": ("int8", "not_finite", scaled(3e38)),
    "a scale that makes it huge": ("int8", "over_norm", scaled(1e3)),
    "scales of zero": (
        "int8",
        "all_zero",
        lambda sent: {**scaled(0.0)(sent), WITNESS: torch.zeros(6)},
    ),
    "not rounded at all": ("int8", "wrong_precision", changed(prior=torch.ones(5))),
    "rounded otherwise": ("int8", "wrong_precision", changed(prior=torch.ones(5, dtype=torch.bfloat16))),
    "int8 for bfloat16": ("bfloat16", "wrong_precision", changed(prior=torch.ones(5, dtype=torch.int8))),
    "a rounded witness": ("int8", "wrong_precision", changed(witness=torch.ones(6, dtype=torch.int8))),
    "a witness of bfloat16": (
        "bfloat16",
        "wrong_precision",
        changed(witness=torch.ones(6, dtype=torch.bfloat16)),
    ),
    "rounded where float32 was asked": (
        "float32",
        "wrong_precision",
        changed(prior=torch.ones(5, dtype=torch.bfloat16)),
    ),
    "bfloat16 that is no number": (
        "bfloat16",
        "not_finite",
        changed(prior=torch.full((5,), float("nan"), dtype=torch.bfloat16)),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_encoding_is_left_out_by_its_own_name(
    name: str, scene: corpus.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed for by the site, every one of them: the form alone is at fault, and none is decoded before it is right."""
    precision, reason, change = BAD[name]
    sent = change(encoded(update(), precision))
    if reason.startswith(("wrong", "bad")):
        monkeypatch.setattr(admission, "decoded", lambda sent: pytest.fail("it was decoded"))
    verdict = decide(scene, corpus.reply(sent, corpus.answered(scene.site, sent)), precision)
    assert isinstance(verdict, LeftOut), "it was admitted"
    assert (verdict.reason, verdict.site) == (reason, "north")


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_receipt_is_over_the_bytes_as_sent(precision: Precision, scene: corpus.Scene) -> None:
    """Another rounding of the same update, its float32, or one step in one place: none is what was signed for."""
    plain = update()
    sent = encoded(plain, precision)
    signed = corpus.answered(scene.site, sent)
    step = dict(sent)
    step["prior"] = sent["prior"].clone()
    step["prior"].view(torch.int8 if precision == "int8" else torch.int16)[0] ^= 1
    again = next(
        each for _ in range(99) if state_to_bytes(each := encoded(plain, precision)) != state_to_bytes(sent)
    )
    for other in (again, decoded(sent), plain, step):
        verdict = decide(scene, corpus.reply(other, signed), precision)
        assert isinstance(verdict, LeftOut)
        assert verdict.reason == "wrong_digest"
    assert isinstance(decide(scene, corpus.reply(sent, signed), precision), Admitted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float16])
def test_other_numbers_are_malformed(dtype: torch.dtype, scene: corpus.Scene) -> None:
    sent = encoded(update(), "int8")
    sent["prior"] = sent["prior"].to(dtype)
    verdict = decide(scene, corpus.reply(sent, corpus.answered(scene.site, sent)), "int8")
    assert isinstance(verdict, LeftOut)
    assert verdict.reason == "malformed"
    assert "not float32" in verdict.explanation
