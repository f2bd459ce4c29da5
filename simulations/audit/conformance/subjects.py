"""What is put to the test: every family in every encoder mode, over a tiny random language model, and made-up users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.opacus_gradients import per_user_gradients
from client.training import StepSettings
from common.model_plan import ModelPlan
from common.models.batches import HistoryBatch
from common.models.build import build_model
from common.models.interface import InterestModel
from common.models.names import FAMILIES, FrozenPrecision
from simulations.faults.tiny import WORDS, write_language_model

ITEMS, EVENTS, WITNESS_PLACES = 60, 13, 32
MODES = ("vectors", "lora", "lora-held")
"""Of the encoder: frozen vectors, adapters, and adapters that are held while the head above them learns."""

MOVED = 0.3
"""How far trainable parameters lie off their start, where zero layers would hide what is below them."""

_SMALL: dict[str, Any] = {
    "width": 8,
    "hidden_width": 4,
    "latent_width": 3,
    "soft_tokens": 2,
    "max_events": EVENTS,
    "lora_rank": 2,
    "lora_train_down": True,
    "most_tokens": 40,
    "members": tuple(name for name in FAMILIES if name != "ensemble"),
}
_USUAL: dict[str, Any] = {**ModelPlan().model_dump(), **_SMALL, "items": ITEMS}
"""What a subject's name leaves out."""


@dataclass(frozen=True)
class Subject:
    """One model on one device.

    Attributes:
        name: family, mode, device.
        model: as a site builds it.
        start: its trainable parameters, off their start.
    """

    name: str
    model: InterestModel
    start: dict[str, Tensor]
    items: int
    device: torch.device

    def rewound(self) -> InterestModel:
        """The model with its parameters at `start`."""
        self.model.load_trainable(self.start)
        return self.model

    def batch(self, rows: Sequence[Sequence[int]], events: int = EVENTS) -> HistoryBatch:
        """Histories padded on the right to `events`, an hour apart, every second event liked."""
        items = np.full((len(rows), events), -1, dtype=np.int64)
        for user, row in enumerate(rows):
            items[user, : len(row)] = row
        hours = 1_000_000_000 + 3600 * np.arange(events)
        labels = np.where(items >= 0, (items + np.arange(events)) % 2, np.nan).astype(np.float32)
        return HistoryBatch.of(items, np.where(items >= 0, hours, 0), self.device, labels=labels)

    def loudness(self, rows: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
        """[users] norms of these users' gradients before clipping."""
        model = self.rewound()
        with per_user_gradients(model) as gradients:
            flat = torch.cat([g.flatten(1) for g in gradients(model.prepare(self.batch(rows)))], dim=1)
        norms: npt.NDArray[np.float64] = flat.double().norm(dim=1).cpu().numpy()
        return norms


def texts(items: int) -> list[str]:
    """Of so many items, in words that the tiny language model knows."""
    chance = np.random.default_rng(3)
    return [" ".join(chance.choice(WORDS, size=3, replace=False)) for _ in range(items)]


def language_model(folder: Path) -> Path:
    """A tiny random language model under a folder; written once."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = folder / "language-model"
    return place if place.is_dir() else write_language_model(place)


def a_subject(
    folder: Path,
    family: str,
    mode: str,
    device: str,
    *,
    items: int = ITEMS,
    off_start: float = MOVED,
    frozen_precision: FrozenPrecision = "float32",
    **more: Any,
) -> Subject:
    """A model of a family and mode, built as a site builds it.

    Args:
        more: fields of the model's plan.
    """
    place = language_model(folder)
    encoder = {"mode": mode.removesuffix("-held"), "encoder": str(place)}
    plan = ModelPlan(**{**_SMALL, "family": family, **encoder, **more})
    categories = [[WORDS[item % 3]] for item in range(items)]
    model = build_model(
        plan,
        texts(items),
        place,
        categories=categories,
        witness_places=WITNESS_PLACES,
        frozen_precision=frozen_precision,
    ).model
    model = model.to(device)
    model.hold_adapters(mode.endswith("-held"))
    generator = torch.Generator().manual_seed(2)
    start = {
        name: (p.detach().cpu() + off_start * torch.randn(p.shape, generator=generator)).to(device)
        for name, p in model.trainable().items()
    }
    told = "".join(
        f", {name} {value}" for name, value in {"items": items, **more}.items() if value != _USUAL.get(name)
    )
    return Subject(f"{family}, {mode}, {device}{told}", model, start, items, torch.device(device))


def some_users(users: int, items: int = ITEMS, *, longest: int = EVENTS, seed: int = 3) -> list[list[int]]:
    """Ragged histories of made-up users; the first has one event."""
    chance = np.random.default_rng(seed)
    lengths = [1, *chance.integers(2, longest + 1, size=users)][:users]
    return [chance.integers(0, items, size=length).tolist() for length in lengths]


LOUD = [7, 11] * (EVENTS // 2) + [7]
"""Events that all pull the same way: what shows clipping by the event, or not at all."""


def one_step(clip_norm: float, **more: Any) -> StepSettings:
    """One step of everyone in which a sum moved by C moves the parameters by 1."""
    fields: dict[str, Any] = {
        "sampling_rate": 1.0,
        "noise_multiplier": 1.0,
        "clip_norm": clip_norm,
        "normaliser": 5.0,
        "steps": 1,
        "learning_rate": 5.0 / clip_norm,
        "micro_batch": 16,
    }
    return StepSettings(**{**fields, **more})


def in_steps(update: dict[str, Tensor], settings: StepSettings) -> npt.NDArray[np.float64]:
    """An update as one vector, in units of C: what the sum of a step was."""
    flat = torch.cat([update[name].flatten() for name in sorted(update)]).double().cpu().numpy()
    vector: npt.NDArray[np.float64] = (
        -flat * settings.normaliser / settings.learning_rate / settings.clip_norm
    )
    return vector


def devices() -> list[str]:
    """Those of this machine."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
