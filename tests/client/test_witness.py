"""The witness holds noise alone: no user, no loss and no score reaches it, and its noise is the release's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from client.opacus_gradients import UnvouchedLayerError
from client.self_test import check_rows_are_users
from client.statistics import release_metrics, release_statistics, with_witness
from client.training import train_round
from common.config import PlanError, make_plan
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.priors import Priors
from common.phases import Phase, PretrainingPlan
from common.privacy.noise import INFLATION, LARGEST_DIMENSION
from common.sums import METRICS, POPULARITY, TRANSITIONS, PairLayout, most_items
from common.wire import Request
from common.witness import is_witness, without_witness, witness_name
from server.exchange import expected_shapes
from server.pretraining import pretrain
from tests.client.training_cases import (
    CLIP,
    ITEMS,
    SETTINGS,
    Everyone,
    SeededGaussian,
    a_model,
    batch_of,
    flat,
    item_vectors,
    moved,
    some_users,
)

PLACES = 32


def with_places(kind: type[Recommend] = Recommend, places: int = PLACES) -> Recommend:
    model = a_model(kind)
    model.set_witness(places)
    return model


class Recorded(SeededGaussian):
    """Keeps what it gave."""

    def __init__(self) -> None:
        super().__init__(seed=4)
        self.given: list[npt.NDArray[np.float64]] = []

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        self.given.append(super().normal(size))
        return self.given[-1]


class Silent:
    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return np.zeros(size)


@pytest.mark.parametrize("users", [0, 1, 12])
def test_the_witness_of_an_update_is_its_own_noise_and_nothing_else(users: int) -> None:
    model, noise = with_places(), Recorded()
    moved(model)
    histories = batch_of(some_users(users), 12)
    settings = replace(SETTINGS, steps=3)
    update = train_round(model, histories, settings, sampler=Everyone(), noise=noise)
    names, start = list(model.trainable()), 0
    for name in names[: names.index("witness")]:
        start += model.trainable()[name].numel()
    drawn = sum(each[start : start + PLACES] for each in noise.given)
    scale = settings.learning_rate * settings.noise_multiplier * CLIP / settings.normaliser
    wanted = -scale * (1 + INFLATION) * drawn
    assert np.allclose(update["witness"].numpy(), wanted, atol=1e-6)
    assert [len(each) for each in noise.given] == [sum(p.numel() for p in model.trainable().values())] * 3


def test_no_user_moves_the_witness_and_every_user_moves_the_rest() -> None:
    def update(rows: list[list[int]]) -> dict[str, Tensor]:
        return train_round(
            with_places(), batch_of(rows, 12), SETTINGS, sampler=Everyone(), noise=SeededGaussian(3)
        )

    rows = some_users(6)
    with_all = update(rows)
    for user in range(1, 6):  # the first has one event, so nothing to foretell
        without = update(rows[:user] + rows[user + 1 :])
        assert torch.equal(with_all["witness"], without["witness"])
        assert not np.array_equal(flat(without_witness(with_all)), flat(without_witness(without)))


class ReadsIt(Recommend):
    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        assert self.witness is not None
        return super().per_user_loss(batch) + self.witness.sum()


class ReadsItsValueAlone(Recommend):
    """No gradient would ever show it."""

    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        assert self.witness is not None
        return super().per_user_loss(batch) * (1 + self.witness.detach().mean())


class HidesItsUsersThere(Recommend):
    """Each user's history as a gradient of the witness: what would leak past the clip, were it let through."""

    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        assert self.witness is not None
        seen = batch.items.clamp(min=0).float().mean(dim=1)
        return super().per_user_loss(batch) + seen * torch.nan_to_num(self.witness)[0]


@pytest.mark.parametrize("kind", [ReadsIt, ReadsItsValueAlone, HidesItsUsersThere])
def test_a_loss_that_reads_the_witness_is_refused_before_any_history_is_looked_at(
    kind: type[Recommend],
) -> None:
    check_rows_are_users(with_places())
    model = with_places(kind)
    start = model.trainable_state()
    with pytest.raises(UnvouchedLayerError, match="reads the witness"):
        train_round(model, batch_of([[1, 2]], 4), SETTINGS, sampler=Everyone(), noise=SeededGaussian())
    assert all(torch.equal(value, start[name]) for name, value in model.trainable_state().items())
    assert model.witness is not None
    assert not model.witness.requires_grad


class ReadsItForOneItem(Recommend):
    """Passes what is shown on made-up users; a step must not let it through all the same."""

    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        assert self.witness is not None
        told = (batch.items == ITEMS - 1).any(dim=1).float()
        loss = super().per_user_loss(batch)
        return loss + told * self.witness.sum() if bool(told.any()) else loss


def test_a_loss_that_reads_it_for_some_users_alone_reaches_it_no_more_than_the_others() -> None:
    model = with_places(ReadsItForOneItem)
    update = train_round(
        model, batch_of([[ITEMS - 1, 3, 4], [2, 3]], 4), SETTINGS, sampler=Everyone(), noise=Silent()
    )
    assert not update["witness"].any()
    assert any(value.any() for value in update.values())


def test_a_witness_that_would_be_trained_is_refused() -> None:
    model = with_places()
    assert model.witness is not None
    model.witness.requires_grad_(True)
    with pytest.raises(UnvouchedLayerError, match="the witness would be trained"):
        check_rows_are_users(model)


