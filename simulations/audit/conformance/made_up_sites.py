"""Made-up sites in folders of their own, as a deployment has them: what is asked of them, and what they answer.

All have one key and one ledger, copied for each run, so that a round can be asked of the same site again with one user
more; they differ in their users alone.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.generators import SECURE, Generators
from client.ledger import Ledger
from client.policy import ANY_PLAN, Performance
from client.site_folder import Site
from common.config import Plan, make_plan
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.build import build_model, item_texts
from common.models.interface import InterestModel
from common.models.names import FAMILIES
from common.phases import Phase
from common.privacy.mechanisms import Event, GaussianSum, PoissonSubsampledGaussian
from common.privacy.noise import SecurePoissonSampler, UserSampler
from common.wire import Refusal, Request, State, Update
from simulations.audit.conformance.checking import Vector
from simulations.audit.conformance.code import Answers, Everyone, SameAgain
from simulations.audit.conformance.subjects import MOVED, language_model, texts
from simulations.faults.tiny import WORDS

Rows = Sequence[Sequence[int]]
"""Each user's items, oldest first."""

ITEMS, MAX_EVENTS, WITNESS_PLACES, AGREED = 120, 24, 32, 26
"""AGREED: users that each site has agreed to have at least."""

LORA: Mapping[str, Any] = {"mode": "lora", "lora_rank": 2, "lora_train_down": True}
"""Fields of a model that reads histories with a language model."""

LIKED_FROM = 4.0
"""The plan's default: values of even items are above, of odd items below."""

MICRO_BATCH = 24
"""Rows of a unit, in which users go through the model."""

PERFORMANCE = Performance(threads=1, micro_batch=MICRO_BATCH)


