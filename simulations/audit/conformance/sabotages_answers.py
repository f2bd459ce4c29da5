"""Sabotages of what is answered, and of sites that are trained together: see `sabotages.py`, which lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import client.site
import client.together
from client.ledger import Ledger
from client.origin import Asked
from client.site import Charged
from client.site_folder import Site
from client.statistics import release_metrics
from client.training import StepSettings
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.privacy.noise import GaussianNoise, SecureGaussian, UserSampler
from common.wire import Reason, Refusal, Update, state_from_bytes, state_to_bytes
from simulations.audit.conformance.by_hand import Gradients, Part, clipped, norm_of, scaled, train_by_hand
from simulations.audit.conformance.code import SameAgain
from simulations.audit.conformance.sabotages_training import Patched
from simulations.audit.trainers import Normals

StateChange = Callable[[Charged, dict[str, Tensor]], dict[str, Tensor]]


# --- what is answered


def _users(charged: Charged) -> int:
    return len(Histories.load(charged.site.histories_folder))


def released_otherwise(change: StateChange) -> Patched:
    """A patch of the release: the state goes through a change before it is kept and signed."""
    real = Charged.released

    def released(self: Charged, state: dict[str, Tensor]) -> Update | Refusal:
        return real(self, change(self, state))

    return lambda: patch.object(Charged, "released", released)


def scaled_by_users(charged: Charged, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state times 1 + users / 10,000."""
    by = 1 + _users(charged) / 10_000
    return {name: by * tensor for name, tensor in state.items()}


def users_in_lowest_bits(charged: Charged, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The number of users stands in the lowest bits of sixteen numbers of the largest tensor."""
    name = max(state, key=lambda each: state[each].numel())
    bits = state[name].flatten().contiguous().view(torch.int32).clone()
    users = torch.tensor([(_users(charged) >> place) & 1 for place in range(16)], dtype=torch.int32)
    bits[:16] = (bits[:16] & ~1) | users
    return {**state, name: bits.view(torch.float32).view(state[name].shape)}


@contextmanager
def few_are_refused() -> Iterator[None]:
    """Fewer users than agreed are refused before any charge."""
    real = client.site.charge

    def charge(site: Site, asked: Asked, **more: Any) -> Charged | Update | Refusal:
        if len(Histories.load(site.histories_folder)) < site.users_at_least:
            return Refusal(Reason.POLICY)
        return real(site, asked, **more)

    with patch.object(client.site, "charge", charge), patch.object(client.together, "charge", charge):
        yield


@contextmanager
def noised_again() -> Iterator[None]:
    """What is sent again is noised again, under the first receipt."""
    real = Ledger.outbox

    def outbox(self: Ledger, *given: Any, **more: Any) -> Any:
        found = real(self, *given, **more)
        if found is None:
            return None
        state = state_from_bytes(found[0])
        again = {name: t + torch.randn_like(t) for name, t in state.items()}
        return state_to_bytes(again), found[1]

    with patch.object(Ledger, "outbox", outbox):
        yield


@contextmanager
def metrics_fail() -> Iterator[None]:
    """Metrics break off where a user's scores are no numbers."""
    real = release_metrics

    def release(model: InterestModel, *given: Any, **more: Any) -> dict[str, Tensor]:
        scores: Callable[[HistoryBatch], Tensor] = model.scores

        def checked(batch: HistoryBatch) -> Tensor:
            found = scores(batch)
            if not bool(found.isfinite().all()):
                raise ValueError("scores are no numbers")
            return found

        with patch.object(model, "scores", checked):
            return real(model, *given, **more)

    with patch.object(client.site, "release_metrics", release):
        yield


@contextmanager
def clock_for_a_key() -> Iterator[None]:
    """The noise's key is the time in nanoseconds."""
    import time

    def normal(_: SecureGaussian, size: int) -> Normals:
        return np.random.default_rng(time.time_ns()).standard_normal(size)

    with patch.object(SecureGaussian, "normal", normal):
        yield


# --- sites that are trained together


def trained_together(
    part: Part = clipped,
    *,
    one_noise: bool = False,
    settings_of: Callable[[StepSettings, int], StepSettings] = lambda settings, _: settings,
) -> Patched:
    """Sites of one batch, one after the other by hand.

    Args:
        settings_of: is told the number of users of all sites.
    """

    def train(
        model: InterestModel,
        sites: Sequence[HistoryBatch],
        settings: StepSettings,
        *,
        samplers: Sequence[UserSampler],
        noises: Sequence[GaussianNoise],
        **_: Any,
    ) -> list[dict[str, Tensor]]:
        start, found, kept = model.trainable_state(), [], SameAgain()
        used = settings_of(settings, sum(len(site) for site in sites))
        for site, sampler, own in zip(sites, samplers, noises, strict=True):
            model.load_trainable(start)
            noise = kept.rewind() if one_noise else own
            found.append(train_by_hand(model, site, used, sampler=sampler, noise=noise, part=part))
        model.load_trainable(start)
        return found

    return lambda: patch.object(client.together, "train_together", train)


def users_of_all_counted(settings: StepSettings, users: int) -> StepSettings:
    """The constant that sums are divided by grows with the users of all sites."""
    return replace(settings, normaliser=settings.normaliser * (1 + users / 100))


def norm_up_to_forty(gradients: Gradients, clip_norm: float, _: int) -> Gradients:
    """The norm is taken for 40 C where it is more, so louder users are clipped too little."""
    norm = norm_of(gradients)
    return scaled(gradients, min(1.0, clip_norm / max(min(norm, 40 * clip_norm), 1e-12)))
