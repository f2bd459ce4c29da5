"""What the caches save: `python -m simulations.benchmarks.caches` adds a table to docs/benchmarks.md.

A catalog's texts through MiniLM, and the lower layers' states of a site's histories: the first time, and in the next
process, which reads the files through once. CPU time; reading them through is what every start pays.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from client.lower_states import prepare_kept
from common.assets import language_model
from common.models import array_cache
from common.models.history_encoder import item_tokens
from common.models.item_vectors import item_vectors
from common.models.language_model import load_language_model
from simulations.benchmarks.steps import OWN, SETTINGS, built, histories
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine

ITEMS, USERS = 1682, 500


def first_and_next(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first call, and of one in a process that has seen no file yet."""
    spent = []
    for _ in range(2):
        array_cache._seen_whole.clear()
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return spent[0], spent[1]


def measure(folder: Path) -> list[Row]:
    """The rows of the table."""
    lm = load_language_model(language_model("all-MiniLM-L6-v2"))
    texts = [f"The Long Story of {i} and the {i % 7} Rivers ({1900 + i % 90}). Drama" for i in range(ITEMS)]
    setting = replace(SETTINGS[-1], users=USERS)
    model, batch = built(setting, OWN), histories(setting)
    calls: dict[str, Callable[[], object]] = {
        f"states of {ITEMS:,} texts": lambda: item_vectors(lm, texts, 64, cache=folder / "texts"),
        f"tokens of {ITEMS:,} texts": lambda: item_tokens(lm, texts, 16, folder / "texts"),
        f"lower layers' states of {USERS} histories of {setting.events} events": lambda: prepare_kept(
            model, batch, 64, folder / "site"
        ),
    }
    rows = []
    for what, call in calls.items():
        first, then = first_and_next(call)
        rows.append(Row(f"{what}: first, and from the cache", f"{first:.2f} s, {then:.2f} s"))
    size = sum(file.stat().st_size for file in (folder / "site").iterdir())
    rows.append(Row("a site's file, for each user", f"{size / USERS / 1000:.0f} kB"))
    return rows


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    text = f"`python -m simulations.benchmarks.caches`, {machine()}; torch {torch.__version__}, one thread, CPU time."
    section = "\n".join(["## Caches", "", text, "", *as_table(rows), ""])
    print(section)
    if not given.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
