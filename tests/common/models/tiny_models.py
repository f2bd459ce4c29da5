"""Tiny random language models of several architectures, and a catalog for them: built in memory, no download."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from common.models.language_model import LanguageModel, freeze

torch.set_num_threads(1)  # models this small are slower on many threads, and tests share the machine

WORDS = (
    *("red", "blue", "green", "sun", "moon", "star", "river", "hill", "tree", "stone"),
    *("fire", "rain", "wind", "snow", "leaf", "bird", "fish", "wolf", "bear", "fox"),
)
TEXTS = [
    " ".join(WORDS[(3 * row + column) % len(WORDS)] for column in range(1 + row % 4)) for row in range(12)
]
"""Twelve texts of one to four words."""

ARCHITECTURES = ("bert", "roberta", "distilbert", "electra", "gpt2", "llama", "qwen2")


def tiny_tokenizer() -> Any:
    """Whole words, with the special tokens that every architecture here may want."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "[PAD]", "</s>", "[UNK]"]  # RoBERTa counts positions from the padding id, 1
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>", bos_token="<s>"
    )


@cache
def tiny_language_model(
    architecture: str, *, layers: int = 3, dropout: float = 0.0, positions: int = 64, seed: int = 0
) -> LanguageModel:
    """A random model of an architecture: width 16, two heads, frozen. The same object each time: do not change it."""
    from transformers import AutoConfig, AutoModel

    tokenizer = tiny_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    encoder = {
        **common,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": positions,
    }
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    decoder = {**encoder, "num_key_value_heads": 1, "attention_dropout": dropout}
    fields: dict[str, dict[str, Any]] = {
        "bert": {**encoder, **drop},
        "roberta": {**encoder, **drop},
        "electra": {**encoder, **drop, "embedding_size": 8},
        "mpnet": {**encoder, **drop},
        "deberta-v2": {**encoder, **drop},
        "albert": {**encoder, **drop, "embedding_size": 8},
        "distilbert": {
            **common,
            "dim": 16,
            "n_layers": layers,
            "n_heads": 2,
            "hidden_dim": 32,
            "max_position_embeddings": positions,
            "dropout": dropout,
            "attention_dropout": dropout,
        },
        "gpt2": {
            **common,
            "n_embd": 16,
            "n_layer": layers,
            "n_head": 2,
            "n_positions": positions,
            "attn_pdrop": dropout,
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
        },
        "llama": decoder,
        "qwen2": decoder,
        "mistral": decoder,
        "modernbert": {**encoder, "global_attn_every_n_layers": 1, "attention_dropout": dropout},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(architecture, **fields[architecture])
        model = AutoModel.from_config(config)
        with torch.no_grad():  # the usual 0.02 makes attention almost uniform, which would hide faults
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3)
    return freeze(model, tokenizer)


def histories(rows: list[list[int]], *, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Items and times [users, events] of these histories, padded on the right."""
    events = width or max(len(row) for row in rows)
    items = torch.full((len(rows), events), -1, dtype=torch.int64)
    times = torch.zeros_like(items)
    for user, row in enumerate(rows):
        items[user, : len(row)] = torch.tensor(row, dtype=torch.int64)
        times[user, : len(row)] = 1_000_000_000 + 3600 * torch.arange(len(row)) * (user + 1)
    return items, times
