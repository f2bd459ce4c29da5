"""A federation so small that a round takes a fraction of a second, and yet everything in it is real.

A BERT of random weights with a vocabulary of about fifty words, a catalog of thirty items in those words, and
a synthetic log. Nothing is fetched. What the model learns here means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import Plan, make_plan
from simulations.datasets import Dataset, load_own
from simulations.federation import SimulationOptions, simulate
from simulations.outcome import Outcome

SITES, USERS, ITEMS = 4, 120, 30
"""Sites, users over all of them (about thirty each), items."""

USERS_PER_SITE = 15
"""A public lower bound that every one of the four sites keeps."""

WORDS = (
    *("red", "blue", "green", "black", "white", "silver", "golden", "small", "large", "quiet"),
    *("river", "mountain", "city", "garden", "winter", "summer", "night", "morning", "ocean", "desert"),
    *("story", "song", "guide", "history", "letters", "dream", "journey", "secret", "house", "road"),
    *("lamp", "chair", "table", "clock", "coat", "shoes", "kettle", "radio", "bicycle", "camera"),
)
KINDS = ("book", "film", "tool")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tiny_language_model(folder: Path) -> Path:
    """Writes a BERT of two layers, sixteen wide, with seeded random weights; returns its folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: place for place, word in enumerate((*_SPECIAL, *WORDS, *KINDS, ".", ","))}
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


def tiny_files(folder: Path, users: int = USERS, items: int = ITEMS) -> tuple[Path, Path]:
    """Writes a log and its public catalog as CSV; each user has 8 to 14 events, mostly of one kind of item."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(3)
    texts = [" ".join(chance.choice(WORDS, size=3, replace=False)) for _ in range(items)]
    catalog = folder / "catalog.csv"
    rows = [f"i{item},{texts[item]},{KINDS[item % len(KINDS)]}" for item in range(items)]
    catalog.write_text("\n".join(["item,text,categories", *rows]) + "\n", encoding="utf-8")
    log = folder / "log.csv"
    events = ["user,item,time"]
    for user in range(users):
        liked = [item for item in range(items) if item % len(KINDS) == user % len(KINDS)]
        for event in range(int(chance.integers(8, 15))):
            item = chance.choice(liked) if chance.random() < 0.8 else chance.integers(items)
            events.append(f"u{user},i{item},{1_700_000_000 + 3600 * event + user}")
    log.write_text("\n".join(events) + "\n", encoding="utf-8")
    return log, catalog


def tiny_dataset(folder: Path, users: int = USERS) -> Dataset:
    """The synthetic log and catalog as a simulation's data set."""
    log, catalog = tiny_files(folder, users)
    return load_own(log, catalog)


def tiny_plan(language_model: Path, **values: Any) -> Plan:
    """A calibrated plan of two rounds of two steps; `values` are sections, as in a plan's file."""
    plan: dict[str, dict[str, Any]] = {
        "model": {"encoder": str(language_model), "width": 8, "hidden_width": 4, "max_events": 12},
        "privacy": {
            "delta": 1e-5,
            "sampling_rate": 0.5,
            "users_per_site": USERS_PER_SITE,
            "noise_multiplier": 2.0,
        },
        "training": {"rounds": 2, "steps_per_round": 2},
    }
    name = values.pop("name", "tiny")
    for section, fields in values.items():
        plan.setdefault(section, {}).update(fields)
    return make_plan({"name": name, **plan})


def tiny_options(runs: Path, **values: Any) -> SimulationOptions:
    """One process, four sites by hash, no baselines."""
    options = SimulationOptions(
        engine="inline", runs=runs, sites_by="hash", n_sites=SITES, baseline_epochs=0, cpus=1, offline=True
    )
    return replace(options, **values)


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Fedtide's cache in a folder of one's own, inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(folder))
        yield


def tiny_run(folder: Path, *, plan: dict[str, Any] | None = None, **options: Any) -> Outcome:
    """A finished federation: language model, log and cache under `folder`, the run under `folder`/runs."""
    model, data = folder / "language-model", folder / "data"
    if not model.is_dir():
        tiny_language_model(model)
    with own_cache(folder / "cache"):
        return simulate(
            tiny_dataset(data), tiny_plan(model, **(plan or {})), tiny_options(folder / "runs", **options)
        )
