"""Heads: a user's state -> scores of items, and the loss that trains it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.models.priors import Priors


def zero_linear(input_width: int, output_width: int, *, bias: bool = True) -> nn.Linear:
    """A Linear layer that gives zero until it is trained, so that a residual starts as nothing."""
    layer = nn.Linear(input_width, output_width, bias=bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def beside(moving: Tensor, *others: Tensor) -> Tensor:
    """Tensors beside each other in the last dimension, as a layer's input.

    Where no other than the first one is trained through, the private step need not know the others' gradient, and
    learns of it here: see `moving_part`.
    """
    joined = torch.cat([moving, *others], dim=-1)
    if moving.requires_grad and not any(other.requires_grad for other in others):
        joined.moving_part = moving  # type: ignore[attr-defined]
    return joined


def moving_part(x: Tensor) -> Tensor:
    """The first columns of a layer's input, which alone need its gradient; or all of it."""
    found: Tensor = getattr(x, "moving_part", x)
    return found


def unread(x: Tensor) -> Tensor:
    """The same input, for a layer whose output is there for its gradient alone: its numbers are never looked at.

    A private step leaves them out; see `is_unread`.
    """
    found = x.view_as(x)
    found.is_unread = True  # type: ignore[attr-defined]
    return found


def is_unread(x: Tensor) -> bool:
    """Whether nobody looks at what a layer makes of this input."""
    return getattr(x, "is_unread", False)


def mean_so_far(x: Tensor, mask: Tensor) -> Tensor:
    """Masked-mean pooling of the events up to each one.

    Args:
        x: [users, events, width], zeros where there is no event.
        mask: [users, events] bool.
    """
    return x.cumsum(dim=1) / mask.unsqueeze(-1).cumsum(dim=1).clamp(min=1)


def next_item_loss(
    states: Tensor,
    items: Tensor,
    vectors: Tensor,
    priors: Tensor,
    negatives: Tensor | None,
    released: Priors | None = None,
) -> Tensor:
    """Each user's mean cross-entropy of the next item, over the events that have a next one.

    Candidates are public: the whole catalog, or a fixed public set of negatives beside the target. Items that
    the user has had are masked. A user's loss depends on no other user.

    Args:
        states: [users, events, width], the state after each event.
        items: [users, events] int64, -1 where there is no event.
        vectors: [items, width] frozen item vectors.
        priors: [users, items] added to each user's scores.
        negatives: [negatives] int64 rows of the catalog, or None for the whole catalog.
        released: priors from released statistics, a public constant, added to each score; None for none.

    Returns:
        [users]; 0 for a user without two events.
    """
    now, following = items[:, :-1], items[:, 1:]
    valid = (now >= 0) & (following >= 0)  # [users, events - 1]
    target = following.clamp(min=0)
    states = states[:, :-1]
    candidates = torch.arange(len(vectors), device=items.device) if negatives is None else negatives
    scores = states @ vectors[candidates].T + priors[:, candidates].unsqueeze(
        1
    )  # [users, events - 1, candidates]
    lift = None if released is None else released.lift_after_each(now)  # [users, events - 1, top + 1]
    if released is not None and lift is not None:
        scores = scores + released.of_candidates(lift, candidates)
    had = _first_had(now, len(vectors))[:, candidates].unsqueeze(1) <= torch.arange(
        now.shape[1], device=items.device
    ).view(1, -1, 1)  # [users, events - 1, candidates]: had by then
    if negatives is None:
        had = had & (target.unsqueeze(-1) != candidates)  # a repeated target stays a candidate
        scores = scores.masked_fill(had, float("-inf"))
        labels = target
    else:
        had = had | (target.unsqueeze(-1) == candidates)
        own = (states * vectors[target]).sum(-1, keepdim=True) + priors.gather(1, target).unsqueeze(-1)
        if released is not None and lift is not None:
            own = own + released.of_targets(lift, target).unsqueeze(-1)
        scores = torch.cat([own, scores.masked_fill(had, float("-inf"))], dim=-1)
        labels = torch.zeros_like(target)
    losses = cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view_as(target)
    return (losses * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def _first_had(items: Tensor, catalog: int) -> Tensor:
    """[users, catalog]: at which event each user first had each item; `events` where never."""
    users, events = items.shape
    when = torch.arange(events, device=items.device).expand(users, -1)
    first = torch.full((users, catalog + 1), events, device=items.device)
    slot = torch.where(items >= 0, items, catalog)  # padding goes to a slot of its own
    return first.scatter_reduce(1, slot, when, reduce="amin")[:, :catalog]
