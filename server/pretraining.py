"""Public pre-training at the server: cores learn from synthetic histories, drawn from text and released statistics.

Post-processing of public texts and released sums, deterministic by the plan's seed, free of privacy cost. A
history is drawn event by event from the recommender that every family starts as: content kernels over item
vectors, plus released priors. The model learns to foretell these histories *without* being given the priors,
so its core has to carry what they say; then every parameter that started at zero (heads, adapters, the trained
prior) goes back to zero. Fine-tuning so begins at exactly the same recommender, on features that mean something.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.memory import memory_kept
from common.models.batches import HistoryBatch
from common.models.content import RECENCY_KERNELS
from common.models.interface import InterestModel
from common.models.priors import Priors
from common.phases import PretrainingPlan

_HISTORIES_AT_ONCE = 256
_SECONDS_APART = 3600


@torch.no_grad()
def synthetic_histories(
    vectors: Tensor, priors: Priors, count: int, events: int, generator: torch.Generator
) -> Tensor:
    """[count, events] int64: histories without repeated items, drawn from softmax(content + priors).

    Args:
        vectors: [items, width] unit item vectors.
        events: length of each; no more than there are items.
    """
    if count == 0:
        return torch.zeros(0, events, dtype=torch.int64)
    parts = [
        _draw(vectors, priors, min(_HISTORIES_AT_ONCE, count - start), events, generator)
        for start in range(0, count, _HISTORIES_AT_ONCE)
    ]
    return torch.cat(parts)


def _draw(vectors: Tensor, priors: Priors, count: int, events: int, generator: torch.Generator) -> Tensor:
    items = torch.full((count, events), -1, dtype=torch.int64)
    memories = [vectors.new_zeros(count, vectors.shape[1]) for _ in RECENCY_KERNELS]
    heard = torch.zeros(count, len(priors.top))  # [count, top] decayed weight of each event
    place = {int(row): position for position, row in enumerate(priors.top.tolist())}
    index = torch.tensor([place.get(row, -1) for row in range(len(vectors))])
    scores = priors.log_popularity.expand(count, -1).clone()
    for event in range(events):
        taken = items[:, :event]
        drawn = torch.multinomial(
            torch.softmax(scores.scatter(1, taken, float("-inf")), dim=1), 1, generator=generator
        ).squeeze(1)
        items[:, event] = drawn
        state = vectors.new_zeros(count, vectors.shape[1])
        for memory, (weight, decay) in zip(memories, RECENCY_KERNELS, strict=True):
            memory.mul_(decay).add_(vectors[drawn])
            state += weight * torch.nn.functional.normalize(memory, dim=-1)
        scores = state @ vectors.T + priors.log_popularity
        if len(priors.top):
            heard.mul_(priors.decay)
            position = index[drawn]
            known = position >= 0
            heard[known.nonzero().squeeze(1), position[known]] += 1.0
            scores[:, priors.top] += heard @ priors.lift
    return items


@memory_kept()
def pretrain(
    model: InterestModel, vectors: Tensor, priors: Priors, plan: PretrainingPlan, events: int, seed: int
) -> dict[str, Tensor]:
    """The parameters that private fine-tuning starts with.

    Args:
        model: at its seeded start, on the CPU; left as it was.
        vectors: [items, width] unit item vectors.
        events: length of a synthetic history.
    """
    before, released = model.trainable_state(), model.released
    generator = torch.Generator().manual_seed(seed)
    items = synthetic_histories(vectors, priors, plan.histories, min(events, len(vectors)), generator)
    times = torch.arange(1, items.shape[1] + 1).expand_as(items) * _SECONDS_APART
    model.set_released(None)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _descend(model, HistoryBatch(items=items, times=times.clone()), plan, generator)
        after = model.trainable_state()
    finally:
        model.load_trainable(before)
        model.set_released(released)
    return {name: value if bool(before[name].any()) else before[name] for name, value in after.items()}


def _descend(
    model: InterestModel, histories: HistoryBatch, plan: PretrainingPlan, generator: torch.Generator
) -> None:
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=plan.learning_rate, weight_decay=0.0)
    model.train()
    for _ in range(plan.epochs):
        for rows in torch.randperm(len(histories), generator=generator).split(plan.batch_size):
            optimiser.zero_grad()
            model.per_user_loss(model.prepare(histories.rows(rows))).mean().backward()
            optimiser.step()
    model.eval()
