"""The reading of a history as one token sequence: causal over events, cached below, and the same as the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.models.batches import HistoryBatch, concatenate
from common.models.history_encoder import HistoryEncoder
from common.models.item_vectors import item_vectors
from common.models.language_model import (
    LanguageModel,
    LanguageModelError,
    load_language_model,
    transformer_layers,
)
from common.models.lora import LoraLinear
from tests.common.models.tiny_models import (
    ARCHITECTURES,
    TEXTS,
    histories,
    tiny_language_model,
    tiny_tokenizer,
)

ROWS = [[1, 2, 3, 4], [5, 6], [7], [3, 3, 8, 11]]


def encoder_of(
    lm: LanguageModel, *, texts: list[str] | None = None, move: bool = True, **fields: Any
) -> HistoryEncoder:
    texts = TEXTS if texts is None else texts
    fields = {"top_layers": 2, "rank": 2, "most_tokens": 20, **fields}
    encoder = HistoryEncoder(lm, texts, item_vectors(lm, texts, 6).projection, **fields)
    if move:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder


def batch_of(rows: list[list[int]], width: int | None = None) -> HistoryBatch:
    return HistoryBatch(*histories(rows, width=width))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_later_event_never_changes_an_earlier_one_and_an_earlier_one_changes_later_ones(
    architecture: str,
) -> None:
    encoder = encoder_of(tiny_language_model(architecture))
    rows = [[1, 2, 3, 4], [6, 5, 9, 8]]
    vectors = encoder(batch_of(rows))
    for place in range(4):
        changed = encoder(batch_of([[*row[:place], 10, *row[place + 1 :]] for row in rows]))
        torch.testing.assert_close(changed[:, :place], vectors[:, :place], rtol=0, atol=1e-5)
        assert ((changed - vectors)[:, place:].norm(dim=-1) > 1e-4).all()
    shorter = encoder(batch_of([row[:2] for row in rows], width=4))
    torch.testing.assert_close(shorter[:, :2], vectors[:, :2], rtol=0, atol=1e-5)


def naive(encoder: HistoryEncoder, rows: list[list[int]]) -> Tensor:
    """Event vectors from the whole model at once, pooled one event at a time."""
    batch = batch_of(rows)
    ids, token_events = encoder.token_sequences(batch.items)
    whole = encoder.model(
        input_ids=ids, attention_mask=encoder._attention(token_events), use_cache=False
    ).last_hidden_state
    out = torch.zeros(*batch.items.shape, encoder.rotation.shape[1])
    for user in range(len(rows)):
        for event in range(batch.items.shape[1]):
            tokens = whole[user][token_events[user] == event]
            if len(tokens):
                out[user, event] = nn.functional.normalize(
                    (tokens.mean(dim=0) - encoder.mean) @ encoder.rotation, dim=-1
                )
    return out


@pytest.mark.parametrize("top_layers", [1, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_lower_layers_and_top_layers_are_the_whole_model(architecture: str, top_layers: int) -> None:
    encoder = encoder_of(tiny_language_model(architecture), top_layers=top_layers)
    batch = batch_of(ROWS)
    cached = encoder.lower(batch)
    assert cached.token_states is not None
    assert not cached.token_states.requires_grad
    torch.testing.assert_close(encoder(cached), naive(encoder, ROWS), rtol=0, atol=1e-5)
    assert torch.equal(encoder(cached), encoder(batch))
    parts = [encoder.lower(batch.rows(torch.tensor([user]))) for user in range(len(ROWS))]
    torch.testing.assert_close(encoder(concatenate(parts)), encoder(cached), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_the_zero_start_of_adapters_the_model_is_the_frozen_one(architecture: str) -> None:
    lm = tiny_language_model(architecture)
    encoder = encoder_of(lm, move=False)
    assert sum(isinstance(module, LoraLinear) for module in encoder.modules()) >= 2
    batch = batch_of(ROWS)
    ids, token_events = encoder.token_sequences(batch.items)
    with_adapters = encoder._whole(ids, token_events)
    frozen = lm.model(
        input_ids=ids, attention_mask=encoder._attention(token_events), use_cache=False
    ).last_hidden_state
    assert torch.equal(with_adapters, frozen)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert not any(
        isinstance(module, LoraLinear) for module in lm.model.modules()
    )  # the original is untouched


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frozen_part_in_bfloat16_says_nearly_the_same(architecture: str) -> None:
    lm = tiny_language_model(architecture)
    usual, rounded = encoder_of(lm), encoder_of(lm, precision=torch.bfloat16)
    batch = batch_of(ROWS)
    lower = rounded.lower(batch)
    assert lower.token_states is not None
    assert lower.token_states.dtype == torch.float32
    assert rounded.lower_key(batch.items) != usual.lower_key(batch.items)
    vectors, found = usual(batch), rounded(lower)
    assert torch.equal(found, rounded(batch))
    assert found.dtype == torch.float32
    assert 1e-5 < float((found - vectors).detach().abs().max()) < 0.05
    trained = {name: parameter for name, parameter in rounded.named_parameters() if parameter.requires_grad}
    assert trained
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert next(lm.model.parameters()).dtype == torch.float32  # the original is untouched


def test_an_event_alone_is_read_as_the_language_model_reads_its_tokens() -> None:
    lm = tiny_language_model("bert")
    encoder = encoder_of(lm, move=False)
    ids = torch.tensor([lm.tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"]])
    states = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    expected = nn.functional.normalize((states.mean(dim=0) - encoder.mean) @ encoder.rotation, dim=-1)
    torch.testing.assert_close(encoder(batch_of([[3]]))[0, 0], expected, rtol=0, atol=1e-5)


def test_the_most_recent_whole_events_are_kept() -> None:
    encoder = encoder_of(tiny_language_model("bert"), most_tokens=8)
    # Item r has 1 + r % 4 tokens: 3 and 7 have four, 2 has three, 4 has one.
    ids, events = encoder.token_sequences(batch_of([[3, 2, 4, 7], [4], [3, 7, 2, 4]]).items)
    assert ids.shape == events.shape == (3, 8)
    assert events[0].tolist() == [1, 1, 1, 2, 3, 3, 3, 3]  # item 3 does not fit any more
    assert events[1].tolist() == [0] + [-1] * 7
    assert events[2].tolist() == [1, 1, 1, 1, 2, 2, 2, 3]
    assert (ids[events < 0] == 0).all()
    vectors = encoder(batch_of([[3, 2, 4, 7]]))
    assert not vectors[0, 0].any()
    assert (vectors[0, 1:].norm(dim=-1) > 0.99).all()
    # Not a later event that would fit, once one did not: 2 has no room, so 4 before it is gone too.
    _, events = encoder.token_sequences(batch_of([[4, 2, 3, 6]]).items)
    assert events[0].tolist() == [2, 2, 2, 2, 3, 3, 3, -1]


def test_an_item_longer_than_all_the_room_is_cut_and_read() -> None:
    long = [" ".join(["red sun blue moon"] * 10), *TEXTS]
    encoder = encoder_of(tiny_language_model("bert"), texts=long, most_tokens=8)
    vectors = encoder(batch_of([[2, 0], [0]]))
    assert float(vectors[0, 1].detach().norm()) == pytest.approx(1, abs=1e-5)
    assert float(vectors[1, 0].detach().norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "gpt2"])
def test_more_tokens_than_positions_are_never_read(architecture: str) -> None:
    encoder = encoder_of(tiny_language_model(architecture, positions=12), most_tokens=500)
    assert encoder.most_tokens == (10 if architecture == "roberta" else 12)
    vectors = encoder(batch_of([[3] * 9]))
    assert vectors.isfinite().all()
    assert float(vectors[0, -1].detach().norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
def test_empty_texts_and_empty_histories_give_finite_vectors(architecture: str) -> None:
    texts = ["", *TEXTS[1:], "  ", "千と千尋"]
    encoder = encoder_of(tiny_language_model(architecture), texts=texts)
    vectors = encoder(batch_of([[0, 12, 13], [], [0], [3, 0]], width=3))
    assert vectors.isfinite().all()
    assert not vectors[1].any()
    (vectors**2).sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_a_catalog_of_no_text_at_all_is_read_as_nothing_known() -> None:
    lm = tiny_language_model("bert")
    projection = item_vectors(lm, TEXTS, 6).projection
    encoder = HistoryEncoder(lm, ["", ""], projection, top_layers=1, rank=2)
    assert encoder(batch_of([[0, 1]])).isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "bert", "gpt2", "distilbert"])
def test_no_dropout_is_left_whatever_mode_the_model_is_in(architecture: str) -> None:
    encoder = encoder_of(tiny_language_model(architecture, dropout=0.5)).train()
    batch = batch_of(ROWS)
    assert torch.equal(encoder(batch), encoder(batch))
    torch.testing.assert_close(encoder(batch), encoder.eval()(batch))


def test_adapters_start_the_same_at_every_site_and_differ_by_seed() -> None:
    lm = tiny_language_model("bert")
    downs = [
        next(m.lora_down.weight for m in encoder_of(lm, seed=seed).modules() if isinstance(m, LoraLinear))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2])


# Language models that cannot be used are refused in words.


@pytest.mark.parametrize("architecture", ["albert", "deberta-v2", "mpnet"])
def test_an_architecture_that_cannot_be_read_event_by_event_is_refused_in_words(architecture: str) -> None:
    lm = tiny_language_model(architecture)
    with pytest.raises(LanguageModelError, match="use frozen item vectors with it"):
        encoder_of(lm)


class MaskBlind(nn.Module):
    """A layer through which every token sees every other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.layer(hidden_states, *args, **kwargs)
        return out + hidden_states.mean(dim=1, keepdim=True)


