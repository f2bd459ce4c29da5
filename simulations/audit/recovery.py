"""Whose update is this? A user's items, read off one update.

An item's trained prior moves up where the item came next in a history, and down where it did not. So whoever sees
the update of a site with one user ranks all items by how their prior moved. Users here are made up, with items drawn
at random. Variants without privacy exist in this module alone: the site's own code, run with a silent generator and
a clip norm that binds nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.training import StepSettings, train_round
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.privacy.noise import GaussianNoise, SecureGaussian, SecurePoissonSampler
from simulations.audit.canary import loudness
from simulations.audit.one_run import Floats, gaussian_curve
from simulations.audit.trainers import Silence, Trainer

EVENTS = 12
PRIOR = "item_prior.weight"


class AttackError(ValueError):
    """An attack cannot be run like that; the message names the value, the bound and the way out."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train.

    Attributes:
        name: for tables.
        clipped: whether anybody is.
        noise_multiplier: sigma, 0 for none.
    """

    name: str
    clipped: bool = True
    noise_multiplier: float = 0.0


NO_DP, CLIPPING_ONLY = Variant("no DP", clipped=False), Variant("clipping only")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was read off.

    Attributes:
        variant: how the update was made.
        users: of the site.
        precisions: [sites] share of right items among as many guesses as there are items to find.
        chance: the same for guesses at random.
        ceiling: what DP allows guesses to reach where items are drawn at random; 1 without noise.
    """

    variant: Variant
    users: int
    precisions: Floats
    chance: float
    ceiling: float

    @property
    def precision(self) -> float:
        """The mean over sites."""
        return float(self.precisions.mean())

    @property
    def error(self) -> float:
        """Its standard error."""
        return float(self.precisions.std(ddof=1) / np.sqrt(len(self.precisions)))


def random_histories(
    users: int, items: int, chance: np.random.Generator, events: int = EVENTS
) -> HistoryBatch:
    """Made-up users, each with so many different items drawn at random, an hour apart."""
    if not 2 <= events <= items:
        raise AttackError(
            f"events is {events}, but must lie in [2, {items}]: a user's items are all different"
        )
    rows = np.stack([chance.permutation(items)[:events] for _ in range(users)])
    times = np.tile(1_700_000_000 + 3600 * np.arange(events), (users, 1))
    return HistoryBatch.of(rows, times, labels=np.ones(rows.shape, dtype=np.float32))


def recover(
    model: InterestModel,
    settings: StepSettings,
    variants: Sequence[Variant],
    *,
    users: int = 1,
    sites: int = 30,
    trainer: Trainer = train_round,
    on_site: Callable[[], None] = lambda: None,
) -> list[Recovery]:
    """One step of everyone at each of some sites, by each variant, and what an onlooker makes of its update.

    Args:
        model: as it is broadcast; left as it came.
        settings: clip norm and learning rate; the rest is set here.
        users: of each site.
        on_site: called after each site of each variant.
    """
    items, chance, start = _items(model), np.random.default_rng(), model.trainable_state()
    found = []
    events = min(EVENTS, items // 2)
    for variant in variants:
        precisions = []
        for _ in range(sites):
            histories = random_histories(users, items, chance, events)
            try:
                update = _one_step(model, histories, settings, variant, trainer)
            finally:
                model.load_trainable(start)
            precisions.append(_precision(_ranking(update), histories))
            on_site()
        by_chance = 1 - (1 - events / items) ** users
        found.append(
            Recovery(variant, users, np.array(precisions), by_chance, _ceiling(variant, by_chance, users))
        )
    return found


def _one_step(
    model: InterestModel, histories: HistoryBatch, settings: StepSettings, variant: Variant, trainer: Trainer
) -> dict[str, Tensor]:
    clip_norm = settings.clip_norm
    if not variant.clipped:
        clip_norm = 2.0 * float(loudness(model, model.prepare(histories)).max())
    noise: GaussianNoise = SecureGaussian() if variant.noise_multiplier else Silence()
    step = replace(
        settings,
        sampling_rate=1.0,
        steps=1,
        clip_norm=clip_norm,
        noise_multiplier=variant.noise_multiplier or 1.0,
        normaliser=float(len(histories)),
    )
    return trainer(model, histories, step, sampler=SecurePoissonSampler(), noise=noise)


def _ranking(update: dict[str, Tensor]) -> npt.NDArray[np.int64]:
    """All items, the likeliest first, as an onlooker would rank them."""
    score = update[PRIOR].flatten()
    ranking: npt.NDArray[np.int64] = torch.argsort(score, descending=True, stable=True).numpy()
    return ranking


def _items(model: InterestModel) -> int:
    """How many items have a prior that is trained."""
    prior = model.trainable().get(PRIOR)
    if prior is None:
        raise AttackError(
            "the attack reads the trained item prior, and this model has none: set model.item_prior"
        )
    return prior.numel()


def _precision(ranking: npt.NDArray[np.int64], histories: HistoryBatch) -> float:
    truth = np.unique(histories.items.cpu().numpy())
    return float(np.isin(ranking[: len(truth)], truth).mean())


def _ceiling(variant: Variant, chance: float, users: int) -> float:
    """What guesses can reach: an item is right with `chance` had its user not been there (f-DP), for one user."""
    if not variant.noise_multiplier or users > 1:
        return 1.0
    curve = gaussian_curve(1 / variant.noise_multiplier)
    return float(1 - curve(np.array(1 - chance)))
