"""Canaries: made-up users, each in by a fair coin of its own, and an auditor who sees every release and guesses.

Each canary has many events on one item of its own, so its gradient points where no other's does and is far above the
clip norm. The site's own code trains on those that are in; after each round an auditor who knows the model as it was
broadcast scores every canary by how far the released sum points along its gradient (`score`). How often guesses are
right says how large epsilon is at least (`one_run.py`). No user of anybody's is looked at, and no budget is spent.
What is registered before the run is in `canary_plan.py`, what it amounts to in `canary_findings.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.opacus_gradients import per_user_gradients
from client.training import StepSettings, prepare_histories, train_round
from common.model_plan import ModelPlan
from common.models.batches import HistoryBatch
from common.models.build import build_model
from common.models.interface import InterestModel
from common.privacy.noise import GaussianNoise, SecureGaussian, SecurePoissonSampler, UserSampler
from simulations.audit.canary_plan import CanaryError, CanaryPlan
from simulations.audit.one_run import Floats
from simulations.audit.trainers import Trainer
from simulations.faults.tiny import write_language_model

MICRO_BATCH = 64

MOST_NUMBERS = 1 << 30
"""Of gradients held at once: 4 GiB."""


@dataclass(frozen=True)
class Hunt:
    """What an auditor saw.

    Attributes:
        included: [canaries], the coins.
        scores: [rounds, canaries], of each round's release alone, in clip norms.
        loudness: [canaries] norms of gradients before clipping, in clip norms, at the first round.
        unasked: names in an update that the model's parameters do not have.
    """

    included: npt.NDArray[np.bool_]
    scores: Floats
    loudness: Floats
    unasked: tuple[str, ...]


def item_texts(items: int, words: Sequence[str]) -> list[str]:
    """A text for each made-up item, no two alike."""
    most = len(words) ** 4
    if items > most:
        raise CanaryError(
            f"canaries is {items}, but must be at most {most}: there are no more items to make up"
        )
    places = np.unravel_index(np.arange(items), (len(words),) * 4)
    return [" ".join(words[int(place)] for place in row) for row in np.stack(places, axis=1)]


@contextmanager
def canary_model(plan: ModelPlan, items: int) -> Iterator[InterestModel]:
    """The plan's model over a made-up catalog, one category an item, with a tiny random language model."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        place = write_language_model(Path(folder) / "language-model")
        words = [word for word in (place / "vocab.txt").read_text().split() if word.isalpha()]
        tiny = plan.model_copy(update={"encoder": str(place)})
        categories = [[f"category {item}"] for item in range(items)]
        yield build_model(tiny, item_texts(items, words), place, categories=categories).model


def canary_histories(canaries: int, events: int) -> HistoryBatch:
    """[canaries] histories, the i-th of `events` events on item i, an hour apart and liked."""
    items = np.repeat(np.arange(canaries)[:, None], events, axis=1)
    times = np.tile(1_700_000_000 + 3600 * np.arange(events), (canaries, 1))
    return HistoryBatch.of(items, times, labels=np.ones(items.shape, dtype=np.float32))


def each_gradient(model: InterestModel, prepared: HistoryBatch) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their gradients [rows, coordinates] in float64, by Fedtide's own code, a few users at a time."""
    index = torch.arange(len(prepared), device=prepared.items.device)
    with per_user_gradients(model) as gradients:
        for rows in index.split(MICRO_BATCH):
            flat = torch.cat([each.flatten(1) for each in gradients(prepared.rows(rows))], dim=1)
            yield slice(int(rows[0]), int(rows[-1]) + 1), flat.double()


def loudness(model: InterestModel, prepared: HistoryBatch) -> Floats:
    """[users] norms of gradients before clipping."""
    norms = [flat.norm(dim=1).cpu().numpy() for _, flat in each_gradient(model, prepared)]
    return np.concatenate(norms)


