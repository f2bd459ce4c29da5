"""Online feedback: a site's own copy of a finished model follows what its users say, event by event.

W_new = W_old + alpha * gradient of log P(y | X) with respect to W, P(y | X) = sigmoid(score of the item after the
history): one step of online logistic regression (Bottou 1998) on the layer that maps features of a history to its
state. The copy holds what users said, so it stays in the site's folder; training starts from broadcast parameters
and never sees it.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from common.models.batches import HistoryBatch
from common.models.sequence import SequenceModel
from common.models.tasks.interest import Interest

ONLINE_FAMILIES = ("recommend", "dual")
"""Families whose state is one trained layer on features of the history."""
LARGEST_STEP = 1.0
"""A step's norm is cut to this, so that no single event can throw the model off."""


class FeedbackError(ValueError):
    """The model cannot follow feedback, or the feedback makes no sense; the message says why and what to do."""


class OnlineModel:
    """See the module.

    Args:
        model: finished; left as it is.
        family: its name in the plan.
        alpha: step size.

    Raises:
        FeedbackError: the family has no such layer, or alpha is not above 0.
    """

    def __init__(self, model: SequenceModel, family: str, *, alpha: float = 0.1) -> None:
        if family not in ONLINE_FAMILIES:
            raise FeedbackError(
                f"family {family} does not follow feedback online: train one of {', '.join(ONLINE_FAMILIES)}"
            )
        if not 0 < alpha <= 10:
            raise FeedbackError(f"alpha is {alpha:g}, but must lie above 0 and not above 10")
        self.alpha = alpha
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        layer = self.model.residual
        assert isinstance(layer, nn.Linear)
        self._layer = layer

    def log_odds(self, batch: HistoryBatch, items: Tensor) -> Tensor:
        """[users]: of each user's liking one item after the history.

        For a model of next items, whose scores are no log odds, an item is measured against the mean item.
        """
        model = self.model
        if isinstance(model.task, Interest):
            longer = model.prepare(batch.followed_by(items))
            reading = model.read(model.event_vectors(longer), longer)
            states = model.task.content(longer) + reading.residual
            logits = model.task.logits(states, model.priors_of(len(longer)), longer, reading.pairs)
            return logits.gather(1, (longer.lengths - 1).unsqueeze(1)).squeeze(1)
        prepared = model.prepare(batch)
        last = (prepared.lengths - 1).clamp(min=0)
        states = model.states(prepared)[torch.arange(len(batch)), last] * (prepared.lengths > 0).unsqueeze(-1)
        candidates = model.task.candidates
        return (states * (candidates[items] - candidates.mean(dim=0))).sum(dim=-1)

    def feedback(self, batch: HistoryBatch, items: Tensor, liked: Tensor) -> float:
        """Takes one step from what users said of an item each; gives the mean log P before it.

        Args:
            batch: histories before the feedback.
            items: [users] int64 rows of the catalog.
            liked: [users] bool.

        Raises:
            FeedbackError: an item is not in the catalog, or there is no history.
        """
        if batch.items.shape[1] == 0 or not bool((batch.lengths > 0).all()):
            raise FeedbackError("feedback needs a history of at least one event before it")
        if bool(((items < 0) | (items >= len(self.model.vectors))).any()):
            raise FeedbackError(f"items must be rows of the catalog, from 0 to {len(self.model.vectors) - 1}")
        weights = [self._layer.weight, self._layer.bias]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            sign = torch.where(liked, 1.0, -1.0)
            of_user = nn.functional.logsigmoid(sign * self.log_odds(batch, items))
            gradients = torch.autograd.grad(of_user.sum(), weights)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm() * self.alpha
        shrink = min(1.0, LARGEST_STEP / max(float(norm), 1e-12))
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(self.alpha * shrink * gradient)
        return float(of_user.detach().mean())

    def save(self, file: Path) -> None:
        """Writes the layer, whole or not at all, for its owner's eyes alone (mode 0600)."""
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        data = save({"weight": self._layer.weight.contiguous(), "bias": self._layer.bias.contiguous()})
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Goes on from a layer that `save` wrote.

        Raises:
            FeedbackError: the file cannot be read, is damaged, or is of another model; the layer stays as it is.
        """
        try:
            state = load(file.read_bytes())
        except OSError as error:
            raise FeedbackError(
                f"{file} cannot be read ({error.strerror}): run this as its owner, on a disk that works"
            ) from error
        except SafetensorError as error:
            raise FeedbackError(
                f"{file} is damaged: put a copy of it back, or delete it and start anew"
            ) from error
        own = {"weight": self._layer.weight, "bias": self._layer.bias}
        if {name: part.shape for name, part in state.items()} != {name: w.shape for name, w in own.items()}:
            raise FeedbackError(f"{file} was adapted from another model: move it away to start anew")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(state[name])