def test_it_counts_among_the_coordinates_that_the_noise_vouches_for() -> None:
    check_rows_are_users(a_model())
    with pytest.raises(UnvouchedLayerError, match="coordinates, but the noise vouches for"):
        check_rows_are_users(with_places(places=LARGEST_DIMENSION))


def test_scores_do_not_read_it_and_pretraining_leaves_it_at_zero() -> None:
    model, plain = with_places(), a_model()
    batch = batch_of(some_users(5), 12)
    assert model.witness is not None
    with torch.no_grad():
        model.witness.fill_(float("nan"))
    assert torch.equal(model.scores(batch), plain.scores(batch))
    model.set_witness(PLACES)
    plan = PretrainingPlan(histories=8, epochs=1)
    found = pretrain(model, item_vectors(), Priors.none(ITEMS), plan, events=5, seed=1)
    assert not found["witness"].any()
    assert found.keys() == plain.trainable_state().keys() | {"witness"}


def test_it_travels_like_any_parameter_and_can_be_left_out() -> None:
    model = with_places()
    state = {name: value + 1 for name, value in model.trainable_state().items()}
    model.load_trainable(state)
    assert torch.equal(model.trainable_state()["witness"], torch.ones(PLACES))
    with pytest.raises(ValueError, match="witness stand on one side only"):
        a_model().load_trainable(state)
    model.set_witness(0)
    assert "witness" not in model.trainable_state()
    a_model().load_trainable(model.trainable_state())


def histories_of(rows: list[list[int]]) -> Histories:
    events = [item for row in rows for item in row]
    return Histories(
        users=np.array([f"u{place}" for place in range(len(rows))], dtype=np.str_),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        items=np.array(events, dtype=np.int32),
        times=np.arange(len(events), dtype=np.int64),
        kinds=np.zeros(len(events), dtype=np.int16),
        values=np.full(len(events), np.nan, dtype=np.float32),
        kind_names=("view",),
    )


PLAN = make_plan(
    {
        "statistics": {
            "popularity_share": 0.1,
            "transition_share": 0.1,
            "popularity_noise_multiplier": 1.5,
            "transition_noise_multiplier": 2.5,
            "top_items": 6,
        },
        "metrics": {"share": 0.1, "noise_multiplier": 3.5},
        "privacy": {"noise_multiplier": 2.0, "witness_places": PLACES, "epsilon": 100.0},
    }
)


def asked(phase: Phase, number: int) -> Request:
    released = {POPULARITY: torch.arange(float(ITEMS))}
    return Request("a-run", number, 1, "0", PLAN.model_dump_json(), {}, phase=phase, released=released)


Release = Callable[[Histories, SeededGaussian | Silent], dict[str, Tensor]]


def statistic(phase: Phase) -> Release:
    return lambda histories, noise: release_statistics(
        histories, ITEMS, PLAN.statistics, asked(phase, 1), noise, PLACES
    )


def metrics(histories: Histories, noise: SeededGaussian | Silent) -> dict[str, Tensor]:
    held_out = np.ones(len(histories), dtype=np.int64)
    return release_metrics(a_model(), histories, held_out, PLAN, noise)


SUMS: dict[str, tuple[Release, int, float, Request]] = {
    POPULARITY: (statistic(Phase.POPULARITY), ITEMS, 1.5, asked(Phase.POPULARITY, 1)),
    TRANSITIONS: (
        statistic(Phase.TRANSITIONS),
        PairLayout(6, True).places,
        2.5,
        asked(Phase.TRANSITIONS, 2),
    ),
    METRICS: (metrics, 3, 3.5, asked(Phase.METRICS, 9)),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_witness_of_a_sum_is_its_own_noise_in_one_draw(name: str) -> None:
    release, places, sigma, request = SUMS[name]
    noise, users = Recorded(), histories_of(some_users(8))
    found = release(users, noise)
    assert found.keys() == {name, witness_name(name)}
    assert expected_shapes(PLAN, request, ITEMS) == {key: tuple(v.shape) for key, v in found.items()}
    (drawn,) = noise.given
    assert len(drawn) == places + PLACES
    assert np.allclose(found[witness_name(name)].numpy(), sigma * 1.001 * drawn[places:], atol=1e-5)
    silent = release(users, Silent())
    assert silent[name].any()
    assert not silent[witness_name(name)].any()


def test_without_places_a_sum_has_no_witness() -> None:
    found = with_witness(POPULARITY, torch.ones(4), 1.0, SeededGaussian(), 0)
    assert found.keys() == {POPULARITY}
    assert found[POPULARITY].shape == (4,)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_most_items_leave_room_for_the_witness(symmetric: bool) -> None:
    most = most_items(symmetric, 4096)
    assert PairLayout(most, symmetric).places + 4096 <= LARGEST_DIMENSION
    assert PairLayout(most + 1, symmetric).places + 4096 > LARGEST_DIMENSION
    assert most <= most_items(symmetric)


@pytest.mark.parametrize("places", [-1, 4097, 2.5])
def test_a_plans_places_have_bounds(places: float) -> None:
    with pytest.raises(PlanError, match=r"privacy\.witness_places"):
        make_plan({"privacy": {"witness_places": places}})


def test_names() -> None:
    assert is_witness("witness")
    assert is_witness(witness_name(POPULARITY))
    assert not is_witness("witnesses")
    assert not is_witness(POPULARITY)
