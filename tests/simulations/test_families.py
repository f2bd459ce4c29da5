"""Every family from the command line and from Python: trained, saved, loaded, asked and explained, for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.models.names import FAMILIES
from tests.tiny import own_cache, tiny_files, tiny_language_model

CASES = [(family, "vectors") for family in FAMILIES] + [("classifier", "lora"), ("ensemble", "lora")]


def fedtide(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """Runs the `fedtide` command in this process; what it printed as JSON."""
    from common.cli import main

    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--json", "--offline"])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    found: dict[str, Any] = json.loads(printed.out)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, log and catalog."""
    folder = tmp_path_factory.mktemp("families")
    tiny_language_model(folder / "model")
    tiny_files(folder / "data", users=60)
    return folder


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_a_family_trains_saves_loads_predicts_and_explains(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, mode: str
) -> None:
    from server.recommending import load_recommender

    options = ("model.width=8", "model.hidden_width=4", "model.max_events=6", "model.lora_rank=2")
    with own_cache(data / "cache"):
        run = fedtide(
            capsys,
            *("simulate", "--log", data / "data" / "log.csv", "--catalog", data / "data" / "catalog.csv"),
            *("--encoder", data / "model", "--family", family, "--mode", mode, "--runs", tmp_path),
            *("--engine", "inline", "--device", "cpu", "--n-sites", "2", "--users-per-site", "15"),
            *("--rounds", "1", "--steps", "2", "--baseline-epochs", "1"),
            *(part for option in options for part in ("--set", option)),
        )
        assert set(run["test"]) == {"popularity", "content only", "no privacy", "Fedtide"}
        assert 0 < run["epsilon"] <= 8
        recommender = load_recommender(run["run"], offline=True)
        texts = recommender.finished.catalog.texts
        history = f"{texts[0]}; {texts[3]}; {texts[6]}"
        found = fedtide(capsys, "recommend", "--run", run["run"], "--history", history, "--because", "2")
        asked = f"{texts[1]}; {texts[9]}"
        said = fedtide(capsys, "predict", "--run", run["run"], "--history", history, "--of", asked)
        again = load_recommender(run["run"], offline=True)
    events = recommender.read([texts[0], texts[3], texts[6]])
    items = recommender.top(events, 10, because=2)
    assert [each["item"] for each in found["items"]] == [each.item for each in items]
    assert [each["score"] for each in found["items"]] == pytest.approx([e.score for e in items], abs=2e-6)
    given = [event.given for event in events]
    for shown, item in zip(found["items"], items, strict=True):
        assert shown["because"] == [given[place] for place in item.because]
        assert len(set(shown["because"])) == 2
    assert [each["text"] for each in said["of"]] == [texts[1], texts[9]]
    assert all(0 < each["probability"] < 1 and 1 <= each["rank"] <= len(texts) for each in said["of"])
    assert again.top(events, 10, because=2) == items
    assert trained(recommender)


def trained(recommender: Any) -> bool:
    """Whether anything moved from the seeded start: a run that saved its start would look alike otherwise."""
    from common.models.build import build_model, item_texts

    finished = recommender.finished
    start = build_model(
        finished.plan,
        item_texts(finished.catalog.texts, finished.catalog.categories),
        Path(finished.plan.encoder),
        categories=finished.catalog.categories,
    ).model.trainable_state()
    own = finished.built.model.trainable_state()
    assert own.keys() == start.keys()
    return all(not own[name].equal(start[name]) for name in start)