@contextmanager
def own_home(folder: Path) -> Iterator[None]:
    """Fedtide's cache in a folder of one's own, inside."""
    before = os.environ.get("FEDTIDE_HOME")
    os.environ["FEDTIDE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["FEDTIDE_HOME"]
        else:
            os.environ["FEDTIDE_HOME"] = before


@contextmanager
def at_made_up_sites(folder: Path) -> Iterator[None]:
    """A home of one's own, and silence where made-up sites would log what they refuse."""
    log = logging.getLogger("fedtide.site")
    before, log.disabled = log.disabled, True
    try:
        with own_home(folder / "home"):
            yield
    finally:
        log.disabled = before


class SiteRefusedError(RuntimeError):
    """A made-up site did not answer with an update."""


def a_plan(
    language_model: Path,
    clip_norm: float,
    *,
    steps: int = 1,
    rate: float = 0.5,
    noise: float = 2.0,
    moves: float = 1.0,
    model: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Plan:
    """A plan of one round.

    Args:
        moves: how far a sum that is moved by C moves the parameters.
        model: fields of the model's plan, instead of the usual.
        more: sections.
    """
    users = 10
    return make_plan(
        {
            "name": "conformance",
            "model": {
                "encoder": str(language_model),
                "width": 4,
                "hidden_width": 4,
                "max_events": MAX_EVENTS,
                "most_tokens": 40,
                **model,
            },
            "privacy": {
                "clip_norm": clip_norm,
                "users_per_site": users,
                "noise_multiplier": noise,
                "sampling_rate": rate,
                "delta": 1e-5,
                "witness_places": WITNESS_PLACES,
            },
            "training": {
                "rounds": 1,
                "steps_per_round": steps,
                "learning_rate": moves * rate * users / clip_norm,
            },
            **more,
        }
    )


def histories_of(rows: Rows) -> Histories:
    """Each user's events an hour apart, from the same hour on, whoever else is there."""
    return Histories(
        users=np.array([f"made-up-{place}" for place in range(len(rows))], dtype=np.str_),
        offsets=np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64),
        items=np.array([item for row in rows for item in row], dtype=np.int32),
        times=np.array([_hour(event) for row in rows for event in range(len(row))], dtype=np.int64),
        kinds=np.zeros(sum(len(row) for row in rows), dtype=np.int16),
        values=np.array([_value(item) for row in rows for item in row], dtype=np.float32),
        kind_names=("view",),
    )


def batch_of(rows: Rows, events: int = MAX_EVENTS) -> HistoryBatch:
    """What a site must make of these users: the latest `events` of each, padded on the right."""
    items = np.full((len(rows), events), -1, dtype=np.int64)
    times = np.zeros((len(rows), events), dtype=np.int64)
    labels = np.full((len(rows), events), np.nan, dtype=np.float32)
    for user, row in enumerate(rows):
        last = list(row)[-events:]
        items[user, : len(last)] = last
        times[user, : len(last)] = [_hour(len(row) - len(last) + event) for event in range(len(last))]
        labels[user, : len(last)] = [_value(item) >= LIKED_FROM for item in last]
    return HistoryBatch.of(items, times, labels=labels)


def _value(item: int) -> float:
    return 5.0 if item % 2 == 0 else 1.0


def _hour(event: int) -> int:
    return 1_000_000_000 + 3600 * event


@dataclass
class Recorded:
    """A sampler that keeps what it was asked and what it drew."""

    sampler: UserSampler = field(default_factory=SecurePoissonSampler)
    asked: list[tuple[int, float]] = field(default_factory=list)
    drawn: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        """As the sampler draws."""
        self.asked.append((users, rate))
        self.drawn.append(self.sampler.sample(users, rate))
        return self.drawn[-1].copy()


class Draws:
    """Generators of several sites: the first site's are the first that are made, and so on.

    Args:
        samplers: of each site; everyone takes part where there is none.

    Attributes:
        streams: each site's noise, the same in each run.
    """

    def __init__(self, *samplers: UserSampler) -> None:
        self._samplers = samplers
        self.streams: list[SameAgain] = []

    def again(self) -> Generators:
        """For a run, from the beginning."""
        noises, samplers = self._noises(), self._who()
        return Generators(noise=lambda: next(noises), sampler=lambda: next(samplers))

    def _noises(self) -> Iterator[SameAgain]:
        for site in range(1 << 20):
            if site == len(self.streams):
                self.streams.append(SameAgain())
            yield self.streams[site].rewind()

    def _who(self) -> Iterator[UserSampler]:
        yield from self._samplers
        while True:
            yield Everyone()


class MadeUpSites:
    """Where made-up sites are put up, with the catalog and the model that all of them have.

    Attributes:
        model: the checker's own.
        max_events: of a history.
        start: trainable parameters off their start, as a server might broadcast them.
        fresh: those of a new model.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "sites",
        *,
        agreed: int = AGREED,
        performance: Performance = PERFORMANCE,
        **model: Any,
    ) -> None:
        """Sites that do not exist yet.

        Args:
            folder: everything is written in a folder `name` of it, which is not there yet.
            agreed: how many users each site has agreed to have at least.
            performance: how each site computes.
            model: fields of the model's plan, instead of the usual.
        """
        self.language_model = language_model(folder)
        self._model_fields = model
        place = folder / name
        place.mkdir()
        self._catalog = place / "catalog.jsonl"
        catalog = Catalog(
            ids=tuple(f"i{item}" for item in range(ITEMS)),
            texts=tuple(texts(ITEMS)),
            categories=tuple((WORDS[item % 3],) for item in range(ITEMS)),
        )
        catalog.save(self._catalog)
        self._template = place / "template"
        self._template.mkdir(mode=0o700)
        site = Site(
            folder=self._template,
            name="made-up",
            catalog=self._catalog,
            users_at_least=agreed,
            families=tuple(FAMILIES),
            metrics=True,
            limits=ANY_PLAN,
            performance=performance,
        )
        site.save()
        typical: list[Event] = [PoissonSubsampledGaussian(0.5, 2.0, 20), GaussianSum(6.0)]
        Ledger.create(site.ledger_folder, epsilon=100, delta=1e-5, typical_plan=typical).disconnect()
        self._made = 0
        plan = self.plan(1.0).model
        self.max_events = plan.max_events
        self.model: InterestModel = build_model(
            plan,
            item_texts(catalog.texts, catalog.categories),
            self.language_model,
            categories=catalog.categories,
            witness_places=WITNESS_PLACES,
        ).model
        self.fresh = self.model.trainable_state()
        generator = torch.Generator().manual_seed(2)
        self.start = {
            name: tensor + MOVED * torch.randn(tensor.shape, generator=generator)
            for name, tensor in self.fresh.items()
        }

    def plan(self, clip_norm: float, **fields: Any) -> Plan:
        """See `a_plan`."""
        return a_plan(self.language_model, clip_norm, model=self._model_fields, **fields)

    def batch(self, rows: Rows) -> HistoryBatch:
        """See `batch_of`."""
        return batch_of(rows, self.max_events)

    @contextmanager
    def holding(self, users: Sequence[Rows]) -> Iterator[list[Path]]:
        """New sites, one for each of these lists of users, for as long as they are needed."""
        folders = []
        for rows in users:
            self._made += 1
            folder = self._template.with_name(f"site-{self._made}")
            shutil.copytree(self._template, folder)
            histories_of(rows).save(folder / "histories")
            folders.append(folder)
        try:
            yield folders
        finally:
            for folder in folders:
                shutil.rmtree(folder)

    def request(self, plan: Plan, state: State | None = None, phase: Phase = Phase.UPDATE) -> Request:
        """What a server asks in that phase's round."""
        number = next(each.round for each in plan.schedule() if each.phase is phase)
        return Request(
            run="conformance",
            round=number,
            attempt=1,
            nonce="ab" * 16,
            plan=plan.model_dump_json(),
            state=self.start if state is None else state,
            phase=phase,
        )

    def answers(
        self,
        path: Answers,
        plan: Plan,
        users: Sequence[Rows],
        generators: Generators = SECURE,
        *,
        state: State | None = None,
        phase: Phase = Phase.UPDATE,
    ) -> list[Update | Refusal]:
        """What new sites with these users answer."""
        request = self.request(plan, state, phase)
        with self.holding(users) as folders:
            return path([(folder, request) for folder in folders], generators)

    def released(
        self, path: Answers, plan: Plan, users: Sequence[Rows], generators: Generators = SECURE, **fields: Any
    ) -> list[dict[str, Tensor]]:
        """What new sites with these users release.

        Raises:
            SiteRefusedError: a site answered with something else.
        """
        found = self.answers(path, plan, users, generators, **fields)
        for each in found:
            if isinstance(each, Refusal):
                raise SiteRefusedError(f"a site of made-up users refused: {each.reason}")
        return [dict(each.state) for each in found if isinstance(each, Update)]


def in_sums(update: State, plan: Plan) -> Vector:
    """An update as one vector in units of C: what the sums of its steps added up to, by the plan's own constants."""
    flat = torch.cat([update[name].flatten() for name in sorted(update)]).double().numpy()
    moved = plan.training.learning_rate * plan.privacy.clip_norm
    vector: Vector = -flat * plan.privacy.sampling_rate * plan.privacy.users_per_site / moved
    return vector


def distance(one: Vector, other: Vector) -> float:
    """Infinite where it is no number."""
    found = float(np.linalg.norm(one - other))
    return found if math.isfinite(found) else math.inf