def settings_of(plan: CanaryPlan) -> StepSettings:
    """One step a round, divided by a public constant: half of the canaries."""
    return StepSettings(
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        normaliser=plan.sampling_rate * plan.canaries / 2,
        steps=1,
        learning_rate=plan.learning_rate,
        micro_batch=MICRO_BATCH,
    )


def hunt(
    model: InterestModel,
    plan: CanaryPlan,
    *,
    trainer: Trainer = train_round,
    coins: UserSampler | None = None,
    sampler: UserSampler | None = None,
    noise: GaussianNoise | None = None,
    on_round: Callable[[int], None] = lambda _: None,
) -> Hunt:
    """Throws the coins, lets `trainer` train for the plan's rounds, and scores every canary after each.

    Args:
        model: of the plan; left as it came.
        coins, sampler, noise: by default the cryptographic ones, which no seed repeats.
        on_round: called with the number of rounds done.
    """
    coins, sampler, noise = (
        coins or SecurePoissonSampler(),
        sampler or SecurePoissonSampler(),
        noise or SecureGaussian(),
    )
    device = next(iter(model.trainable().values())).device
    settings, start = settings_of(plan), model.trainable_state()
    everyone = prepare_histories(model, canary_histories(plan.canaries, plan.events).to(device), MICRO_BATCH)
    included = coins.sample(plan.canaries, 0.5)
    site = everyone.rows(torch.as_tensor(np.flatnonzero(included)).to(device))
    loud, scores, unasked = loudness(model, everyone) / plan.clip_norm, [], set[str]()
    sent = start
    try:
        for number in range(plan.rounds):
            model.load_trainable(sent)
            update = trainer(model, site, settings, sampler=sampler, noise=noise)
            model.load_trainable(sent)
            unasked |= set(update) - set(sent)
            scores.append(score(model, everyone, update, settings))
            sent = {name: value + update[name] for name, value in sent.items()}
            on_round(number + 1)
    finally:
        model.load_trainable(start)
    return Hunt(included, np.stack(scores), loud, tuple(sorted(unasked)))


def score(
    model: InterestModel, prepared: HistoryBatch, update: dict[str, Tensor], settings: StepSettings
) -> Floats:
    """[users] how far the released sum, less what half of the users would give, points along each user's gradient.

    For users in directions of their own it is <released - expected, clipped gradient> / C^2 + 1/2: without noise 1
    with the user, 0 without. Where gradients overlap, the least-squares estimate of who was in, shrunk as the claimed
    noise asks for, takes what others give off each one's score, which is scaled to respond to its own user as before.
    """
    names = list(model.trainable())
    flat = torch.cat([update[name].flatten() for name in names]).double()
    released = (-settings.normaliser / settings.learning_rate / settings.clip_norm * flat).to(
        prepared.items.device
    )
    coordinates = len(flat)
    if len(prepared) * coordinates > MOST_NUMBERS:
        raise CanaryError(
            f"{len(prepared)} canaries with {coordinates} coordinates each are {len(prepared) * coordinates} numbers, "
            f"but at most {MOST_NUMBERS} are held: take fewer canaries"
        )
    rows = torch.empty(len(prepared), coordinates, device=prepared.items.device)  # [users, coordinates]
    for place, gradients in each_gradient(model, prepared):
        norms = gradients.norm(dim=1, keepdim=True).clamp(min=1e-12)
        rows[place] = (gradients * (settings.clip_norm / norms).clamp(max=1.0) / settings.clip_norm).float()
    rows = rows.nan_to_num()
    expected = settings.sampling_rate / 2 * rows.sum(dim=0)
    along = (rows @ (released.float() - expected)).double()  # [users]
    shrinkage = 4 * settings.noise_multiplier**2  # noise against the coins' variance of 1/4
    overlap = (rows @ rows.T).double()  # [users, users]
    undone = torch.linalg.inv(overlap + shrinkage * torch.eye(len(prepared), device=rows.device))
    own = (1 - shrinkage * undone.diagonal()).clamp(min=1e-9)
    found: Floats = ((undone @ along) / own + 0.5).cpu().numpy()
    return np.nan_to_num(found)
