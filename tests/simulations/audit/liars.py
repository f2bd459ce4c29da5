"""Sabotaged trainers, releases and replies: what `fedtide audit` must catch.

Each liar is the real thing with one thing wrong in it. It draws its own users and noise however it lies, and takes
`sampler` and `noise` as they come where it is honest, so a tool sees it exactly as it would see a broken site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from client.opacus_gradients import clipped_sum, per_user_gradients
from client.site_folder import Site
from client.statistics import release_metrics
from client.training import StepSettings, train_round
from common.config import Plan
from common.events.histories import Histories
from common.models.batches import HistoryBatch, concatenate
from common.models.interface import InterestModel
from common.models.tasks.next_item import NextItem
from common.privacy.noise import GaussianNoise, UserSampler, private_sum
from common.sums import METRICS
from common.wire import Request
from simulations.audit.conformance.code import MetricsRelease, Reply, site_reply
from simulations.audit.trainers import ChangedNoise, Trainer, changed_trainer
from tests.client.test_training_noise import FixedBatches, SameUsers, ShuffledEpochs
from tests.client.training_cases import SeededGaussian

NO_CLIP = 1e9
_GENERATOR = np.random.default_rng(20)
_SHUFFLED: dict[int, ShuffledEpochs] = {}


Gradients = Callable[[HistoryBatch], list[Tensor]]
StepSum = Callable[[InterestModel, Gradients, HistoryBatch, float], Tensor]


@dataclass(frozen=True)
class Liar:
    """One way to lie.

    Attributes:
        name: of a few words.
        does: one line for the table.
        trainer, metrics, reply: stand in for `train_round`, `release_metrics` and a site's reply; the honest ones
            where the lie is elsewhere.
    """

    name: str
    does: str
    trainer: Trainer = train_round
    metrics: MetricsRelease = release_metrics
    reply: Reply = site_reply


class OneDraw:
    """The first normals, again and again."""

    def __init__(self, noise: GaussianNoise) -> None:
        self.noise, self.drawn = noise, dict[int, npt.NDArray[np.float64]]()

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        if size not in self.drawn:
            self.drawn[size] = self.noise.normal(size)
        return self.drawn[size]


class SharedGenerator:
    """Normals of one generator that the process seeded when it began."""

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return _GENERATOR.standard_normal(size)


def each_user(model: InterestModel, gradients: Gradients, batch: HistoryBatch, clip_norm: float) -> Tensor:
    """The honest sum of a step."""
    return clipped_sum(gradients(model.prepare(batch)), clip_norm)


def not_at_all(model: InterestModel, gradients: Gradients, batch: HistoryBatch, clip_norm: float) -> Tensor:
    """Nobody is clipped."""
    return clipped_sum(gradients(model.prepare(batch)), NO_CLIP)


def the_mean(model: InterestModel, gradients: Gradients, batch: HistoryBatch, clip_norm: float) -> Tensor:
    """The batch's mean gradient is clipped, as without Opacus."""
    mean = not_at_all(model, gradients, batch, clip_norm) / len(batch)
    return len(batch) * mean * min(1.0, clip_norm / max(float(mean.norm()), 1e-12))


def the_sum(model: InterestModel, gradients: Gradients, batch: HistoryBatch, clip_norm: float) -> Tensor:
    """The batch's sum is clipped."""
    total = not_at_all(model, gradients, batch, clip_norm)
    return total * min(1.0, clip_norm / max(float(total.norm()), 1e-12))


def cut(batch: HistoryBatch, start: int, stop: int) -> HistoryBatch:
    """Each user's events from `start` to `stop`, as rows of their own."""
    labels = None if batch.labels is None else batch.labels[:, start:stop]
    return HistoryBatch(batch.items[:, start:stop], batch.times[:, start:stop], labels)


def widened(batch: HistoryBatch, events: int) -> HistoryBatch:
    """The same histories, padded to so many events."""
    while batch.items.shape[1] < events:
        batch = batch.widened()
    return batch


def each_event(model: InterestModel, gradients: Gradients, batch: HistoryBatch, clip_norm: float) -> Tensor:
    """Each pair of events is clipped on its own."""
    events = batch.items.shape[1]
    pairs = [cut(batch, event, event + 2) for event in range(events - 1)]
    rows = concatenate(pairs) if pairs else batch
    return each_user(model, gradients, rows.rows(torch.nonzero(rows.items[:, 0] >= 0).flatten()), clip_norm)


