"""Each task is judged by the right event, the right metrics, and without a look at what it should foretell."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from common.events.histories import Histories
from common.events.labels import LabelRule, padded_labels
from common.models.batches import HistoryBatch
from simulations.baselines import popularity_scorer
from simulations.evaluation import HeldOut, evaluate
from simulations.quality import category_quality, interest_quality
from simulations.splits import moment_after, until, up_to_first_after, user_folds

ITEMS = 6
NAN = float("nan")


def some_histories() -> Histories:
    rows = [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3], [5, 4, 3, 2, 1]]
    values = [[5, 1, 4, 2], [3, 5, NAN, 4], [4, 4], [1, 1, 5, 5, NAN]]
    lengths = [len(row) for row in rows]
    return Histories(
        users=np.array(["a", "b", "c", "d"]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate(rows).astype(np.int32),
        times=np.concatenate([100 * np.arange(n) + u for u, n in enumerate(lengths)]).astype(np.int64),
        kinds=np.array([n % 2 for n in range(sum(lengths))], dtype=np.int16),
        values=np.concatenate(values).astype(np.float32),
        kind_names=("view", "buy"),
    )


def test_labels_go_by_value_or_by_kind_and_are_never_guessed() -> None:
    histories = some_histories()
    by_value = LabelRule(liked_from=4.0).labels(histories)
    assert by_value[:4].tolist() == [1, 0, 1, 0]
    assert np.isnan(by_value[[6, 14]]).all()
    by_kind = LabelRule(liked_kinds=("buy",)).labels(histories)
    assert by_kind.tolist() == [n % 2 for n in range(15)]
    assert padded_labels(histories, [0], 3, None) is None


def test_padded_labels_stand_beside_the_items_they_belong_to() -> None:
    histories = some_histories()
    labels = padded_labels(histories, [2, 0], 3, LabelRule())
    assert labels is not None
    items, _ = histories.padded([2, 0], 3)
    assert items.tolist() == [[2, 3, -1], [1, 2, 3]]
    assert labels[0, :2].tolist() == [1, 1]
    assert np.isnan(labels[0, 2])
    assert labels[1].tolist() == [0, 1, 0]


def test_the_item_asked_about_is_the_one_after_the_history() -> None:
    held_out = HeldOut(some_histories(), max_events=4)
    for split, targets in (("test", [3, 1, 1]), ("validation", [2, 0, 2])):
        histories, found = held_out.part(split)  # type: ignore[arg-type]
        assert found.tolist() == targets  # the user with two events is left out
        for row, target in enumerate(found):
            assert target not in histories.history(row)


def test_interest_is_asked_of_labelled_events_only_and_a_perfect_answer_is_perfect() -> None:
    held_out = HeldOut(some_histories(), max_events=4, task="interest", labels=LabelRule())
    asked: list[int] = []

    def answer(batch: HistoryBatch, items: Tensor) -> Tensor:
        asked.extend(items.tolist())
        return torch.where(items == 1, 0.9, 0.1)  # user b rated item 1 with 4, user a rated item 3 with 2

    quality = evaluate(answer, held_out, "test", ITEMS)
    assert asked == [3, 1]  # user d's last event has no value
    assert quality.metrics["accuracy"].value == 1.0
    assert quality.metrics["ROC-AUC"].value == 1.0
    assert quality.headline == "ROC-AUC"
    assert quality.per_user.mean() == pytest.approx(np.log(0.9))


def test_wrong_and_right_probabilities_are_told_apart_by_every_metric() -> None:
    labels = np.array([0, 1] * 50)
    good, bad = np.where(labels, 0.8, 0.2), np.where(labels, 0.2, 0.8)
    for name in ("accuracy", "precision", "recall", "F1", "ROC-AUC", "PR-AUC"):
        assert (
            interest_quality(good, labels).metrics[name].value
            > interest_quality(bad, labels).metrics[name].value
        )
    assert interest_quality(good, labels).metrics["calibration error"].value == pytest.approx(0.2)
    one_class = interest_quality(good, np.ones_like(labels))
    assert "ROC-AUC" not in one_class.metrics
    assert one_class.headline == "accuracy"


def test_the_error_of_an_area_is_about_what_repeated_samples_show() -> None:
    generator = np.random.default_rng(0)
    labels = np.array([0, 1] * 60)
    found = [
        interest_quality(1 / (1 + np.exp(-(generator.normal(size=120) + labels))), labels).metrics["ROC-AUC"]
        for _ in range(300)
    ]
    spread = np.std([metric.value for metric in found])
    assert np.mean([metric.standard_error for metric in found]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("task", ["next-item", "interest"])
def test_a_catalog_too_large_for_all_users_at_once_is_scored_part_by_part(
    monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    labels = LabelRule() if task == "interest" else None
    held_out = HeldOut(some_histories(), max_events=4, task=task, labels=labels)
    sizes: list[int] = []

    def guess(batch: HistoryBatch, asked: Tensor) -> Tensor:
        sizes.append(len(batch))
        scores = torch.sin(batch.items.clamp(min=0).sum(dim=1, keepdim=True) + torch.arange(ITEMS))
        return scores if task == "next-item" else torch.sigmoid(scores[:, 0])

    whole = evaluate(guess, held_out, "validation", ITEMS)
    assert len(sizes) == 1
    monkeypatch.setattr("simulations.evaluation._SCORES_AT_ONCE", ITEMS)
    parts = evaluate(guess, held_out, "validation", ITEMS)
    assert sizes[1:] == [1] * sizes[0]
    assert json.dumps(parts.as_json()) == json.dumps(whole.as_json())  # NaN is no equal of itself


def test_any_of_the_next_items_categories_is_right() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    right = np.array([[False, True, True], [True, False, False]])
    metrics = category_quality(scores, right).metrics
    assert metrics["HR@1"].value == 0.5
    assert metrics["HR@3"].value == 1.0
    assert metrics["MRR"].value == pytest.approx(0.75)


def test_popularity_knows_training_events_only() -> None:
    held_out = HeldOut(some_histories(), max_events=4)
    scores = popularity_scorer(held_out, ITEMS)(
        held_out.batch(held_out.whole, np.arange(2)), torch.tensor([0, 0])
    )
    assert scores[0].tolist() == [
        1,
        1,
        0,
        1,
        2,
        2,
    ]  # histories without the last two events, of users with three
    liked = HeldOut(some_histories(), max_events=4, task="interest", labels=LabelRule())
    rates = popularity_scorer(liked, ITEMS)(
        held_out.batch(held_out.whole, np.arange(1)), torch.tensor([0, 4])
    )
    assert rates[0] > rates[1]  # item 0 was liked, item 4 was not


def test_folds_judge_every_user_once_and_train_on_no_user_they_judge() -> None:
    judged = []
    for train, judge in user_folds(10, 3, seed=1):
        assert not set(train) & set(judge)
        assert len(train) + len(judge) == 10
        judged += judge.tolist()
    assert sorted(judged) == list(range(10))
    with pytest.raises(ValueError, match="between 2 and"):
        list(user_folds(3, 4, seed=0))


def test_a_temporal_split_has_nothing_from_after_its_moment_but_the_event_to_foretell() -> None:
    histories = some_histories()
    moment = 250
    assert (until(histories, moment).times < moment).all()
    assert until(histories, moment).lengths.tolist() == [3, 3, 2, 3]
    judged = up_to_first_after(histories, moment)
    assert judged.users.tolist() == ["a", "b", "d"]  # nothing of user c happened after
    for row in range(len(judged)):
        times = judged.times[judged.offsets[row] : judged.offsets[row + 1]]
        assert (times[:-1] < moment).all()
        assert times[-1] >= moment
    assert moment_after(histories, 0.5) == np.sort(histories.times)[7]
    with pytest.raises(ValueError, match="between 0 and 1"):
        moment_after(histories, 1.0)
