"""Lists, predictions and their reasons from a finished model, with odd histories and odd catalogs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import make_plan
from common.events.catalog import Catalog
from common.finished import FinishedError, FinishedModel, load_finished
from common.models.build import BuiltModel, item_texts, make_task
from common.models.item_vectors import item_vectors
from common.models.names import FAMILIES, TASKS, named
from common.models.sequence import Ingredients
from server.recommending import HistoryError, Recommender
from tests.common.models.tiny_models import tiny_language_model

TITLES = (
    "red sun (1990)",
    "blue moon (1991)",
    "green star (1992)",
    "red star (1993)",
    "wolf",
    "bear",
    "fox",
    "",
)
GENRES = (("sky",), ("sky",), ("sky", "plant"), ("sky",), ("animal",), ("animal",), ("animal",), ())


def a_recommender(
    titles: tuple[str, ...] = TITLES, genres: tuple[tuple[str, ...], ...] | None = None, **model: Any
) -> Recommender:
    plan = make_plan({"model": {"width": 8, "hidden_width": 4, "max_events": 5, **model}}).model
    genres = genres if genres is not None else GENRES if titles is TITLES else ((),) * len(titles)
    catalog = Catalog(ids=tuple(f"i{n}" for n in range(len(titles))), texts=titles, categories=genres)
    lm = tiny_language_model("bert")
    public = item_vectors(lm, item_texts(titles, genres), plan.width)
    task = make_task(plan, public.vectors, genres)
    torch.manual_seed(0)
    of = named(FAMILIES, plan.family).of(Ingredients(public.vectors, task, lm, public.projection, None, plan))
    built = BuiltModel(of.eval(), public.vectors, public.projection, lm)
    return Recommender(FinishedModel(plan, catalog, built))


def test_titles_are_found_whole_without_year_by_part_and_by_meaning() -> None:
    events = a_recommender().read(["Red Sun (1990)", "blue moon", "-WOLF", "green", "fish and fire"])
    assert [event.row for event in events[:4]] == [0, 1, 4, 2]
    assert [event.exact for event in events] == [True] * 4 + [False]
    assert [event.liked for event in events] == [True, True, False, True, True]


def test_an_empty_history_is_refused_in_words_and_a_long_one_cut_to_the_latest() -> None:
    recommender = a_recommender()
    for nothing in ([], ["  "], ["-"]):
        with pytest.raises(HistoryError, match="history is empty"):
            recommender.read(nothing)
    assert [e.row for e in recommender.read(["wolf"] * 9 + ["fox"])] == [4, 4, 4, 4, 6]


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_and_task_lists_predicts_and_gives_reasons(family: str, task: str) -> None:
    recommender = a_recommender(family=family, task=task)
    events = recommender.read(["wolf", "-red sun"])
    found = recommender.top(events, 3)
    assert [each.rank for each in found] == [1, 2, 3]
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert all(set(each.because) == {0, 1} for each in found)
    if task != "next-category":
        assert not {"wolf", TITLES[0]} & {each.text for each in found}
    asked = ["sky", "animal"] if task == "next-category" else ["bear", "blue moon"]
    for said in recommender.predict(events, asked):
        assert 0 < said.probability < 1
        assert 1 <= said.rank <= len(recommender.finished.candidates)


def test_the_event_that_speaks_most_is_the_one_like_the_item() -> None:
    recommender = a_recommender()
    events = recommender.read(["wolf", "red sun"])
    by_text = {each.text: each for each in recommender.top(events, 6)}
    vectors = recommender._units
    for text, each in by_text.items():
        row = TITLES.index(text)
        nearer = int((vectors[[4, 0]] @ vectors[row]).argmax())
        if abs(float(vectors[4] @ vectors[row] - vectors[0] @ vectors[row])) > 0.5:
            assert each.because[0] == nearer


def test_a_threshold_list_holds_exactly_what_is_at_least_that_near() -> None:
    recommender = a_recommender()
    events = recommender.read(["wolf"])
    everything = recommender.above(events, -1.0)
    assert len(everything) == len(TITLES) - 1
    threshold = everything[2].score
    assert len(recommender.above(events, threshold)) == 3
    assert recommender.above(events, 1.0) == []
    with pytest.raises(HistoryError, match="between -1 and 1"):
        recommender.above(events, 1.5)


def test_neighbours_of_a_liked_event_rise_and_of_a_disliked_one_do_not_appear() -> None:
    recommender = a_recommender()
    liked = recommender.by_neighbours(recommender.read(["wolf"]), 3)
    assert liked
    assert all(each.because == (0,) for each in liked)
    disliked = recommender.by_neighbours(recommender.read(["-wolf"]), 8)
    assert not {each.text for each in liked} & {each.text for each in disliked}


def test_batches_score_as_single_histories_do() -> None:
    recommender = a_recommender()
    histories = [recommender.read(titles) for titles in (["wolf"], ["red sun", "fox", "bear"])]
    together = recommender.scores([*histories, []])
    for row, history in enumerate([*histories, []]):
        torch.testing.assert_close(together[row], recommender.scores([history])[0])


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_user_without_events_with_one_or_with_too_many_is_scored(family: str, task: str) -> None:
    recommender = a_recommender(family=family, task=task)
    candidates = recommender.finished.candidates
    asked = ["sky", "animal"] if task == "next-category" else ["bear", "blue moon"]
    many = [recommender._find(title) for title in ["wolf", "bear", "fox"] * 4]
    for events in ([], recommender.read(["fish and fire"]), many):
        found = recommender.top(events, 3)
        assert len(found) == 3
        assert all(len(each.because) == min(2, len(events)) for each in found)
        for said in recommender.predict(events, asked):
            assert 0 < said.probability < 1
            assert 1 <= said.rank <= len(candidates)
    # What is older than the window of five changes nothing.
    torch.testing.assert_close(recommender.scores([many]), recommender.scores([many[-5:]]))
    assert recommender.scores([many]).isfinite().all()


def test_what_is_asked_about_and_not_in_the_catalog_is_said_to_be_read_by_its_text() -> None:
    recommender = a_recommender()
    known, unknown = recommender.predict(recommender.read(["wolf"]), [" BEAR ", "fish and fire"])
    assert (known.given, known.text, known.exact) == ("BEAR", "bear", True)
    assert (unknown.given, unknown.exact) == ("fish and fire", False)
    assert unknown.text in TITLES


def test_reasons_are_the_same_whether_histories_are_scored_at_once_or_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recommender = a_recommender()
    events = recommender.read(["wolf", "red sun", "fox", "blue moon"])
    at_once = recommender.top(events, 4, because=4)
    monkeypatch.setattr("server.recommending._SCORES_AT_ONCE", 1)
    assert [r.because for r in recommender.top(events, 4, because=4)] == [r.because for r in at_once]


def test_a_title_shared_by_several_items_is_the_first_and_a_whole_title_goes_before_one_without_its_year() -> (
    None
):
    recommender = a_recommender(("red sun (1990)", "red sun", "wolf", "wolf", "wolf cub"))
    assert [event.row for event in recommender.read(["red sun", "Wolf", "red sun (1990)"])] == [1, 2, 0]


def test_a_category_model_refuses_lists_of_items_and_unknown_categories_in_words() -> None:
    recommender = a_recommender(task="next-category")
    events = recommender.read(["wolf"])
    for ask in (lambda: recommender.above(events, 0.1), lambda: recommender.by_neighbours(events)):
        with pytest.raises(HistoryError, match="predicts categories"):
            ask()
    with pytest.raises(HistoryError, match="no category"):
        recommender.predict(events, ["desert"])


def test_a_catalog_without_categories_is_refused_for_next_category() -> None:
    with pytest.raises(ValueError, match="at least two categories"):
        a_recommender(("a", "b"), task="next-category")


def test_a_catalog_of_one_item_recommends_nothing_more() -> None:
    recommender = a_recommender(("wolf",))
    assert recommender.top(recommender.read(["wolf"]), 10) == []
    assert recommender.predict(recommender.read(["wolf"]), ["wolf"])[0].probability == pytest.approx(1.0)


def test_items_with_empty_texts_take_part() -> None:
    found = a_recommender().top(a_recommender().read(["wolf"]), 10)
    assert len(found) == len(TITLES) - 1
    assert "" in {each.text for each in found}


def test_a_hundred_thousand_items_are_listed() -> None:
    recommender = a_recommender()
    finished = recommender.finished
    many = 100_000
    vectors = torch.nn.functional.normalize(
        torch.randn(many, 8, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    task = make_task(finished.plan, vectors, None)
    lm, projection = finished.built.language_model, finished.built.projection
    model = (
        named(FAMILIES, "recommend")
        .of(Ingredients(vectors, task, lm, projection, None, finished.plan))
        .eval()
    )
    ids = tuple(str(n) for n in range(many))
    catalog = Catalog(ids=ids, texts=ids, categories=((),) * many)
    big = Recommender(FinishedModel(finished.plan, catalog, BuiltModel(model, vectors, projection, lm)))
    found = big.top(big.read(["99999", "5"]), 10)
    assert len(found) == 10
    assert not {"99999", "5"} & {each.text for each in found}


def test_a_folder_without_a_finished_run_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FinishedError, match="there is no run folder"):
        load_finished(tmp_path / "nowhere")
    with pytest.raises(FinishedError, match="did not end well"):
        load_finished(tmp_path)


def test_chinese_titles_are_found_and_read(minilm: Path) -> None:
    from common.models.language_model import load_language_model

    titles = ("流浪地球", "红高粱", "霸王别姬", "卧虎藏龙", "Farewell My Concubine")
    lm = load_language_model(minilm)
    plan = make_plan({"model": {"width": 8, "hidden_width": 4}}).model
    public = item_vectors(lm, list(titles), plan.width)
    task = make_task(plan, public.vectors, None)
    model = named(FAMILIES, "recommend").of(
        Ingredients(public.vectors, task, lm, public.projection, None, plan)
    )
    catalog = Catalog(ids=titles, texts=titles, categories=((),) * 5)
    built = BuiltModel(model.eval(), public.vectors, public.projection, lm)
    recommender = Recommender(FinishedModel(plan, catalog, built))
    events = recommender.read(["红高粱", "霸王"])
    assert [event.row for event in events] == [1, 2]
    assert all(event.exact for event in events)
    assert len(recommender.top(events, 10)) == 3
    assert public.vectors.norm(dim=-1).min() > 0.99


@pytest.fixture
def minilm() -> Path:
    from common.assets import AssetError, language_model

    try:
        return language_model("all-MiniLM-L6-v2", offline=True)
    except AssetError:
        pytest.skip("the language model is not on this machine: fedtide data fetch default")
