"""Metrics against cases worked out by hand and against the slowest, plainest way of computing them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import metrics

few_scores = st.lists(
    st.lists(st.integers(0, 4).map(float), min_size=5, max_size=5), min_size=1, max_size=6
)  # few values, so that ties are common
binary_cases = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 5).map(lambda x: x / 5)), min_size=2, max_size=40
)


# Ranking


def test_ranks_by_hand() -> None:
    scores = [[0.1, 0.9, 0.5, 0.3]] * 4
    assert metrics.ranks(scores, [1, 2, 3, 0]).tolist() == [1, 2, 3, 4]


def test_ties_stand_at_mid_rank() -> None:
    assert metrics.ranks([[1.0, 1.0, 1.0, 0.0]], [0]).tolist() == [2.0]
    assert metrics.ranks([[1.0, 1.0, 2.0]], [1]).tolist() == [2.5]
    assert metrics.ranks(np.zeros((3, 11)), [0, 5, 10]).tolist() == [6, 6, 6]


def test_a_model_that_scores_everything_alike_gains_nothing() -> None:
    """The flaw that mid-ranks are for: with ties broken in the target's favour this would be a hit."""
    assert metrics.hit_rate(metrics.ranks(np.zeros((1, 100)), [7]), 10).tolist() == [0]


def test_seen_items_are_masked_by_mask_or_by_list() -> None:
    scores = [[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]
    mask = np.array([[True, True, False, False], [False, False, False, False]])
    assert metrics.ranks(scores, [3, 3], mask).tolist() == [2, 4]
    assert metrics.ranks(scores, [3, 3], [[0, 1, 1], []]).tolist() == [2, 4]


def test_a_target_that_was_seen_is_a_miss() -> None:
    rank = metrics.ranks([[1.0, 2.0]], [1], [[1]])
    assert rank.tolist() == [math.inf]
    assert metrics.hit_rate(rank, 10).tolist() == [0]
    assert metrics.ndcg(rank, 10).tolist() == [0]
    assert metrics.reciprocal_rank(rank).tolist() == [0]


def test_one_item_ranks_first() -> None:
    assert metrics.ranks([[-math.inf]], [0]).tolist() == [1]


@given(few_scores, st.data())
def test_ranks_are_the_mean_over_all_orders_of_ties(table: list[list[float]], data: st.DataObject) -> None:
    scores = np.array(table)
    targets = data.draw(st.lists(st.integers(0, 4), min_size=len(table), max_size=len(table)))
    seen = data.draw(st.lists(st.lists(st.integers(0, 4)), min_size=len(table), max_size=len(table)))
    found = metrics.ranks(scores, targets, seen)
    for row, target, hidden, rank in zip(table, targets, seen, found, strict=True):
        others = [score for item, score in enumerate(row) if item != target and item not in hidden]
        best = 1 + sum(score > row[target] for score in others)
        worst = best + sum(score == row[target] for score in others)
        assert rank == (math.inf if target in hidden else (best + worst) / 2)


@given(few_scores, st.integers(1, 7), st.data())
def test_top_lists_are_the_sorted_unseen_items(table: list[list[float]], k: int, data: st.DataObject) -> None:
    seen = data.draw(st.lists(st.lists(st.integers(0, 4)), min_size=len(table), max_size=len(table)))
    found = metrics.top_lists(table, k, seen)
    assert found.shape == (len(table), k)
    for row, hidden, items in zip(table, seen, found.tolist(), strict=True):
        expected = sorted(
            (item for item in range(5) if item not in hidden), key=lambda item: (-row[item], item)
        )
        assert items == [*expected[:k], *[-1] * (k - len(expected))]


def test_figures_by_hand() -> None:
    of_targets = np.array([1.0, 2.0, 10.0, 11.0, 3.5])
    assert metrics.hit_rate(of_targets, 10).tolist() == [1, 1, 1, 0, 1]
    assert metrics.ndcg(of_targets, 10) == pytest.approx(
        [1, 1 / math.log2(3), 1 / math.log2(11), 0, 1 / math.log2(4.5)]
    )
    assert metrics.reciprocal_rank(of_targets) == pytest.approx([1, 0.5, 0.1, 1 / 11, 1 / 3.5])


def test_coverage_counts_items_once_and_ignores_padding() -> None:
    assert metrics.coverage([[0, 1], [1, -1]], 4) == 0.5
    assert metrics.coverage([[-1]], 4) == 0
    assert metrics.coverage([[0, 1, 2, 3]], 4) == 1


def test_the_summary_names_means_and_standard_errors() -> None:
    figures = metrics.summarise([1, 11, 2, 100], 10, lists=[[0, 1], [0, 2], [0, 1], [3, 3]], items=8)
    assert set(figures) == {"hit_rate@10", "ndcg@10", "mrr", "coverage@10"}
    assert figures["hit_rate@10"].value == 0.5
    assert figures["hit_rate@10"].standard_error == pytest.approx(math.sqrt(1 / 3 / 4))
    assert figures["mrr"].value == pytest.approx((1 + 1 / 11 + 1 / 2 + 1 / 100) / 4)
    assert figures["coverage@10"].value == 0.5
    assert set(metrics.summarise([1.0])) == {"hit_rate@10", "ndcg@10", "mrr"}
    assert math.isnan(metrics.summarise([1.0])["mrr"].standard_error)


@given(st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=2, max_size=8))
def test_the_error_of_coverage_is_the_jackknife_s(lists: list[list[int]]) -> None:
    found = metrics.summarise([1.0] * len(lists), 3, lists=lists, items=7)["coverage@3"]
    without = np.array([metrics.coverage(lists[:user] + lists[user + 1 :], 7) for user in range(len(lists))])
    expected = math.sqrt((len(lists) - 1) / len(lists) * np.square(without - without.mean()).sum())
    assert found.standard_error == pytest.approx(expected, abs=1e-12)


