"""Every family from the command line and from Python: trained, saved, loaded, asked and explained, for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.models.names import FAMILIES
from tests.tiny import own_cache, tiny_files, tiny_language_model

SMALL = ("model.width=8", "model.hidden_width=4", "model.max_events=6", "model.lora_rank=2")
CASES = [(family, "vectors") for family in FAMILIES] + [("classifier", "lora"), ("ensemble", "lora")]


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[object, str, str]:
    """Runs the `fedtide` command in this process: exit code, output and errors."""
    from common.cli import main

    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--json", "--offline"])
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


def fedtide(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """What a command that ends well prints as JSON."""
    code, printed, errors = command(capsys, *arguments)
    assert code == 0, errors
    found: dict[str, Any] = json.loads(printed)
    return found


def simulate(log: Path, catalog: Path, model: Path, runs: Path, *options: str) -> tuple[str | Path, ...]:
    """A command that trains one round of two steps over two sites."""
    return (
        *("simulate", "--log", log, "--catalog", catalog, "--encoder", model, "--runs", runs),
        *("--engine", "inline", "--device", "cpu", "--n-sites", "2", "--users-per-site", "15"),
        *("--rounds", "1", "--steps", "2", *options),
        *(part for value in SMALL for part in ("--set", value)),
    )


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

    log, catalog = data / "data" / "log.csv", data / "data" / "catalog.csv"
    asked_for = ("--family", family, "--mode", mode, "--baseline-epochs", "1")
    with own_cache(data / "cache"):
        run = fedtide(capsys, *simulate(log, catalog, data / "model", tmp_path, *asked_for))
        assert set(run["test"]) == {"popularity", "content only", "no privacy", "Fedtide"}
        assert 0 < run["epsilon"] <= 8
        recommender = load_recommender(run["run"], offline=True)
        texts = recommender.finished.catalog.texts
        history = f"{texts[0]}; {texts[3]}; {texts[6]}"
        found = fedtide(capsys, "recommend", "--run", run["run"], "--history", history, "--because", "2")
        asked = f"{texts[1]}; {texts[9]}"
        said = fedtide(capsys, "predict", "--run", run["run"], "--history", history, "--of", asked)
        again = load_recommender(run["run"], offline=True)
        odd_histories_get_an_answer_or_a_clear_error(capsys, run["run"], texts)
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


def odd_histories_get_an_answer_or_a_clear_error(
    capsys: pytest.CaptureFixture[str], run: str, texts: tuple[str, ...]
) -> None:
    """Longer than the window of six, of one event, of what the catalog lacks; and none at all."""
    unknown = "a golden bicycle on a mountain road"
    for history, read in (
        ("; ".join(texts[:9]), list(texts[3:9])),
        (texts[4], [texts[4]]),
        (unknown, [unknown]),
    ):
        found = fedtide(capsys, "recommend", "--run", run, "--history", history)
        assert [event["given"] for event in found["history"]] == read
        assert all(event["exact"] == (event["given"] != unknown) for event in found["history"])
        assert len(found["items"]) == 10
        assert not {event["read_as"] for event in found["history"]} & {e["text"] for e in found["items"]}
    said = fedtide(capsys, "predict", "--run", run, "--history", unknown, "--of", unknown)["of"][0]
    assert (said["given"], said["exact"]) == (unknown, False)
    assert said["text"] in texts
    for asked in (("recommend",), ("predict", "--of", texts[0])):
        code, _, errors = command(capsys, *asked, "--run", run, "--history", " ; ")
        assert code == 2
        assert errors == ("error: the history is empty: give titles, oldest first, separated by semicolons\n")


CATALOGS = {
    "one item": ["red lamp"],
    "empty texts": ["red lamp", "", "", "blue coat", "  "],
    "all alike": ["red lamp"] * 5,
    "Chinese": ["流浪地球", "红高粱", "霸王别姬", "卧虎藏龙", "大红灯笼高高挂"],
}


def odd_files(folder: Path, texts: list[str]) -> tuple[Path, Path]:
    """A log of forty users over a catalog of these texts."""
    log, catalog = folder / "log.csv", folder / "catalog.csv"
    catalog.write_text("item,text\n" + "".join(f"i{n},{text}\n" for n, text in enumerate(texts)))
    rows = [(user, event) for user in range(40) for event in range(6 + user % 4)]
    lines = [f"u{u},i{(7 * u + 3 * e) % len(texts)},{1_700_000_000 + 3600 * e}\n" for u, e in rows]
    log.write_text("user,item,time\n" + "".join(lines))
    return log, catalog


@pytest.mark.parametrize(("name", "mode"), [(name, "vectors") for name in CATALOGS] + [("Chinese", "lora")])
def test_an_odd_catalog_trains_lists_and_predicts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, mode: str
) -> None:
    texts = CATALOGS[name]
    log, catalog = odd_files(tmp_path, texts)
    options = ("--mode", mode, "--baseline-epochs", "0", "--set", "model.unknown_tokens=allow")
    with own_cache(data / "cache"):
        run = fedtide(capsys, *simulate(log, catalog, data / "model", tmp_path / "runs", *options))["run"]
        asked = ("--run", run, "--history", f"{texts[0]}; -{texts[-1].strip() or texts[0]}")
        found = fedtide(capsys, "recommend", *asked)
        said = fedtide(capsys, "predict", *asked, "--of", texts[0])["of"]
    had = {event["read_as"] for event in found["history"]}
    rows = {texts.index(text) for text in had}
    assert len(found["items"]) == len(texts) - len(rows)
    assert not rows & {int(item["item"][1:]) for item in found["items"]}
    assert [(each["text"], each["exact"]) for each in said] == [(texts[0], True)]
    assert said[0]["probability"] == pytest.approx(1) if len(texts) == 1 else 0 < said[0]["probability"] < 1


def test_a_catalog_without_any_text_is_refused_in_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, catalog = odd_files(tmp_path, ["", " ", ""])
    with own_cache(data / "cache"):
        code, _, errors = command(capsys, *simulate(log, catalog, data / "model", tmp_path / "runs"))
    assert code == 2
    assert errors.endswith("error: no item of the catalog has a text; give the catalog a text column\n")


def trained(recommender: Any) -> bool:
    """Whether anything moved from the seeded start: a run that saved its start would look alike otherwise."""
    from common.models.build import build_model, item_texts
    from common.witness import without_witness

    finished = recommender.finished
    start = build_model(
        finished.plan,
        item_texts(finished.catalog.texts, finished.catalog.categories),
        Path(finished.plan.encoder),
        categories=finished.catalog.categories,
    ).model.trainable_state()
    own = without_witness(finished.built.model.trainable_state())
    assert own.keys() == start.keys()
    return all(not own[name].equal(start[name]) for name in start)
