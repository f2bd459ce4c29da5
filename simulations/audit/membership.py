"""Was this user in the training? Three attacks on a model's losses, by someone with models of the same kind.

Some models are trained, each on a random half of made-up users. Each in turn is the target; the others, which were
trained alike on other halves, are what the attacker has to compare with (shadow models, reference models). A loss
threshold asks for the loss alone (Yeom et al. 2018); the calibrated one takes off what the user's loss is where the
user was not in (Watson et al. 2022); LiRA, offline, asks how unusual it is among those (Carlini et al. 2022). No
figure here bounds epsilon from either side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from client.training import StepSettings, train_round
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.privacy.noise import SecureGaussian, SecurePoissonSampler
from simulations.audit.one_run import Floats, clopper_pearson
from simulations.audit.trainers import Trainer

Booleans = npt.NDArray[np.bool_]
ATTACKS = ("loss threshold", "calibrated", "LiRA")
RATES = (0.01, 0.001)
"""False-positive rates at which true positives are counted."""

_USUAL = 4.0
"""How many models' worth the spread over all users counts in the spread of one user's losses."""


@dataclass(frozen=True)
class Losses:
    """What the attacker sees, and the truth.

    Attributes:
        losses: [models, users].
        members: [models, users].
    """

    losses: Floats
    members: Booleans


@dataclass(frozen=True)
class Curve:
    """An attack's success, over all targets.

    Attributes:
        roc: [points, 2] false- and true-positive rates, rising.
        area: under it.
        at: false-positive rate -> true positives there, lower and upper end of the 95 % interval.
        members, others: how many decisions there were of each kind.
    """

    roc: Floats
    area: float
    at: dict[float, tuple[float, float, float]]
    members: int
    others: int


def halves(models: int, users: int, chance: np.random.Generator) -> Booleans:
    """[models, users]: each user is in half of the models, at random."""
    order = np.argsort(chance.random((models, users)), axis=0)
    members: Booleans = order < models // 2
    return members


def train_without_privacy(
    model: InterestModel, histories: HistoryBatch, steps: int, learning_rate: float
) -> None:
    """Plain AdamW on everyone at once, as people train who do not think of privacy; the model is moved."""
    model.train()
    prepared = model.prepare(histories)
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        model.per_user_loss(prepared).mean().backward()
        optimiser.step()


def train_with_privacy(
    model: InterestModel, histories: HistoryBatch, settings: StepSettings, trainer: Trainer = train_round
) -> None:
    """The site's own code; the model is moved."""
    trainer(model, histories, settings, sampler=SecurePoissonSampler(), noise=SecureGaussian())


def losses_of_models(
    model: InterestModel,
    histories: HistoryBatch,
    members: Booleans,
    train: Callable[[InterestModel, HistoryBatch], None],
    on_model: Callable[[], None] = lambda: None,
) -> Losses:
    """Every user's loss under each of the models.

    Args:
        model: at the start that all are trained from; left there.
        members: [models, users] whom to train on.
        train: moves the model.
    """
    start, found = model.trainable_state(), []
    device = histories.items.device
    prepared = model.prepare(histories)
    try:
        for row in members:
            model.load_trainable(start)
            train(model, histories.rows(torch.as_tensor(np.flatnonzero(row)).to(device)))
            with torch.no_grad():
                found.append(model.per_user_loss(prepared).double().cpu().numpy())
            on_model()
    finally:
        model.load_trainable(start)
    return Losses(np.stack(found), members)


def scores(seen: Losses) -> dict[str, Floats]:
    """Attack -> [models, users], higher where the attacker rather thinks that the user was in."""
    confidence = _confidence(seen.losses)
    plain, calibrated, likelihood = -seen.losses, np.empty_like(seen.losses), np.empty_like(seen.losses)
    for target in range(len(seen.losses)):
        out = ~seen.members.copy()
        out[target] = False
        calibrated[target] = _usual(seen.losses, out)[0] - seen.losses[target]
        mean, spread = _usual(confidence, out)
        likelihood[target] = (confidence[target] - mean) / spread
    return dict(zip(ATTACKS, (plain, calibrated, likelihood), strict=True))


def _confidence(losses: Floats) -> Floats:
    """log(p / (1 - p)) of the mean probability that a loss stands for, which is nearly normal over models."""
    inside = np.clip(losses, 1e-9, None)
    confidence: Floats = -inside - np.log(-np.expm1(-inside))
    return confidence


def _usual(values: Floats, out: Booleans) -> tuple[Floats, Floats]:
    """Mean and spread of each user's values over the models where the user was not in; spreads lean on all users'."""
    count = out.sum(axis=0)
    everyone = values[out].mean() if out.any() else values.mean()
    mean = np.where(count > 0, (values * out).sum(axis=0) / np.maximum(count, 1), everyone)
    squares = ((values - mean) ** 2 * out).sum(axis=0)
    usual = squares.sum() / max(1, int(np.maximum(count - 1, 0).sum()))
    spread = np.sqrt((squares + _USUAL * usual) / (np.maximum(count - 1, 0) + _USUAL))
    return mean, np.maximum(spread, 1e-12)


def curve_of_attack(score: Floats, members: Booleans) -> Curve:
    """Over all targets and users together.

    Intervals are Clopper and Pearson's, for decisions as if each were of another user.
    """
    inside, outside = np.sort(score[members]), np.sort(score[~members])
    points = np.unique(np.concatenate([inside, outside]))[::-1]
    true = 1 - np.searchsorted(inside, points, side="left") / len(inside)
    false = 1 - np.searchsorted(outside, points, side="left") / len(outside)
    roc = np.concatenate([[[0.0, 0.0]], np.stack([false, true], axis=1)])
    area = float(np.sum(np.diff(roc[:, 0]) * (roc[1:, 1] + roc[:-1, 1]) / 2))
    at = {}
    for rate in RATES:
        right = round(float(roc[roc[:, 0] <= rate, 1].max()) * len(inside))
        at[rate] = (right / len(inside), *clopper_pearson(right, len(inside)))
    return Curve(roc, area, at, len(inside), len(outside))


def thinned(roc: Floats, points: int = 120) -> list[list[float]]:
    """So many points of a ROC, evenly on the logarithm of its false positives, for a chart."""
    kept = roc[roc[:, 0] > 0]
    if not len(kept):
        return [[0.0, 0.0], [1.0, 1.0]]
    rates = np.geomspace(kept[0, 0], 1.0, points)
    places = np.unique(np.searchsorted(kept[:, 0], rates * (1 + 1e-9), side="right") - 1)
    chosen: list[list[float]] = kept[places].round(6).tolist()
    return chosen
