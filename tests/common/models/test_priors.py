"""Released statistics as priors: deterministic, harmless where nothing survives the noise, the same in training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.priors import Priors, make_priors
from common.phases import StatisticsPlan
from common.sums import POPULARITY, SITES, TRANSITIONS, PairLayout

ITEMS, TOP = 12, 6
PLAN = StatisticsPlan(
    popularity_share=0.1,
    transition_share=0.5,
    popularity_noise_multiplier=2.0,
    transition_noise_multiplier=1.0,
    top_items=TOP,
)
HISTORIES = torch.tensor([[0, 3, 2, -1], [5, -1, -1, -1], [-1, -1, -1, -1], [9, 1, 0, 4]])


def released(transitions: Tensor | None = None) -> dict[str, Tensor]:
    places = PairLayout(TOP, True).places
    vector = torch.arange(places, dtype=torch.float32) if transitions is None else transitions
    return {
        POPULARITY: torch.linspace(100, 10, ITEMS),
        POPULARITY + SITES: torch.tensor([4.0]),
        TRANSITIONS: vector,
        TRANSITIONS + SITES: torch.tensor([4.0]),
    }


def slow_scores(priors: Priors, items: list[int]) -> Tensor:
    """[items], by the formula of the module."""
    scores = priors.log_popularity.double().clone()
    top = priors.top.tolist()
    events = [item for item in items if item >= 0]
    for age, item in enumerate(reversed(events)):
        if item in top:
            for place, other in enumerate(top):
                scores[other] += priors.decay**age * float(priors.lift[top.index(item), place])
    return scores


def test_scores_are_those_of_the_formula() -> None:
    priors = make_priors(released(), PLAN, ITEMS)
    expected = torch.stack([slow_scores(priors, row) for row in HISTORIES.tolist()])
    torch.testing.assert_close(priors.after_last(HISTORIES).double(), expected, atol=1e-5, rtol=1e-5)


def test_training_sees_after_each_event_what_scoring_sees_after_the_last() -> None:
    priors = make_priors(released(), PLAN, ITEMS)
    lift = priors.lift_after_each(HISTORIES)
    each = priors.of_candidates(lift, torch.arange(ITEMS))  # [users, events, items]
    for user, row in enumerate(HISTORIES.tolist()):
        for event in range(len(row)):
            if row[event] >= 0:
                so_far = torch.tensor([row[: event + 1] + [-1] * (len(row) - event - 1)])
                torch.testing.assert_close(each[user, event], priors.after_last(so_far)[0])
    targets = torch.tensor([[1, 2, 3, 4]]).expand(len(HISTORIES), -1)
    torch.testing.assert_close(
        priors.of_targets(lift, targets), each.gather(2, targets.unsqueeze(-1)).squeeze(-1)
    )


def test_post_processing_is_deterministic() -> None:
    one, other = (make_priors(released(), PLAN, ITEMS) for _ in range(2))
    assert torch.equal(one.log_popularity, other.log_popularity)
    assert torch.equal(one.lift, other.lift)
    assert torch.equal(one.top, other.top)


def test_counts_within_the_noise_leave_no_lift() -> None:
    places = PairLayout(TOP, True).places
    below = PLAN.threshold * 1.0 * math.sqrt(4) - 1e-3
    assert not make_priors(released(torch.full((places,), below)), PLAN, ITEMS).lift.any()
    above = make_priors(released(torch.full((places,), below + 2e-3)), PLAN, ITEMS).lift
    assert int((above > 0).sum()) == 2 * places


def test_without_statistics_nothing_is_added() -> None:
    priors = make_priors({}, StatisticsPlan(), ITEMS)
    assert not priors.after_last(HISTORIES).any()


def test_negative_noisy_popularity_keeps_scores_finite() -> None:
    noisy = released() | {POPULARITY: torch.full((ITEMS,), -50.0)}
    assert bool(make_priors(noisy, PLAN, ITEMS).after_last(HISTORIES).isfinite().all())


def test_a_release_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="12 items"):
        make_priors(released() | {POPULARITY: torch.ones(ITEMS + 1)}, PLAN, ITEMS)


def model() -> Recommend:
    torch.manual_seed(0)
    return Recommend(torch.nn.functional.normalize(torch.randn(ITEMS, 4), dim=-1), hidden_width=3)


def test_a_model_adds_them_in_scoring_and_in_training() -> None:
    plain, with_priors = model(), model()
    priors = make_priors(released(), PLAN, ITEMS)
    with_priors.set_released(priors)
    batch = HistoryBatch(items=HISTORIES, times=torch.zeros_like(HISTORIES))
    torch.testing.assert_close(
        with_priors.scores(batch) - plain.scores(batch), priors.after_last(HISTORIES), atol=1e-5, rtol=1e-5
    )
    assert not torch.equal(with_priors.per_user_loss(batch), plain.per_user_loss(batch))
    with_priors.set_released(None)
    assert torch.equal(with_priors.per_user_loss(batch), plain.per_user_loss(batch))


def test_they_are_no_parameters_and_not_in_an_update() -> None:
    plain, with_priors = model(), model()
    with_priors.set_released(make_priors(released(), PLAN, ITEMS))
    assert set(with_priors.trainable()) == set(plain.trainable())


def test_a_users_loss_with_priors_depends_on_no_other_user() -> None:
    with_priors = model()
    with_priors.set_released(make_priors(released(), PLAN, ITEMS))
    batch = HistoryBatch(items=HISTORIES, times=torch.zeros_like(HISTORIES))
    together = with_priors.per_user_loss(batch)
    alone = torch.cat([with_priors.per_user_loss(batch.rows(torch.tensor([row]))) for row in range(4)])
    torch.testing.assert_close(together, alone)
