"""A large catalog goes the way of the benchmark's million: read in parts, mapped from the cache, listed in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.models import item_vectors
from server import recommending
from server.recommending import load_recommender
from simulations.benchmarks.catalog import encode, recommend

ITEMS, WIDTH = 50_000, 16


def test_fifty_thousand_items_are_encoded_in_parts_once_and_listed_with_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTIDE_HOME", str(tmp_path / "home"))
    parts: list[int] = []
    embed = item_vectors.embed_texts
    monkeypatch.setattr(
        item_vectors, "embed_texts", lambda lm, texts: parts.append(len(texts)) or embed(lm, texts)
    )
    encode(tmp_path, ITEMS, WIDTH)
    assert sum(parts) == ITEMS
    assert max(parts) == item_vectors._ROWS_AT_ONCE < ITEMS
    (file,) = (tmp_path / "home" / "item-vectors").iterdir()
    assert np.load(file, mmap_mode="r").shape == (ITEMS, WIDTH)

    monkeypatch.setattr(recommending, "_SCORES_AT_ONCE", 4 * ITEMS)
    assert set(recommend(tmp_path, repeats=1)) > {"loaded", "ten listed with reasons"}
    recommender = load_recommender(tmp_path / "run", offline=True)
    assert sum(parts) == ITEMS  # loading twice read nothing anew
    texts = recommender.finished.catalog.texts
    scored: list[int] = []
    scores = type(recommender).scores
    monkeypatch.setattr(
        type(recommender), "scores", lambda self, of: scored.append(len(of)) or scores(self, of)
    )
    events = recommender.read([*texts[100:110], "bab cec did"])
    assert [event.exact for event in events] == [True] * 10 + [False]
    found = recommender.top(events, 10, because=2)
    assert max(scored) == 4
    assert len(found) == 10
    assert all(len(each.because) == 2 for each in found)
    assert not {event.row for event in events} & {int(each.item[1:]) for each in found}
