"""Time and memory of a large catalog: `python -m simulations.benchmarks.catalog` prints a line for each stage.

A catalog of made-up titles, by default a million; a language model of random weights, by default as wide as
all-MiniLM-L6-v2 and of one layer (its weights change neither the time of a width nor the memory). First the catalog
is read by the model and a run's folder written; then, in a fresh process, `fedtide recommend`'s own path loads the
run and lists for one history of as many events as the model reads, all on one thread. Memory is the most that was
resident, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import make_plan
from common.events.catalog import Catalog
from common.models.build import build_model, item_texts
from server.recommending import load_recommender
from server.runs import RunFolder

_LETTERS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
_WORDS = [one + two + three for one in _LETTERS for two in "aeiou" for three in _LETTERS]


@dataclass(frozen=True)
class Stage:
    """What one stage took, in a process of its own."""

    name: str
    seconds: dict[str, float]
    gibibytes: float


def random_language_model(folder: Path, width: int) -> Path:
    """A BERT of one layer and random weights that knows the benchmark's words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
    vocabulary = {word: place for place, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def made_up_catalog(items: int) -> Catalog:
    """Titles of four words each, with the item's number so that no two are the same."""
    chosen = np.random.default_rng(0).integers(len(_WORDS), size=(items, 4))
    texts = tuple(" ".join([*(_WORDS[word] for word in row), str(n)]) for n, row in enumerate(chosen))
    return Catalog(ids=tuple(f"i{n}" for n in range(items)), texts=texts, categories=((),) * items)


def encode(folder: Path, items: int, width: int) -> dict[str, float]:
    """Reads the catalog, writes a finished run's folder; seconds of each part."""
    seconds, clock = {}, _Clock()
    language_model = random_language_model(folder / "language-model", width)
    catalog = made_up_catalog(items)
    plan = make_plan(
        {"name": "catalog", "model": {"encoder": str(language_model), "unknown_tokens": "allow"}}
    )
    seconds["made up"] = clock.lap()
    texts = item_texts(catalog.texts, catalog.categories)
    witness = plan.privacy.witness_places
    built = build_model(plan.model, texts, language_model, cache=_cache(folder), witness_places=witness)
    seconds["encoded"] = clock.lap()
    run = RunFolder.create(folder, plan, catalog)
    run.save_model(built.model.trainable_state())
    run.finish().path.rename(folder / "run")
    seconds["written"] = clock.lap()
    return seconds


def recommend(folder: Path, repeats: int = 5) -> dict[str, float]:
    """Loads the run and lists for one user; seconds of each part, the median of repeated ones."""
    seconds, clock = {}, _Clock()
    recommender = load_recommender(folder / "run", offline=True)
    seconds["loaded"] = clock.lap()
    titles = recommender.finished.catalog.texts[:: max(1, len(recommender.finished.catalog) // 50)][:50]
    events = recommender.read(titles)
    seconds["history read"] = clock.lap()
    for name, because in (("ten listed", 0), ("ten listed with reasons", 1)):
        laps = []
        for _ in range(repeats):
            found = recommender.top(events, 10, because=because)
            laps.append(clock.lap())
        assert len(found) == min(10, len(recommender.finished.catalog) - len(set(events)))
        seconds[name] = float(np.median(laps))
    return seconds


class _Clock:
    def __init__(self) -> None:
        self._began = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        took, self._began = now - self._began, now
        return took


def _cache(folder: Path) -> Path:
    return folder / "home" / "item-vectors"


def _measured(work: Callable[..., dict[str, float]], *arguments: object) -> tuple[dict[str, float], float]:
    torch.set_num_threads(1)
    seconds = work(*arguments)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(folder: Path, items: int, width: int) -> list[Stage]:
    """Both stages, each in a fresh process."""
    os.environ["FEDTIDE_HOME"] = str(folder / "home")
    stages = []
    for work, arguments in ((encode, (folder, items, width)), (recommend, (folder,))):
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as process:
            seconds, gibibytes = process.submit(_measured, work, *arguments).result()
        stages.append(Stage(work.__name__, seconds, gibibytes))
    return stages


def main() -> None:
    """Prints one JSON line a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--encoder-width", type=int, default=384)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for stage in measure(Path(folder), arguments.items, arguments.encoder_width):
            seconds = {name: round(value, 3) for name, value in stage.seconds.items()}
            print(
                json.dumps(
                    {
                        "items": arguments.items,
                        "stage": stage.name,
                        "seconds": seconds,
                        "GiB": round(stage.gibibytes, 2),
                    }
                )
            )


if __name__ == "__main__":
    main()
