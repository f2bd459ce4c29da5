"""A site's trainer as the audit sees it, and what stands in for it or for its noise in controls and tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from client.training import StepSettings
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.privacy.noise import GaussianNoise, UserSampler

Normals = npt.NDArray[np.float64]


class Trainer(Protocol):
    """What `client.training.train_round` is."""

    def __call__(
        self,
        model: InterestModel,
        histories: HistoryBatch,
        settings: StepSettings,
        *,
        sampler: UserSampler,
        noise: GaussianNoise,
    ) -> dict[str, Tensor]:
        """The update of one round."""
        ...


class Silence:
    """No noise at all: for paired runs, positive controls and attacks, here and nowhere in a site's code."""

    def normal(self, size: int) -> Normals:
        """Zeros, float64 [size]."""
        return np.zeros(size)


@dataclass(frozen=True)
class ChangedNoise:
    """A generator's normals, changed on the way."""

    noise: GaussianNoise
    change: Callable[[Normals], Normals]

    def normal(self, size: int) -> Normals:
        """Changed normals."""
        return self.change(self.noise.normal(size))


def changed_trainer(
    real: Trainer,
    *,
    settings_of: Callable[[StepSettings, int], StepSettings] = lambda settings, _: settings,
    rows_of: Callable[[HistoryBatch], HistoryBatch] = lambda batch: batch,
    sampler_of: Callable[[UserSampler, int], UserSampler] = lambda sampler, _: sampler,
    noise_of: Callable[[GaussianNoise, InterestModel], GaussianNoise] = lambda noise, _: noise,
    update_of: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda update: update,
) -> Trainer:
    """A trainer that is handed something else than it was asked to work with, or hands out more.

    Args:
        real: the trainer that does the work.
        settings_of, sampler_of: are told the number of users as it was asked for.
    """

    def trainer(
        model: InterestModel,
        histories: HistoryBatch,
        settings: StepSettings,
        *,
        sampler: UserSampler,
        noise: GaussianNoise,
    ) -> dict[str, Tensor]:
        users = len(histories)
        return update_of(
            real(
                model,
                rows_of(histories),
                settings_of(settings, users),
                sampler=sampler_of(sampler, users),
                noise=noise_of(noise, model),
            )
        )

    return trainer
