"""Public pre-training: deterministic, drawn from what it says, and a start that scores as if it had not been."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.priors import Priors
from common.phases import PretrainingPlan
from server.pretraining import pretrain, synthetic_histories

ITEMS, EVENTS = 15, 6
PLAN = PretrainingPlan(histories=40, epochs=2, batch_size=16)


def vectors() -> Tensor:
    return normalize(torch.randn(ITEMS, 4, generator=torch.Generator().manual_seed(1)), dim=-1)


def priors(lift: float = 0.0) -> Priors:
    """Item 3 is by far the most popular; 0 leads to 7 if there is a lift."""
    popularity = torch.zeros(ITEMS)
    popularity[3] = 6.0
    matrix = torch.zeros(2, 2)
    matrix[0, 1] = lift
    return Priors(torch.log_softmax(popularity, dim=0), matrix, torch.tensor([0, 7]), 0.9)


def model() -> Recommend:
    torch.manual_seed(0)
    return Recommend(vectors(), hidden_width=3)


def drawn(given: Priors, seed: int = 0, count: int = 300) -> Tensor:
    return synthetic_histories(vectors(), given, count, EVENTS, torch.Generator().manual_seed(seed))


def test_histories_repeat_no_item_and_begin_by_popularity() -> None:
    found = drawn(priors())
    assert found.shape == (300, EVENTS)
    assert all(len(set(row)) == EVENTS for row in found.tolist())
    assert float((found[:, 0] == 3).float().mean()) > 0.9


def test_histories_follow_the_lift() -> None:
    def followed(found: Tensor) -> float:
        """How often 7 comes right after 0, among all histories."""
        return float(((found[:, :-1] == 0) & (found[:, 1:] == 7)).any(dim=1).float().mean())

    assert followed(drawn(priors(lift=12.0))) > 3 * followed(drawn(priors())) + 0.1


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    starts = [pretrain(model(), vectors(), priors(), PLAN, EVENTS, seed) for seed in (1, 1, 2)]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert any(not torch.equal(starts[0][name], starts[2][name]) for name in starts[0])


def test_the_core_has_learned_and_the_scores_are_those_of_the_start() -> None:
    at_start = model()
    before = at_start.trainable_state()
    after = pretrain(at_start, vectors(), priors(), PLAN, EVENTS, 0)
    assert all(torch.equal(before[name], value) for name, value in at_start.trainable_state().items())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("core.") for name in changed)
    trained = model()
    trained.load_trainable(after)
    items = torch.tensor([[0, 3, 5, -1]])
    batch = HistoryBatch(items=items, times=torch.zeros_like(items))
    torch.testing.assert_close(trained.scores(batch), at_start.scores(batch))


def test_no_histories_leave_the_start_as_it_is() -> None:
    none = PretrainingPlan(histories=0)
    before = model().trainable_state()
    after = pretrain(model(), vectors(), priors(), none, EVENTS, 0)
    assert all(torch.equal(before[name], after[name]) for name in before)