class Noisy(MaskBlind):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.layer(hidden_states, *args, **kwargs)
        return out + torch.randn_like(out)


class Failing(MaskBlind):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError(f"wrong shape for attention_mask: {hidden_states.shape}")


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (MaskBlind, "lets an event see later ones"),
        (Noisy, "reads the same history differently each time"),
        (Failing, r"cannot read a history event by event \(ValueError\)"),
    ],
)
def test_a_model_that_breaks_the_rules_of_reading_is_refused(layer: type[MaskBlind], said: str) -> None:
    projection = item_vectors(tiny_language_model("bert"), TEXTS, 6).projection
    lm = copy.deepcopy(tiny_language_model("bert"))
    layers = transformer_layers(lm.model)
    layers[0] = layer(layers[0])
    with pytest.raises(LanguageModelError, match=said):
        HistoryEncoder(lm, TEXTS, projection, top_layers=2, rank=2)


@pytest.mark.parametrize("top_layers", [0, 4])
def test_more_adapted_layers_than_there_are_is_refused_with_the_bound(top_layers: int) -> None:
    with pytest.raises(LanguageModelError, match=f"lora_layers is {top_layers}, .* choose 1 to 3"):
        encoder_of(tiny_language_model("bert"), top_layers=top_layers)


def test_a_model_comes_back_from_its_folder_and_a_broken_folder_is_refused(tmp_path: Path) -> None:
    lm = tiny_language_model("bert")
    folder = tmp_path / "model"
    lm.model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    again = load_language_model(folder)
    assert again.width == lm.width
    assert again.causal is False
    weights = again.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in lm.model.state_dict().items())
    (folder / "model.safetensors").unlink()
    for broken in (folder, tmp_path / "missing"):
        with pytest.raises(LanguageModelError, match="holds no language model that can be read") as caught:
            assert load_language_model(broken).model
        assert "\n" not in str(caught.value)


def test_decoders_are_known_as_causal_and_encoders_are_not() -> None:
    causal = {name: tiny_language_model(name).causal for name in ARCHITECTURES}
    assert {name for name, value in causal.items() if value} == {"gpt2", "llama", "qwen2"}
