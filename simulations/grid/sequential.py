"""What sequential recommendation can do here without any privacy: GRU4Rec and SASRec with item embeddings.

GRU4Rec (Hidasi et al. 2016, arXiv:1511.06939) with softmax over all or sampled items instead of its pairwise losses,
and SASRec (Kang & McAuley 2018, arXiv:1808.09781) with the same loss: both as in later reproductions, where that loss
is the stronger one. Of the same width as the private families' item vectors. The best epoch on validation is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.models.batches import HistoryBatch

Kind = Literal["gru4rec", "sasrec"]


@dataclass(frozen=True)
class SequentialSettings:
    """Of one training.

    Attributes:
        width: of item embeddings and states.
        negatives: sampled items a batch beside the targets, shared by it; None for the whole catalog.
        patience: judgements without a better one before the end.
        judge_every: epochs.
    """

    width: int = 64
    layers: int = 1
    dropout: float = 0.3
    learning_rate: float = 3e-3
    batch_size: int = 64
    epochs: int = 60
    negatives: int | None = None
    patience: int = 4
    judge_every: int = 2


class Sequential(nn.Module):
    """Item embeddings -> GRU, or causal self-attention with learnt positions -> score against every item."""

    def __init__(self, kind: Kind, items: int, max_events: int, settings: SequentialSettings) -> None:
        super().__init__()
        self.kind, self.items = kind, items
        self.embedding = nn.Embedding(items + 1, settings.width, padding_idx=items)
        nn.init.normal_(self.embedding.weight, std=settings.width**-0.5)
        self.dropout = nn.Dropout(settings.dropout)
        if kind == "gru4rec":
            self.core: nn.Module = nn.GRU(settings.width, settings.width, settings.layers, batch_first=True)
        else:
            self.positions = nn.Parameter(torch.randn(max_events, settings.width) * settings.width**-0.5)
            block = nn.TransformerEncoderLayer(
                settings.width,
                nhead=2,
                dim_feedforward=settings.width,
                dropout=settings.dropout,
                batch_first=True,
                norm_first=True,
            )
            self.core = nn.TransformerEncoder(
                block, settings.layers, norm=nn.LayerNorm(settings.width), enable_nested_tensor=False
            )
        self.bias = nn.Parameter(torch.zeros(items))

    def states(self, items: Tensor) -> Tensor:
        """[users, events, width] after each event; items [users, events], -1 where there is none."""
        x = self.dropout(self.embedding(torch.where(items >= 0, items, self.items)))
        if self.kind == "gru4rec":
            after: Tensor = self.dropout(self.core(x)[0])
            return after
        events = items.shape[1]
        mask = torch.ones(events, events, dtype=torch.bool, device=items.device).triu(1)
        found: Tensor = self.core(x + self.positions[:events], mask=mask, is_causal=True)
        return found

    def loss(self, items: Tensor, generator: torch.Generator, negatives: int | None) -> Tensor:
        """Mean cross-entropy of the next item over all places that have one."""
        before, after = items[:, :-1], items[:, 1:]
        real = after >= 0
        states, targets = self.states(before)[real], after[real]
        weight = self.embedding.weight
        if negatives is None:
            return cross_entropy(states @ weight[:-1].T + self.bias, targets)
        drawn = torch.randint(self.items, (negatives,), generator=generator)
        own = (states * weight[targets]).sum(-1, keepdim=True) + self.bias[targets].unsqueeze(-1)
        others = (states @ weight[drawn].T + self.bias[drawn]).masked_fill(
            targets.unsqueeze(-1) == drawn, -torch.inf
        )
        return cross_entropy(torch.cat([own, others], dim=-1), torch.zeros_like(targets))

    @torch.no_grad()
    def scores(self, batch: HistoryBatch) -> Tensor:
        """[users, items]."""
        states = self.states(batch.items)
        last = states[torch.arange(len(batch)), batch.lengths.clamp(min=1) - 1]
        found: Tensor = last @ self.embedding.weight[:-1].T + self.bias
        return found


def train_sequential(
    kind: Kind,
    batch: HistoryBatch,
    items: int,
    settings: SequentialSettings,
    score: Callable[[Sequential], float],
    seed: int,
) -> Sequential:
    """The trained model, at its best epoch by `score`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = Sequential(kind, items, batch.items.shape[1], settings)
        optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        best, kept, waited = -1.0, copy.deepcopy(model.state_dict()), 0
        for epoch in range(1, settings.epochs + 1):
            model.train()
            for rows in torch.randperm(len(batch), generator=generator).split(settings.batch_size):
                optimiser.zero_grad()
                model.loss(batch.items[rows], generator, settings.negatives).backward()
                optimiser.step()
            if epoch % settings.judge_every:
                continue
            model.eval()
            found = score(model)
            waited = 0 if found > best else waited + 1
            if found > best:
                best, kept = found, copy.deepcopy(model.state_dict())
            elif waited >= settings.patience:
                break
    model.load_state_dict(kept)
    return model.eval()
