"""Content states and the next-item loss against slow loops; the start of the model; its trainable state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.models.batches import HistoryBatch, concatenate
from common.models.content import RECENCY_KERNELS, content_states
from common.models.families.recommend import Recommend
from common.models.heads import next_item_loss
from tests.common.models.tiny_models import histories

ITEMS, WIDTH = 9, 5
ROWS = [[1, 2, 3, 2, 8], [4], [0, 0, 0], [7, 6, 5, 4, 3, 2, 1, 0, 8, 8], [5, 6]]
"""A repeated item, one event, the same item again and again, the whole catalog."""


def vectors() -> Tensor:
    made = normalize(torch.randn(ITEMS, WIDTH, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    made[6] = 0  # an item without text
    return made


def slow_content(table: Tensor, row: list[int], now: int) -> Tensor:
    state = torch.zeros(table.shape[1], dtype=table.dtype)
    for weight, decay in RECENCY_KERNELS:
        total = torch.zeros_like(state)
        for then in range(now + 1):
            total += (1.0 if now == then else decay ** (now - then)) * table[row[then]]
        norm = float(total.norm())
        state += weight * (total / norm if norm > 0 else total)
    return state


def test_content_states_equal_a_slow_loop() -> None:
    items, _ = histories(ROWS, width=12)
    states = content_states(vectors(), items)
    for user, row in enumerate(ROWS):
        for now in range(len(row)):
            torch.testing.assert_close(
                states[user, now], slow_content(vectors(), row, now), rtol=0, atol=1e-12
            )


def slow_loss(
    states: Tensor, row: list[int], table: Tensor, priors: Tensor, negatives: list[int] | None
) -> float:
    """One user's loss by the definition, one event at a time."""
    losses = []
    for now in range(len(row) - 1):
        target, had = row[now + 1], set(row[: now + 1])
        others = (set(range(len(table))) if negatives is None else set(negatives)) - had - {target}
        score = {item: float(states[now] @ table[item] + priors[item]) for item in {target, *others}}
        losses.append(math.log(sum(math.exp(value) for value in score.values())) - score[target])
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("negatives", [None, [1, 2, 6], list(range(ITEMS)), [8]])
def test_the_loss_equals_a_slow_loop(negatives: list[int] | None) -> None:
    items, _ = histories(ROWS, width=12)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(ROWS), 12, WIDTH, generator=generator).double()
    priors = torch.randn(len(ROWS), ITEMS, generator=generator).double()
    public = None if negatives is None else torch.tensor(negatives)
    losses = next_item_loss(states, items, vectors(), priors, public)
    expected = [slow_loss(states[u], row, vectors(), priors[u], negatives) for u, row in enumerate(ROWS)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("negatives", [None, [1, 2]])
def test_users_without_two_events_lose_nothing_and_have_finite_gradients(negatives: list[int] | None) -> None:
    items, _ = histories([[], [4], [0, 0], [1, 3]], width=3)
    states = torch.randn(4, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    priors = torch.zeros(4, ITEMS, dtype=torch.float64, requires_grad=True)
    public = None if negatives is None else torch.tensor(negatives)
    losses = next_item_loss(states, items, vectors(), priors, public)
    assert losses[:2].tolist() == [0, 0]
    to_states, to_priors = torch.autograd.grad(losses.sum(), [states, priors])
    assert to_states.isfinite().all()
    assert to_priors.isfinite().all()
    assert not to_states[:2].any()
    assert not to_priors[:2].any()
    assert to_priors[3].any()


def test_what_a_user_has_had_takes_no_part_and_a_repeated_target_does() -> None:
    items, _ = histories([[1, 2, 1]])
    states = torch.zeros(1, 3, WIDTH, dtype=torch.float64)
    priors = torch.zeros(1, ITEMS, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(next_item_loss(states, items, vectors(), priors, None).sum(), [priors])
    # After 1: eight candidates with 2 the target; after 1, 2: item 1 again, beside the seven never had.
    expected = torch.full((ITEMS,), (1 / 8 + 1 / 8) / 2, dtype=torch.float64)
    expected[1] = (0 + (1 / 8 - 1)) / 2
    expected[2] = (1 / 8 - 1 + 0) / 2
    torch.testing.assert_close(gradient[0], expected, rtol=0, atol=1e-12)


@pytest.fixture
def model() -> Recommend:
    torch.manual_seed(0)
    return Recommend(vectors().float(), core="lstm", hidden_width=3)


def test_the_model_at_its_start_scores_exactly_like_content_alone(model: Recommend) -> None:
    batch = HistoryBatch(*histories([*ROWS, []], width=12))
    content = content_states(vectors().float(), batch.items)
    last = torch.stack([content[user, len(row) - 1] for user, row in enumerate(ROWS)])
    scores = model.scores(batch)
    assert torch.equal(scores[:-1], last @ vectors().float().T)
    assert not scores[-1].any()  # a user without events gets the priors, which are nothing yet


def test_scores_do_not_depend_on_who_else_is_asked_for_nor_in_which_order(model: Recommend) -> None:
    batch = HistoryBatch(*histories(ROWS, width=12))
    scores = model.scores(batch)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(model.scores(batch.rows(order)), scores[order], rtol=0, atol=1e-5)
    for user in range(len(ROWS)):
        alone = model.scores(batch.rows(torch.tensor([user])))
        torch.testing.assert_close(alone[0], scores[user], rtol=0, atol=1e-5)
    wide = HistoryBatch(*histories(ROWS, width=30))
    torch.testing.assert_close(model.scores(wide), scores, rtol=0, atol=1e-5)


def test_a_moved_model_no_longer_is_content_alone(model: Recommend) -> None:
    batch = HistoryBatch(*histories(ROWS, width=12))
    before = model.scores(batch)
    with torch.no_grad():
        model.residual.weight.add_(0.1)
    assert not torch.allclose(model.scores(batch), before, atol=1e-3)


def test_the_trainable_state_travels(model: Recommend) -> None:
    state = {name: torch.randn_like(value) for name, value in model.trainable_state().items()}
    model.load_trainable(state)
    for name, value in model.trainable_state().items():
        assert torch.equal(value, state[name])
    copied = model.trainable_state()
    copied["residual.bias"].add_(1)  # a copy, not the model's own
    assert torch.equal(model.trainable_state()["residual.bias"], state["residual.bias"])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(model: Recommend) -> None:
    good = model.trainable_state()
    name = "residual.bias"
    bad = [
        ({k: v for k, v in good.items() if k != name}, "on one side only"),
        ({**good, "extra": torch.zeros(1)}, "extra"),
        ({**good, name: torch.zeros(WIDTH + 1)}, "has shape"),
        ({**good, name: torch.zeros(1, WIDTH)}, "has shape"),
        ({**good, name: good[name].double()}, "float64"),
        ({**good, name: good[name].to(torch.bfloat16)}, "bfloat16"),
        ({}, "on one side only"),
    ]
    for state, said in bad:
        moved = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
        with pytest.raises(ValueError, match=said):
            model.load_trainable(moved)
        for key, value in model.trainable_state().items():
            assert torch.equal(value, good[key]), f"{key} was changed by a state that was refused"


def test_rows_and_concatenation_keep_users_in_one_row_each() -> None:
    batch = HistoryBatch(*histories(ROWS, width=12))
    parts = [batch.rows(torch.tensor([0, 1])), batch.rows(torch.tensor([2, 3, 4]))]
    whole = concatenate(parts)
    assert torch.equal(whole.items, batch.items)
    assert torch.equal(whole.times, batch.times)
    assert whole.lengths.tolist() == [len(row) for row in ROWS]