def test_standard_errors_cover_the_truth_as_often_as_they_should() -> None:
    generator = np.random.default_rng(2)
    covered = wrong = 0
    for _ in range(1000):
        metric = metrics.mean_metric(generator.random(200) < 0.3)
        covered += abs(metric.value - 0.3) < 1.96 * metric.standard_error
        wrong += abs(metric.value - 0.3) < 1.96 * metric.standard_error / 2
    assert 925 < covered < 970
    assert wrong < 800


def test_paired_differences_by_hand() -> None:
    found = metrics.paired_difference([3.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert (found.mean, found.standard_error) == pytest.approx((2, 1 / math.sqrt(3)))
    assert found.z == pytest.approx(2 * math.sqrt(3))
    assert metrics.paired_difference([1.0, 2.0], [1.0, 2.0]) == metrics.PairedDifference(0, 0, 0)
    assert metrics.paired_difference([2.0, 3.0], [1.0, 2.0]).z == math.inf
    assert metrics.paired_difference([1.0, 2.0], [2.0, 3.0]).z == -math.inf
    assert math.isnan(metrics.paired_difference([1.0], [2.0]).z)


def test_pairing_finds_what_unpaired_means_hide() -> None:
    generator = np.random.default_rng(4)
    of_users = generator.normal(0, 10, 300)
    better = of_users + 0.2 + generator.normal(0, 0.5, 300)
    assert metrics.paired_difference(better, of_users).z > 4
    assert abs(metrics.paired_difference(generator.permutation(better), of_users).z) < 4


# Beyond accuracy


def test_diversity_by_hand() -> None:
    vectors = [[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]
    found = metrics.intra_list_diversity(
        vectors, [[0, 1, -1], [0, 2, -1], [0, 3, -1], [0, 1, 2], [0, -1, -1], [0, 4, -1]]
    )
    assert found == pytest.approx([1, 0, 2, 2 / 3, 0, 1])


def test_novelty_by_hand() -> None:
    found = metrics.novelty([5.0, 0.0, 0.0], [[0, -1], [1, -1], [0, 1], [-1, -1]])
    rare, common = -math.log2(1 / 8), -math.log2(6 / 8)
    assert found == pytest.approx([common, rare, (common + rare) / 2, 0])


# Classification


def test_classification_by_hand() -> None:
    labels, predicted = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert metrics.accuracy(labels, predicted) == 0.6
    assert metrics.precision(labels, predicted) == pytest.approx(2 / 3)
    assert metrics.recall(labels, predicted) == pytest.approx(2 / 3)
    assert metrics.f1(labels, predicted) == pytest.approx(2 / 3)


def test_classification_without_positives_is_zero_and_not_an_error() -> None:
    assert metrics.precision([1, 0], [0, 0]) == 0
    assert metrics.recall([0, 0], [1, 0]) == 0
    assert metrics.f1([0, 1], [1, 0]) == 0


def test_areas_by_hand() -> None:
    assert metrics.roc_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert metrics.pr_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert metrics.roc_auc([0, 1, 0, 1], [1, 1, 1, 1]) == 0.5
    assert metrics.pr_auc([0, 1, 0, 1], [1, 1, 1, 1]) == 0.5
    assert metrics.roc_auc([0, 1], [1, 0]) == 0


@given(binary_cases)
def test_areas_are_what_counting_gives(cases: list[tuple[int, float]]) -> None:
    labels, scores = [label for label, _ in cases], [score for _, score in cases]
    positive = [score for label, score in cases if label]
    negative = [score for label, score in cases if not label]
    if positive and negative:
        wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
        assert metrics.roc_auc(labels, scores) == pytest.approx(wins / (len(positive) * len(negative)))
    if positive:
        area, found_before = 0.0, 0
        for threshold in sorted(set(scores), reverse=True):
            found = sum(p >= threshold for p in positive)
            taken = found + sum(n >= threshold for n in negative)
            area += (found - found_before) / len(positive) * found / taken
            found_before = found
        assert metrics.pr_auc(labels, scores) == pytest.approx(area)


@given(binary_cases, st.integers(1, 12))
def test_calibration_is_what_counting_gives(cases: list[tuple[int, float]], bins: int) -> None:
    labels, probabilities = [label for label, _ in cases], [p for _, p in cases]
    expected = 0.0
    for number in range(bins):
        inside = [(y, p) for y, p in cases if min(int(p * bins), bins - 1) == number]
        if inside:
            expected += abs(sum(p for _, p in inside) - sum(y for y, _ in inside))
    found = metrics.expected_calibration_error(labels, probabilities, bins)
    assert found == pytest.approx(expected / len(cases))


def test_calibration_tells_honest_from_boastful_probabilities() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.random(20_000)
    labels = generator.random(20_000) < probabilities
    assert metrics.expected_calibration_error(labels, probabilities) < 0.02
    assert metrics.expected_calibration_error(labels, probabilities**3) > 0.1


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.ranks([[1.0, math.nan]], [0]), "nan"),
        (lambda: metrics.top_lists([[1.0, math.nan]], 1), "nan"),
        (lambda: metrics.ranks([1.0, 2.0], [0]), "scores have shape"),
        (lambda: metrics.ranks(np.zeros((2, 0)), [0, 0]), "at least one item"),
        (lambda: metrics.ranks([[1.0, 2.0]], [2]), "from 0 to 1"),
        (lambda: metrics.ranks([[1.0, 2.0]], [-1]), "from 0 to 1"),
        (lambda: metrics.ranks([[1.0, 2.0]], [0.5]), "whole numbers"),
        (lambda: metrics.ranks([[1.0, 2.0]], [0, 1]), "one for each user"),
        (lambda: metrics.ranks([[1.0, 2.0]], [0], [[2]]), "seen items"),
        (lambda: metrics.ranks([[1.0, 2.0]], [0], [[0], [1]]), "2 users"),
        (lambda: metrics.ranks([[1.0, 2.0]], [0], np.zeros((1, 3), dtype=bool)), "seen mask"),
        (lambda: metrics.ranks([[1.0, 2.0]], [0], np.zeros((1, 2))), "seen mask"),  # type: ignore[arg-type]
        (lambda: metrics.hit_rate([1.0], 0), "k is 0"),
        (lambda: metrics.ndcg([0.5], 1), "start at 1"),
        (lambda: metrics.reciprocal_rank([math.nan]), "nan"),
        (lambda: metrics.summarise([]), "at least one user"),
        (lambda: metrics.summarise([1.0], lists=[[0]]), "both"),
        (lambda: metrics.coverage([[0]], 0), "items is 0"),
        (lambda: metrics.coverage([[4]], 4), "from 0 to 3"),
        (lambda: metrics.coverage([0], 4), "lists have shape"),
        (lambda: metrics.paired_difference([1.0], [1.0, 2.0]), "1 and 2 users"),
        (lambda: metrics.roc_auc([1, 1], [0.1, 0.2]), "both classes"),
        (lambda: metrics.pr_auc([0, 0], [0.1, 0.2]), "positive"),
        (lambda: metrics.roc_auc([0, 1], [0.1, math.nan]), "nan"),
        (lambda: metrics.roc_auc([0, 2], [0.1, 0.2]), "0 or 1"),
        (lambda: metrics.roc_auc([0, 1], [0.1]), "2 labels"),
        (lambda: metrics.accuracy([0, 1], [0, 0.5]), "0 or 1"),
        (lambda: metrics.accuracy([0, 1], [0]), "2 labels"),
        (lambda: metrics.expected_calibration_error([0, 1], [0.5, 1.5]), "sigmoid"),
        (lambda: metrics.expected_calibration_error([0, 1], [0.5, 0.5], 0), "bins is 0"),
        (lambda: metrics.intra_list_diversity([[math.inf]], [[0]]), "finite"),
        (lambda: metrics.novelty([-1.0], [[0]]), "at least 0"),
    ],
)
def test_what_has_no_answer_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
