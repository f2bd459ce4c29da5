"""Padding, order and the longest title move no vector, and whether a model reads both ways is found out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.models.history_encoder import HistoryEncoder
from common.models.item_vectors import item_vectors
from common.models.language_model import LanguageModelError, embed_texts, freeze, load_language_model
from tests.common.models.folders import saved
from tests.common.models.tiny_models import TEXTS, tiny_language_model, tiny_tokenizer

BOTH_WAYS = (
    *("bert", "ernie", "roformer", "big_bird", "rembert", "roberta-prelayernorm", "xlm-roberta", "camembert"),
    *("megatron-bert", "data2vec-text", "xmod", "eurobert", "jina_embeddings_v3", "luke"),
)
ONE_WAY = ("gpt2", "gpt_neo", "gptj", "bloom", "opt", "llama", "mamba", "biogpt", "phi", "gpt_neox", "falcon")
PADDING_GETS_IN = ("fnet", "mobilebert", "nystromformer", "yoso", "convbert")


@pytest.mark.parametrize("kind", BOTH_WAYS)
def test_a_model_that_reads_both_ways_is_found_out(tmp_path: Path, kind: str) -> None:
    assert load_language_model(saved(tmp_path / "model", kind)).causal is False


@pytest.mark.parametrize("kind", ONE_WAY)
def test_a_model_that_reads_one_way_is_found_out(tmp_path: Path, kind: str) -> None:
    assert load_language_model(saved(tmp_path / "model", kind)).causal is True


@pytest.mark.parametrize("kind", ["ernie", "big_bird", "rembert", "roberta-prelayernorm"])
def test_in_mode_lora_an_event_sees_the_whole_of_its_own_text_both_ways(tmp_path: Path, kind: str) -> None:
    lm = load_language_model(saved(tmp_path / "model", kind))
    encoder = HistoryEncoder(lm, TEXTS, item_vectors(lm, TEXTS, 4).projection, top_layers=1)
    ids = torch.tensor([[5, 6, 7, 8]])
    event = torch.zeros_like(ids)
    alone = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(encoder._whole(ids, event), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "ernie", "big_bird", "gpt2", "llama", "bloom", "mamba", "xlnet"])
def test_batch_order_and_the_longest_title_move_no_vector(tmp_path: Path, kind: str) -> None:
    lm = load_language_model(saved(tmp_path / "model", kind))
    texts = ["red sun", "fox", " ".join(["blue moon star"] * 60), "river hill tree stone fire"]
    together = embed_texts(lm, texts)
    backwards = embed_texts(lm, texts[::-1]).flip(0)
    room = 1e-4 * float(together.abs().max())
    torch.testing.assert_close(backwards, together, rtol=0, atol=room)
    for row, text in enumerate(texts):
        torch.testing.assert_close(embed_texts(lm, [text])[0], together[row], rtol=0, atol=room)


@pytest.mark.parametrize("kind", PADDING_GETS_IN)
def test_a_model_that_lets_padding_in_is_refused_before_a_vector_is_made(tmp_path: Path, kind: str) -> None:
    lm = load_language_model(saved(tmp_path / "model", kind))
    with pytest.raises(
        LanguageModelError, match=f"type {kind} reads a text of 3 tokens otherwise beside one of"
    ):
        embed_texts(lm, TEXTS)


def test_states_of_another_width_than_the_config_says_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LanguageModelError, match=r"type reformer gives states of shape \(3, 32\) for 3 tokens"
    ):
        embed_texts(load_language_model(saved(tmp_path / "model", "reformer")), TEXTS)


class Leaky(nn.Module):
    """A layer whose states take something of every row of the batch, or of every place of the longest row."""

    def __init__(self, layer: nn.Module, over: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.over = layer, over

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.layer(hidden_states, *args, **kwargs)
        return out + 0.05 * hidden_states.mean(dim=self.over, keepdim=True)


@pytest.mark.parametrize("over", [(0,), (1,), (0, 1)])
def test_what_leaks_from_the_batch_is_refused_whatever_the_architecture(over: tuple[int, ...]) -> None:
    model = copy.deepcopy(tiny_language_model("bert").model)
    model.encoder.layer[0] = Leaky(model.encoder.layer[0], over)  # type: ignore[union-attr, operator, index]
    with pytest.raises(LanguageModelError, match="reads a text of"):
        freeze(model, tiny_tokenizer())


class BesideBlind(nn.Module):
    """A layer that adds a mean over the batch: it reads one history alone as ever, and two otherwise."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.layer(hidden_states, *args, **kwargs)
        return out + hidden_states - hidden_states.mean(dim=0, keepdim=True)


def test_in_mode_lora_too_what_stands_beside_a_history_moves_nothing() -> None:
    lm = copy.deepcopy(tiny_language_model("bert"))
    projection = item_vectors(lm, TEXTS, 4).projection
    lm.model.encoder.layer[0] = BesideBlind(lm.model.encoder.layer[0])  # type: ignore[union-attr, operator, index]
    with pytest.raises(LanguageModelError, match="reads a history otherwise beside a longer one"):
        HistoryEncoder(lm, TEXTS, projection, top_layers=1, rank=2)
