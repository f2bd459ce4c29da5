"""A model shows at each request's parameters, before a charge, that all rows of a unit give one user the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from client import self_test
from client.opacus_gradients import UnvouchedLayerError
from client.self_test import rows_of_scores, rows_of_units
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from tests.client.training_cases import a_model, moved

EVENTS = 12
BIT = 2.0**-22


def with_vectors(change: Callable[[Recommend, HistoryBatch, Tensor], Tensor]) -> type[Recommend]:
    """The family over a machine whose event vectors come out a rounding apart."""

    class Odd(Recommend):
        def event_vectors(self, batch: HistoryBatch) -> Tensor:
            return change(self, batch, super().event_vectors(batch))

    return Odd


def by_row(rows: Tensor, odd: Tensor) -> Tensor:
    return rows * torch.where(odd, 1.0 + BIT, 1.0).view(-1, 1, 1)


def at_the_edge(_: Recommend, batch: HistoryBatch, x: Tensor) -> Tensor:
    """The last eight of 48 rows go through another kernel, as at the edge of a product."""
    return by_row(x, (torch.arange(len(x)) >= 40) & torch.tensor(len(x) == 48))


@pytest.mark.parametrize("rows", [96, 48, 24, 1])
def test_an_ordinary_machine_gets_the_units_that_it_asks_for(rows: int) -> None:
    assert rows_of_units(a_model(), rows, EVENTS) == rows


def test_a_unit_whose_last_rows_round_otherwise_is_not_taken() -> None:
    assert rows_of_units(a_model(with_vectors(at_the_edge)), 48, EVENTS) == 24


def test_where_others_reach_a_users_last_bits_each_user_is_computed_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def mixed(_: Recommend, batch: HistoryBatch, x: Tensor) -> Tensor:
        return x * (1.0 + BIT * (batch.items[:, 0].float().sum() % 1009))

    assert rows_of_units(a_model(with_vectors(mixed)), 48, EVENTS) == 1
    assert "do not give all 48 rows of a unit the same numbers" in caplog.text


def test_numbers_that_differ_from_one_pass_to_the_next_are_refused() -> None:
    def drawn(_: Recommend, batch: HistoryBatch, x: Tensor) -> Tensor:
        return x * (1.0 + 4 * BIT * torch.rand(()))

    with pytest.raises(UnvouchedLayerError, match="other numbers each time"):
        rows_of_units(a_model(with_vectors(drawn)), 48, EVENTS)


def test_a_model_that_passed_once_has_shown_nothing_about_other_parameters() -> None:
    """Gentle parameters in the first round, far off ones in the second: a server's choice."""

    def far_off_only(model: Recommend, batch: HistoryBatch, x: Tensor) -> Tensor:
        far = model.residual.weight.detach().abs().max() > 10
        return by_row(x, (torch.arange(len(x)) % 2 == 1) & far)

    model = a_model(with_vectors(far_off_only))
    assert rows_of_units(model, 48, EVENTS) == 48
    moved(model, by=100.0)
    assert rows_of_units(model, 48, EVENTS) == 1


def test_without_asking_again_that_would_not_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "digest_of", lambda model: "the same")
    with pytest.raises(AssertionError):
        test_a_model_that_passed_once_has_shown_nothing_about_other_parameters()


def test_what_was_shown_at_the_same_parameters_is_not_shown_again_and_nothing_is_moved() -> None:
    passes = 0

    class Counted(Recommend):
        def per_user_loss(self, batch: HistoryBatch) -> Tensor:
            nonlocal passes
            passes += 1
            return super().per_user_loss(batch)

    model = a_model(Counted)
    start = model.trainable_state()
    rows_of_units(model, 48, EVENTS)
    first = passes
    rows_of_units(model, 48, EVENTS)
    assert passes == first
    assert all(torch.equal(value, start[name]) for name, value in model.trainable_state().items())
    moved(model)
    rows_of_units(model, 48, EVENTS)
    assert 0 < passes - first < first / 2  # asked again, but not of the model's structure


def test_a_sum_that_is_another_at_these_parameters_is_refused() -> None:
    class Peeking(Recommend):
        """Far off, the loss reads a weight beside its layer: a gradient that no row shows."""

        def per_user_loss(self, batch: HistoryBatch) -> Tensor:
            weight = self.residual.weight
            beside = weight.square().sum() if float(weight.detach().abs().max()) > 10 else 0.0
            return super().per_user_loss(batch) + beside

    model = a_model(Peeking)
    rows_of_units(model, 48, EVENTS)
    moved(model, by=100.0)
    with pytest.raises(UnvouchedLayerError, match="clipped sum is not that of its users"):
        rows_of_units(model, 48, EVENTS)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_another_number_of_threads_is_another_machine(threads: int) -> None:
    def with_three(_: Recommend, batch: HistoryBatch, x: Tensor) -> Tensor:
        return by_row(x, (torch.arange(len(x)) == 31) & torch.tensor(torch.get_num_threads() == 3))

    before, model = torch.get_num_threads(), a_model(with_vectors(with_three))
    try:
        torch.set_num_threads(1)
        assert rows_of_units(model, 48, EVENTS) == 48
        torch.set_num_threads(threads)
        assert rows_of_units(model, 48, EVENTS) == (24 if threads == 3 else 48)
    finally:
        torch.set_num_threads(before)


def test_metrics_rank_in_units_whose_rows_are_alike() -> None:
    class Edge(Recommend):
        def scores(self, batch: HistoryBatch) -> Tensor:
            odd = (torch.arange(len(batch)) >= 40).unsqueeze(1)
            return super().scores(batch) + torch.where(odd, 1e-3, 0.0)

    assert rows_of_scores(a_model(), 48, EVENTS) == 48
    assert rows_of_scores(a_model(Edge), 48, EVENTS) == 24


def test_the_opacus_engine_is_asked_for_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = self_test.sums_by

    def noted(engine: Any, *given: Any, **named: Any) -> Any:
        asked.append(engine)
        return real(engine, *given, **named)

    monkeypatch.setattr(self_test, "sums_by", noted)
    model = a_model()
    assert rows_of_units(model, 24, EVENTS, "opacus") == 24
    asked.clear()
    moved(model)
    assert rows_of_units(model, 24, EVENTS, "opacus") == 24
    assert set(asked) == {"opacus"}
