"""A language model, a log and plans so small that a round takes seconds, and yet everything in them is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.config import Plan, make_plan

USERS, ITEMS, USERS_AT_LEAST = 60, 30, 40
STEPS = 120
"""Of a round: long enough for something to break in it."""

WORDS = (
    *("red", "blue", "green", "black", "white", "silver", "golden", "small", "large", "quiet"),
    *("river", "mountain", "city", "garden", "winter", "summer", "night", "morning", "ocean", "desert"),
)
_KINDS = ("book", "film", "tool")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_language_model(folder: Path) -> Path:
    """Writes a BERT of two layers, sixteen wide, with seeded random weights; returns its folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: place for place, word in enumerate((*_SPECIAL, *WORDS, *_KINDS, ".", ","))}
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_data(folder: Path) -> tuple[Path, Path]:
    """Writes a made-up log and its public catalog."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(3)
    texts = [" ".join(chance.choice(WORDS, size=3, replace=False)) for _ in range(ITEMS)]
    catalog, log = folder / "catalog.csv", folder / "log.csv"
    rows = [f"i{item},{texts[item]},{_KINDS[item % len(_KINDS)]}" for item in range(ITEMS)]
    catalog.write_text("\n".join(["item,text,categories", *rows]) + "\n", encoding="utf-8")
    events = ["user,item,time"]
    for user in range(USERS):
        for event in range(int(chance.integers(8, 15))):
            item = 3 * int(chance.integers(ITEMS // 3)) + user % 3
            events.append(f"u{user},i{item},{1_700_000_000 + 3600 * event + user}")
    log.write_text("\n".join(events) + "\n", encoding="utf-8")
    return log, catalog


def tiny_plan(language_model: Path, name: str, rounds: int = 3, **server: Any) -> Plan:
    """Popularity, then some rounds of training; a round needs two sites and waits a while for the third."""
    return make_plan(
        {
            "name": name,
            "model": {"encoder": str(language_model), "width": 8, "hidden_width": 4, "max_events": 12},
            "privacy": {
                "epsilon": 2.0,
                "delta": 1e-5,
                "sampling_rate": 0.5,
                "users_per_site": USERS_AT_LEAST,
                "noise_multiplier": 40.0,
            },
            "statistics": {"popularity_share": 0.2},
            "training": {"rounds": rounds, "steps_per_round": STEPS},
            "server": {"minimum_sites": 2, "quorum": 2, "grace": 30.0, "round_deadline": 90.0, **server},
        }
    )