def three_rows(model: InterestModel, gradients: Gradients, batch: HistoryBatch, clip_norm: float) -> Tensor:
    """A user is three rows: a third of the history each."""
    rows = []
    for user in range(len(batch)):
        alone = batch.rows(torch.tensor([user], device=batch.items.device))
        events = int(alone.lengths[0])
        longest = -(-events // 3)
        for start in range(0, events, max(longest, 1)):
            part = cut(alone, start, min(start + longest, events))
            rows.append(widened(part, batch.items.shape[1]))
    return each_user(model, gradients, concatenate(rows) if rows else batch, clip_norm)


def in_batch(model: InterestModel, gradients: Gradients, batch: HistoryBatch, clip_norm: float) -> Tensor:
    """A user's candidates are the other users' items."""
    task = getattr(model, "task", None)
    if not isinstance(task, NextItem):
        raise TypeError("in-batch negatives are a lie about the task next-item alone: choose that task")
    honest = task.negatives
    task.negatives = batch.items[batch.items >= 0].unique()
    try:
        return each_user(model, gradients, batch, clip_norm)
    finally:
        task.negatives = honest


def broken_round(
    model: InterestModel,
    histories: HistoryBatch,
    settings: StepSettings,
    *,
    sampler: UserSampler,
    noise: GaussianNoise,
    step_sum: StepSum = each_user,
    skip_empty: bool = False,
) -> dict[str, Tensor]:
    """`train_round` without its guards, and with another way to add up users."""
    before = model.trainable_state()
    parameters = list(model.trainable().values())
    device = parameters[0].device
    coordinates = sum(p.numel() for p in parameters)
    with per_user_gradients(model) as gradients:
        for _ in range(settings.steps):
            taken = np.flatnonzero(sampler.sample(len(histories), settings.sampling_rate))
            if skip_empty and not len(taken):
                continue
            total = torch.zeros(coordinates, dtype=torch.float64, device=device)
            if len(taken):
                batch = replace(histories.rows(torch.as_tensor(taken).to(device)), token_states=None)
                total += step_sum(model, gradients, replace(batch, token_events=None), settings.clip_norm)
            released = private_sum(
                total, clip_norm=settings.clip_norm, noise_multiplier=settings.noise_multiplier, noise=noise
            )
            parts = (settings.learning_rate / settings.normaliser * released).split(
                [p.numel() for p in parameters]
            )
            with torch.no_grad():
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.sub_(part.view_as(parameter))
    return {name: after - before[name] for name, after in model.trainable_state().items()}


def adds_up(step_sum: StepSum, *, skip_empty: bool = False) -> Trainer:
    """A trainer that adds up users in another way."""
    return partial(broken_round, step_sum=step_sum, skip_empty=skip_empty)


draws = partial(changed_trainer, train_round)
"""The real trainer with other noise, another sampler (of so many users) or other settings."""


def noise_times(factor: float) -> Trainer:
    """A trainer whose noise is so much too wide."""
    return draws(noise_of=lambda noise, _: ChangedNoise(noise, lambda normals: factor * normals))


def _first_layer_silent(noise: GaussianNoise, model: InterestModel) -> GaussianNoise:
    first = next(iter(model.trainable().values())).numel()

    def change(normals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        normals[:first] = 0.0
        return normals

    return ChangedNoise(noise, change)


def _shuffled(_: UserSampler, users: int) -> UserSampler:
    """An epoch goes on in the next round."""
    return _SHUFFLED.setdefault(users, ShuffledEpochs())


def _counted_rate(settings: StepSettings, users: int) -> StepSettings:
    return replace(settings, sampling_rate=min(1.0, settings.normaliser / max(users, 1)))


def _counted_normaliser(settings: StepSettings, users: int) -> StepSettings:
    return replace(settings, normaliser=settings.sampling_rate * max(users, 1))


def tells_the_loss(
    model: InterestModel,
    histories: HistoryBatch,
    settings: StepSettings,
    *,
    sampler: UserSampler,
    noise: GaussianNoise,
) -> dict[str, Tensor]:
    """An update with one tensor more."""
    update = train_round(model, histories, settings, sampler=sampler, noise=noise)
    return {**update, "loss": _mean_loss(model, histories).reshape(1)}


def hides_the_loss(name_of: Callable[[list[str]], str]) -> Trainer:
    """A trainer whose update has the right form, but the users' mean loss before the round at one tensor's end."""

    def trainer(
        model: InterestModel,
        histories: HistoryBatch,
        settings: StepSettings,
        *,
        sampler: UserSampler,
        noise: GaussianNoise,
    ) -> dict[str, Tensor]:
        loss = _mean_loss(model, histories)
        update = train_round(model, histories, settings, sampler=sampler, noise=noise)
        update[name_of(list(update))].view(-1)[-1] = loss
        return update

    return trainer


def _mean_loss(model: InterestModel, histories: HistoryBatch) -> Tensor:
    if not len(histories):
        return torch.zeros(())
    with torch.no_grad():
        return model.per_user_loss(model.prepare(histories)).mean().cpu()


def exact_hits(
    model: InterestModel,
    histories: Histories,
    held_out: npt.NDArray[np.int64],
    plan: Plan,
    noise: GaussianNoise,
) -> dict[str, Tensor]:
    """Metrics of which the hits have no noise."""

    def change(normals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        normals[1] = 0.0
        return normals

    return release_metrics(model, histories, held_out, plan, ChangedNoise(noise, change))


def extra_metric(
    model: InterestModel,
    histories: Histories,
    held_out: npt.NDArray[np.int64],
    plan: Plan,
    noise: GaussianNoise,
) -> dict[str, Tensor]:
    """Metrics with a number of users beside them."""
    released = release_metrics(model, histories, held_out, plan, noise)
    return {**released, f"{METRICS}.users": torch.tensor([float(len(histories))])}


def reply_with_a_count(site: Site, request: Request) -> RecordDict:
    """A reply with the number of users, as Flower's examples send it."""
    users = len(Histories.load(site.histories_folder))
    return RecordDict({**site_reply(site, request), "metrics": ConfigRecord({"num-examples": users})})


_ALL = [
    Liar("noise off", "adds no noise", noise_times(0.0)),
    Liar("a tenth of the noise", "adds noise of sigma / 10", noise_times(0.1)),
    Liar("half the noise", "forgets to multiply the noise by C = 2", noise_times(0.5)),
    Liar("a silent layer", "leaves one layer without noise", draws(noise_of=_first_layer_silent)),
    Liar("clipping off", "clips nobody", adds_up(not_at_all)),
    Liar("clip of the mean", "clips the batch's mean gradient, not each user", adds_up(the_mean)),
    Liar("clip of the sum", "clips the batch's sum, not each user", adds_up(the_sum)),
    Liar("clip per event", "clips each event of a user on its own", adds_up(each_event)),
    Liar("three rows", "splits each user into three rows", adds_up(three_rows)),
    Liar("in-batch negatives", "takes other users' items as candidates", adds_up(in_batch)),
    Liar(
        "same seed", "begins each round's noise from one seed", draws(noise_of=lambda *_: SeededGaussian(7))
    ),
    Liar("seeded process", "seeds its noise once in a process", draws(noise_of=lambda *_: SharedGenerator())),
    Liar(
        "one draw",
        "uses one draw of noise in all steps of a round",
        draws(noise_of=lambda noise, _: OneDraw(noise)),
    ),
    Liar("shuffled", "shuffles users into batches and says Poisson", draws(sampler_of=_shuffled)),
    Liar(
        "fixed size",
        "draws batches of one size and says Poisson",
        draws(sampler_of=lambda *_: FixedBatches()),
    ),
    Liar("same users", "draws users once for a whole round", draws(sampler_of=lambda *_: SameUsers())),
    Liar("counted q", "computes q from its number of users", draws(settings_of=_counted_rate)),
    Liar("counted normaliser", "divides by its number of users", draws(settings_of=_counted_normaliser)),
    Liar("skips empty batches", "takes no step where nobody was drawn", adds_up(each_user, skip_empty=True)),
    Liar("loss beside the update", "sends the users' loss as one tensor more", tells_the_loss),
    Liar(
        "loss in the update",
        "hides the users' loss in the update's last place",
        hides_the_loss(lambda names: names[-1]),
    ),
    Liar("loss in a weight", "hides the users' loss in one weight", hides_the_loss(lambda names: names[0])),
    Liar("exact hits", "releases metrics of which the hits have no noise", metrics=exact_hits),
    Liar("users counted", "releases its number of users beside metrics", metrics=extra_metric),
    Liar("count in the reply", "sends its number of users in the reply", reply=reply_with_a_count),
]

LIARS: dict[str, Liar] = {liar.name: liar for liar in _ALL}
"""Name -> liar."""

TRAINERS: dict[str, Trainer] = {liar.name: liar.trainer for liar in _ALL if liar.trainer is not train_round}
"""Name -> sabotaged trainer: those that lie in training, for tools that look at updates alone."""
