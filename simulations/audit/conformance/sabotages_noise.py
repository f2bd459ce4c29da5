"""Sabotages of the noise and of Gaussian sums: see `sabotages.py`, which lists them with the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import client.statistics
import client.training
from client.statistics import Contribution, unit, user_popularity, user_transitions
from common.models.batches import HistoryBatch
from common.models.sequence import SequenceModel
from common.privacy.noise import SecureGaussian
from simulations.audit.trainers import Normals

Change = Callable[[Normals], Normals]


def drawn_otherwise(change: Change) -> Callable[[], Any]:
    """A patch of the generator: each draw goes through a change."""

    @contextmanager
    def patched() -> Iterator[None]:
        real = SecureGaussian.normal

        def normal(self: SecureGaussian, size: int) -> Normals:
            return change(real(self, size))

        with patch.object(SecureGaussian, "normal", normal):
            yield

    return patched


def second_half_negated(normals: Normals) -> Normals:
    """Each draw's second half is the first negated."""
    half = len(normals) // 2
    return np.concatenate([normals[:half], -normals[:half], normals[2 * half :]])


def last_numbers_shuffled() -> Callable[[Normals], Normals]:
    """A tenth of each draw are numbers of the one before it, in another order and with other signs."""
    kept = np.zeros(0)

    def change(normals: Normals) -> Normals:
        nonlocal kept
        tenth, chance = len(normals) // 10, np.random.default_rng()
        if len(kept) == len(normals):
            again = chance.permutation(kept)[:tenth] * chance.choice((-1.0, 1.0), tenth)
            normals = np.concatenate([again, normals[tenth:]])
        kept = normals
        return normals

    return change


def four_uniforms(normals: Normals) -> Normals:
    """Sums of four uniforms: mean 0, variance 1, nothing beyond 3.46."""
    sums: Normals = np.random.default_rng().random((4, len(normals))).sum(axis=0)
    return math.sqrt(3.0) * (sums - 2.0)


def cut_at_three(normals: Normals) -> Normals:
    """Normals drawn again beyond three deviations, with their variance put right."""
    found, chance = normals.copy(), np.random.default_rng()
    while (far := np.abs(found) > 3).any():
        found[far] = chance.standard_normal(int(far.sum()))
    return found / 0.98658


def large_drawn_again(normals: Normals) -> Normals:
    """A draw whose norm is above the mean is thrown away once."""
    if float(np.square(normals).sum()) <= len(normals):
        return normals
    return np.random.default_rng().standard_normal(len(normals))


@contextmanager
def last_draw_turned() -> Iterator[None]:
    """Every second draw of a size is the one before it, turned by one place."""
    real, kept = SecureGaussian.normal, dict[int, Normals]()

    def normal(self: SecureGaussian, size: int) -> Normals:
        if size in kept:
            return np.roll(kept.pop(size), 1)
        kept[size] = real(self, size)
        return kept[size].copy()

    with patch.object(SecureGaussian, "normal", normal):
        yield


@contextmanager
def in_float32() -> Iterator[None]:
    """Noise is added in float32, off the grid."""

    def noised(total: Tensor, *, clip_norm: float, noise_multiplier: float, noise: Any) -> Tensor:
        wide = 1.001 * noise_multiplier * clip_norm
        return total.float() + torch.from_numpy(noise.normal(total.numel())).float() * wide

    with (
        patch.object(client.training, "private_sum", noised),
        patch.object(client.statistics, "private_sum", noised),
    ):
        yield


def _unit(places: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]) -> Contribution:
    """Contributions to more than 60 places are not scaled."""
    found, values = unit(places, weights)
    return (found, np.ones(len(found))) if len(found) > 60 else (found, values)


def _heavy(items: npt.NDArray[np.int64]) -> Contribution:
    """Items that a user has more than five times count as often, beside a contribution of norm 1."""
    places, values = user_popularity(items)
    counts = np.unique(items, return_counts=True)[1]
    return places, np.where(counts > 5, counts, values)


def _in_two_blocks(items: npt.NDArray[np.int64], *given: Any) -> Contribution:
    """Transitions of more than 500 events are two contributions, each of norm 1."""
    if len(items) <= 500:
        return user_transitions(items, *given)
    parts = [user_transitions(block, *given) for block in (items[:500], items[500:])]
    places = np.concatenate([part[0] for part in parts])
    found, where = np.unique(places, return_inverse=True)
    values = np.zeros(len(found))
    np.add.at(values, where, np.concatenate([part[1] for part in parts]))
    return found, values


def of_sums(name: str, stand_in: Callable[..., Contribution]) -> Callable[[], Any]:
    """A patch of a function that makes a user's contribution to a sum."""
    return lambda: patch.object(client.statistics, name, stand_in)


many_places_unscaled = of_sums("unit", _unit)
heavy_items_unscaled = of_sums("user_popularity", _heavy)
long_histories_in_two = of_sums("user_transitions", _in_two_blocks)


@contextmanager
def ranked_as_they_come() -> Iterator[None]:
    """Users are ranked in as many rows as there are users, on kernels whose rounding follows the number of rows."""
    real = SequenceModel.event_vectors

    def rounded(self: SequenceModel, batch: HistoryBatch) -> Tensor:
        return real(self, batch) * (1 + len(batch) * 2**-20)

    with (
        patch.object(SequenceModel, "event_vectors", rounded),
        patch.object(HistoryBatch, "unit", lambda batch, _: batch),
        patch.object(client.statistics, "rows_of_scores", lambda *_: 1 << 20),
    ):
        yield
