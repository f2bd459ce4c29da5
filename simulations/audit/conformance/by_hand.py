"""A round of private fine-tuning, computed again from the plan alone, user by user: slow, and with nothing of a site's.

Each user's gradient is plain autograd's for that user's row alone; it is clipped as a whole and added up in float64,
rounded to the grid, noised, divided by the public constant, and taken as one step of gradient descent. Of the site's
code it shares the model's loss and no more. What a user adds is a parameter, for controls that let users add more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from client.training import StepSettings
from common.config import Plan
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.privacy.noise import GRID_BITS, INFLATION, GaussianNoise, UserSampler

Gradients = Mapping[str, Tensor]
"""Trainable parameter -> one user's gradient, float64."""
Part = Callable[[Gradients, float, int], Gradients]
"""(a user's gradients, C, how many users of the step came before) -> what the user adds to the step's sum."""


def constants_of(plan: Plan) -> StepSettings:
    """What a round's steps must use, read from the plan here and not by the code under test."""
    privacy, training = plan.privacy, plan.training
    if privacy.noise_multiplier is None:
        raise ValueError("the plan has no noise multiplier yet: calibrate it first")
    return StepSettings(
        sampling_rate=privacy.sampling_rate,
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        normaliser=privacy.sampling_rate * privacy.users_per_site,
        steps=training.steps_per_round,
        learning_rate=training.learning_rate,
    )


def norm_of(gradients: Gradients) -> float:
    """Of all of a user's gradients as one vector."""
    return math.sqrt(sum(float(each.square().sum()) for each in gradients.values()))


def scaled(gradients: Gradients, factor: float) -> Gradients:
    """Each gradient times a factor."""
    return {name: factor * each for name, each in gradients.items()}


def clipped(gradients: Gradients, clip_norm: float, _: int) -> Gradients:
    """What the mechanism lets a user add: the gradient, scaled to norm C at most; nothing where it is no number."""
    norm = norm_of(gradients)
    if not math.isfinite(norm):
        return {name: torch.zeros_like(each) for name, each in gradients.items()}
    return scaled(gradients, min(1.0, clip_norm / max(norm, 1e-12)))


def gradients_of(model: InterestModel, histories: HistoryBatch, user: int) -> dict[str, Tensor]:
    """Each parameter's gradient of one user's loss; zeros where the loss does not read the parameter."""
    row = model.prepare(histories.rows(torch.tensor([user], device=histories.items.device)))
    parameters = model.trainable()
    asked = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(model.per_user_loss(row).sum(), list(asked.values()), allow_unused=True)
    own = dict(zip(asked, found, strict=True))
    return {
        name: torch.zeros(p.shape, dtype=torch.float64) if own.get(name) is None else own[name].double().cpu()
        for name, p in parameters.items()
    }


def train_by_hand(
    model: InterestModel,
    histories: HistoryBatch,
    settings: StepSettings,
    *,
    sampler: UserSampler,
    noise: GaussianNoise,
    on_step: Callable[[int], None] | None = None,
    part: Part = clipped,
) -> dict[str, Tensor]:
    """What `client.training.train_round` must give, to float32's rounding."""
    model.train()
    start = {name: tensor.detach().cpu().clone() for name, tensor in model.trainable_state().items()}
    at = {name: tensor.double() for name, tensor in start.items()}
    grid = math.ldexp(settings.clip_norm, -GRID_BITS)
    for step in range(settings.steps):
        model.load_trainable({name: value.float() for name, value in at.items()})
        total = {name: torch.zeros_like(value) for name, value in at.items()}
        drawn = np.flatnonzero(sampler.sample(len(histories), settings.sampling_rate))
        for place, user in enumerate(drawn):
            for name, added in part(
                gradients_of(model, histories, int(user)), settings.clip_norm, place
            ).items():
                total[name] += added
        normals = torch.from_numpy(noise.normal(sum(value.numel() for value in at.values())))
        noised = (normals * settings.noise_multiplier * (1 + INFLATION) * 2**GRID_BITS).round()
        first = 0
        for name, value in at.items():
            own = noised[first : first + value.numel()].view(value.shape)
            released = ((total[name] / grid).round() + own) * grid
            at[name] = value - settings.learning_rate / settings.normaliser * released
            first += value.numel()
        if on_step is not None:
            on_step(step + 1)
    model.load_trainable({name: value.float() for name, value in at.items()})
    return {name: (value - start[name].double()).float() for name, value in at.items()}
