"""Sabotages of what a user adds and of a round's steps: see `sabotages.py`, which lists them with the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.training import StepSettings, train_round
from common.models.batches import HistoryBatch, concatenate
from common.models.interface import InterestModel
from common.privacy.noise import GaussianNoise, SecurePoissonSampler, UserSampler
from simulations.audit.conformance.by_hand import Gradients, Part, clipped, norm_of, scaled, train_by_hand
from simulations.audit.conformance.made_up_sites import MICRO_BATCH
from simulations.audit.trainers import ChangedNoise, Normals, Trainer

Sampled = npt.NDArray[np.bool_]
Patched = Callable[[], AbstractContextManager[Any]]


# --- what a user adds


def trained_by_hand(part: Part) -> Trainer:
    """The round by hand, with a user's part made otherwise."""

    def trainer(
        model: InterestModel, histories: HistoryBatch, settings: StepSettings, **given: Any
    ) -> dict[str, Tensor]:
        return train_by_hand(model, histories, settings, part=part, **given)

    return trainer


def floored(gradients: Gradients, clip_norm: float, place: int) -> Gradients:
    """No clip factor below 1/50."""
    norm = norm_of(gradients)
    return (
        scaled(gradients, max(0.02, min(1.0, clip_norm / max(norm, 1e-12))))
        if math.isfinite(norm)
        else clipped(gradients, clip_norm, place)
    )


def without(ending: str) -> Part:
    """Parameters of such a name are neither in the norm nor scaled."""

    def part(gradients: Gradients, clip_norm: float, place: int) -> Gradients:
        inside = {name: each for name, each in gradients.items() if ending not in name}
        return {**gradients, **clipped(inside, clip_norm, place)}

    return part


def norm_without_biases(gradients: Gradients, clip_norm: float, _: int) -> Gradients:
    """Everything is scaled, by a norm without the biases."""
    norm = norm_of({name: each for name, each in gradients.items() if not name.endswith("bias")})
    return scaled(gradients, min(1.0, clip_norm / max(norm, 1e-12)))


def largest_layer(gradients: Gradients, clip_norm: float, _: int) -> Gradients:
    """Clipped by the norm of the largest layer alone."""
    norm = max(float(each.norm()) for each in gradients.values())
    return scaled(gradients, min(1.0, clip_norm / max(norm, 1e-12)))


def later_units(gradients: Gradients, clip_norm: float, place: int) -> Gradients:
    """Users from the fourth unit on are clipped to 10 C."""
    return clipped(gradients, clip_norm * (10.0 if place >= 3 * MICRO_BATCH else 1.0), place)


def breaks_off(gradients: Gradients, clip_norm: float, place: int) -> Gradients:
    """A gradient that is not finite ends the round."""
    if not math.isfinite(norm_of(gradients)):
        raise ValueError("a gradient is not finite")
    return clipped(gradients, clip_norm, place)


def long_users_twice(batch: HistoryBatch) -> HistoryBatch:
    """Users of more than 20 events have two rows."""
    return concatenate([batch, batch.rows(torch.nonzero(batch.lengths > 20).flatten())])


# --- a round's steps


def draws_long_users_again(
    model: InterestModel,
    histories: HistoryBatch,
    settings: StepSettings,
    *,
    sampler: UserSampler,
    **more: Any,
) -> dict[str, Tensor]:
    """Users of more than 20 events are drawn twice a step."""
    long = (histories.lengths > 20).cpu().numpy()

    def twice(sampler: UserSampler, users: int, rate: float, _: int) -> Sampled:
        return sampler.sample(users, rate) | (long & SecurePoissonSampler().sample(users, rate))

    return train_round(model, histories, settings, sampler=_Sampled(sampler, twice), **more)


def handed_otherwise(
    settings_of: Callable[[StepSettings], StepSettings] = lambda settings: settings,
    rows_of: Callable[[HistoryBatch], HistoryBatch] = lambda batch: batch,
    sampler_of: Callable[[UserSampler], UserSampler] = lambda sampler: sampler,
    noise_of: Callable[[GaussianNoise, StepSettings], GaussianNoise] = lambda noise, _: noise,
) -> Trainer:
    """The real trainer, handed something else than it was asked to work with."""

    def trainer(
        model: InterestModel,
        histories: HistoryBatch,
        settings: StepSettings,
        *,
        sampler: UserSampler,
        noise: GaussianNoise,
        **more: Any,
    ) -> dict[str, Tensor]:
        return train_round(
            model,
            rows_of(histories),
            settings_of(settings),
            sampler=sampler_of(sampler),
            noise=noise_of(noise, settings),
            **more,
        )

    return trainer


def noised_by_step(
    change: Callable[[int, Normals], Normals],
) -> Callable[[GaussianNoise, StepSettings], GaussianNoise]:
    """Noise that is changed by the number of the step, from 0."""

    def noise_of(noise: GaussianNoise, _: StepSettings) -> GaussianNoise:
        steps = iter(range(1 << 30))
        return ChangedNoise(noise, lambda normals: change(next(steps), normals))

    return noise_of


def in_the_last_step(noise: GaussianNoise, settings: StepSettings) -> GaussianNoise:
    """No noise but in the last step, where it is sqrt(steps) wide."""

    def change(step: int, normals: Normals) -> Normals:
        return normals * (settings.steps**0.5 if step == settings.steps - 1 else 0.0)

    return noised_by_step(change)(noise, settings)


@dataclass
class _Sampled:
    """A sampler changed on the way."""

    sampler: UserSampler
    change: Callable[[UserSampler, int, float, int], Sampled]
    step: int = -1

    def sample(self, users: int, rate: float) -> Sampled:
        self.step += 1
        return self.change(self.sampler, users, rate, self.step)


def sampled_otherwise(
    change: Callable[[UserSampler, int, float, int], Sampled],
) -> Callable[[UserSampler], UserSampler]:
    """A sampler each of whose draws goes through a change, which is told the step, from 0."""
    return lambda sampler: _Sampled(sampler, change)


def with_replacement(_: UserSampler, users: int, rate: float, __: int) -> Sampled:
    """round(q n) users, drawn with replacement."""
    drawn = np.zeros(users, dtype=np.bool_)
    if users:
        drawn[np.random.default_rng().integers(0, users, round(rate * users))] = True
    return drawn


def later_doubled(sampler: UserSampler, users: int, rate: float, step: int) -> Sampled:
    """2 q from step 200 on."""
    return sampler.sample(users, min(1.0, 2 * rate) if step >= 200 else rate)


def read_times(**factors: float) -> Patched:
    """Settings that are read from the plan times something; whatever else `of` is told, it is told."""
    real = StepSettings.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[StepSettings], *given: Any, **more: Any) -> StepSettings:
        settings: StepSettings = real(cls, *given, **more)
        return replace(settings, **{name: by * getattr(settings, name) for name, by in factors.items()})

    return lambda: patch.object(StepSettings, "of", classmethod(of))
