"""Gaussian sums over users: what one user can move them, what noise they carry, and what a site releases of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.statistics import (
    Contribution,
    metric_sum,
    noised,
    popularity_sum,
    release_metrics,
    sum_of,
    transition_sum,
    unit,
    user_metrics,
    user_popularity,
    user_transitions,
)
from common.config import make_plan
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.privacy.noise import SecureGaussian
from common.privacy.statistics import noise_chi_square
from common.sums import METRICS, PairLayout, most_items, top_items
from tests.client.training_cases import a_model

CATALOG = 40
TOP = torch.arange(0, CATALOG, 2)
"""Twenty of the forty items."""

A_RELATIVE_ULP_OR_FEW = 1e-12
"""Norms are computed in float64; ROOM_FOR_FLOATS in the noise covers 5e-5."""


def histories_of(rows: list[list[int]]) -> Histories:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.array([item for row in rows for item in row], dtype=np.int32)
    return Histories(
        users=np.array([f"u{place}" for place in range(len(rows))], dtype=np.str_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=flat,
        times=np.arange(len(flat), dtype=np.int64),
        kinds=np.zeros(len(flat), dtype=np.int16),
        values=np.full(len(flat), np.nan, dtype=np.float32),
        kind_names=("view",),
    )


def popularity(histories: Histories) -> Tensor:
    return popularity_sum(histories, CATALOG, 5000)


def transitions(histories: Histories) -> Tensor:
    return transition_sum(histories, TOP, CATALOG, 5000, symmetric=True, gaps=10)


def directed(histories: Histories) -> Tensor:
    return transition_sum(histories, TOP, CATALOG, 5000, symmetric=False, gaps=3)


SUMS = [popularity, transitions, directed]
Sum = Callable[[Histories], Tensor]


def per_event_sum(histories: Histories) -> Tensor:
    """The mistake that the sums here must not make: each event counts, a user as often as there are events."""
    total = np.zeros(CATALOG)
    np.add.at(total, histories.items.astype(np.int64), 1.0)
    return torch.from_numpy(total)


def moved_by(sum_: Sum, others: list[list[int]], user: list[int]) -> float:
    """The L2 distance of the sums with and without the user."""
    return float((sum_(histories_of([*others, user])) - sum_(histories_of(others))).norm())


OTHERS = [[0, 2, 4, 6], [1, 2, 2, 8, 10], [38]]
A_THOUSAND = [int(item) for item in np.random.default_rng(1).integers(0, CATALOG, 1000)]


@pytest.mark.parametrize("sum_", SUMS)
@pytest.mark.parametrize("user", [[3], [0, 2], [0, 2, 0, 2, 0], [5, 5, 5], A_THOUSAND, []], ids=len)
def test_one_user_moves_a_sum_by_at_most_one(sum_: Sum, user: list[int]) -> None:
    assert moved_by(sum_, OTHERS, user) <= 1 + A_RELATIVE_ULP_OR_FEW


@pytest.mark.parametrize("sum_", SUMS)
def test_a_user_with_a_thousand_events_moves_it_by_exactly_one(sum_: Sum) -> None:
    assert moved_by(sum_, OTHERS, A_THOUSAND) == pytest.approx(1.0, abs=1e-9)


def test_the_bound_on_sensitivity_can_fail() -> None:
    assert moved_by(per_event_sum, OTHERS, A_THOUSAND) > 100


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, CATALOG - 1), max_size=60), st.integers(1, 20), st.booleans())
def test_no_history_contributes_more_than_norm_one(items: list[int], gaps: int, symmetric: bool) -> None:
    index = np.full(CATALOG, -1, dtype=np.int64)
    index[TOP.numpy()] = np.arange(len(TOP))
    row = np.array(items, dtype=np.int64)
    layout = PairLayout(len(TOP), symmetric)
    for places, values in (user_popularity(row), user_transitions(row, index, layout, gaps)):
        assert float(np.linalg.norm(values)) <= 1 + A_RELATIVE_ULP_OR_FEW
        assert len(np.unique(places)) == len(places)


@settings(max_examples=60, deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=True, allow_infinity=True))
def test_no_metrics_contribute_more_than_norm_one(hit: float, gain: float) -> None:
    assert float(np.linalg.norm(user_metrics(hit, gain)[1])) <= 1 + A_RELATIVE_ULP_OR_FEW


def test_metrics_of_a_perfect_user_move_the_sum_by_one() -> None:
    both = metric_sum(np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    alone = metric_sum(np.array([0.0]), np.array([0.0]))
    assert float((both - alone).norm()) == pytest.approx(1.0)


def test_weights_that_are_not_finite_contribute_nothing() -> None:
    places, values = unit(np.array([1, 2]), np.array([1.0, math.inf]))
    assert len(places) == len(values) == 0


def test_only_the_most_recent_events_count() -> None:
    assert torch.equal(
        popularity_sum(histories_of([[1, 2, 3, 4]]), CATALOG, 2),
        popularity_sum(histories_of([[3, 4]]), CATALOG, 2),
    )


def naive_transitions(items: list[int], top: list[int], gaps: int) -> npt.NDArray[np.float64]:
    counts = np.zeros((len(top), len(top)))
    for first in range(len(items)):
        for second in range(first + 1, min(first + gaps + 1, len(items))):
            one, other = items[first], items[second]
            if one in top and other in top and one != other:
                counts[top.index(one), top.index(other)] += 1 / (second - first)
    return counts


@pytest.mark.parametrize("symmetric", [True, False])
def test_transitions_are_those_of_a_plain_double_loop(symmetric: bool) -> None:
    items = A_THOUSAND[:60]
    found = PairLayout(len(TOP), symmetric).matrix(
        transition_sum(histories_of([items]), TOP, CATALOG, 100, symmetric=symmetric, gaps=4)
    )
    counts = naive_transitions(items, TOP.tolist(), 4)
    if symmetric:
        counts = counts + counts.T
        counts = counts / np.linalg.norm(np.triu(counts))
    else:
        counts = counts / np.linalg.norm(counts)
    np.testing.assert_allclose(found.numpy(), counts, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [2, 3, 17])
def test_each_pair_has_a_place_of_its_own(size: int, symmetric: bool) -> None:
    layout = PairLayout(size, symmetric)
    first, second = (part.ravel() for part in np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    different = first != second
    places = layout.place(first[different], second[different])
    assert sorted(set(places.tolist())) == list(range(layout.places))
    matrix = layout.matrix(torch.arange(layout.places, dtype=torch.float64))
    assert matrix[first[different], second[different]].tolist() == places.tolist()


def test_the_most_items_fill_one_release_and_no_more() -> None:
    from common.privacy.noise import LARGEST_DIMENSION

    for symmetric in (True, False):
        most = most_items(symmetric)
        assert (
            PairLayout(most, symmetric).places <= LARGEST_DIMENSION < PairLayout(most + 1, symmetric).places
        )


def test_top_items_break_ties_by_row_on_every_machine() -> None:
    assert top_items(torch.tensor([1.0, 5.0, 5.0, 0.0, 5.0]), 2).tolist() == [1, 2]


NOISE = 3.0


@pytest.fixture(scope="module")
def residuals() -> npt.NDArray[np.float64]:
    total = sum_of(iter([(np.arange(3), np.full(3, 3**-0.5))]), 20_000)
    return (noised(total, NOISE, SecureGaussian()).double() - total).numpy()


def test_the_noise_is_as_wide_as_the_event_says(residuals: npt.NDArray[np.float64]) -> None:
    assert noise_chi_square(residuals, NOISE) > 1e-6


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_noise_of_another_width_is_noticed(residuals: npt.NDArray[np.float64], factor: float) -> None:
    assert noise_chi_square(residuals, NOISE * factor) < 1e-9


def test_two_releases_of_one_sum_differ() -> None:
    contribution: Contribution = (np.arange(3), np.full(3, 3**-0.5))
    total = sum_of(iter([contribution]), 50)
    assert not torch.equal(noised(total, NOISE, SecureGaussian()), noised(total, NOISE, SecureGaussian()))


class Noiseless:
    """What must never be used outside of tests."""

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return np.zeros(size)


def test_a_users_rank_does_not_turn_on_how_many_others_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class FewRowsKernel(Recommend):
        """Scores are all alike but for a rounding, which is another where there are few rows: what BLAS does."""

        def scores(self, batch: HistoryBatch) -> Tensor:
            place = torch.arange(len(self.vectors), dtype=torch.float32)
            return (1.0 + 1e-6 * place * (1 if len(batch) >= 4 else -1)).expand(len(batch), -1)

    plan = make_plan({"metrics": {"share": 0.1, "noise_multiplier": 1.0, "top": 10}})
    model = a_model(FewRowsKernel)

    def released(users: int) -> Tensor:
        held_out = np.full(users, len(model.vectors) - 1)
        histories = histories_of([[1, 2]] * users)
        return release_metrics(model, histories, held_out, plan, Noiseless())[METRICS]

    def most() -> float:
        return max(float((released(users + 1) - released(users)).norm()) for users in range(12))

    assert most() <= 1 + 1e-5
    monkeypatch.setattr(HistoryBatch, "unit", lambda batch, rows: batch)
    assert most() > 2
