"""The code under test, as the tests see it: a trainer, two releases of sums, whole answers, and their generators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from client.generators import SECURE, Generators
from client.policy import Performance
from client.self_test import Engine
from client.site import answer
from client.site_folder import Site
from client.statistics import release_metrics, release_statistics
from client.together import Question, answered_together
from client.training import StepSettings, train_round
from common.config import Plan
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.phases import StatisticsPlan
from common.privacy.noise import GaussianNoise, SecureGaussian, SecurePoissonSampler, UserSampler
from common.wire import (
    Refusal,
    Request,
    Update,
    answer_from_records,
    answer_to_records,
    request_to_records,
)
from simulations.asking import asked_of, signed_for
from simulations.audit.trainers import Trainer

if TYPE_CHECKING:
    from flwr.app import RecordDict


StatisticsRelease = Callable[[Histories, int, StatisticsPlan, Request, GaussianNoise, int], dict[str, Tensor]]
MetricsRelease = Callable[
    [InterestModel, Histories, npt.NDArray[np.int64], Plan, GaussianNoise], dict[str, Tensor]
]
Reply = Callable[[Site, Request], "RecordDict"]
Answers = Callable[[Sequence[tuple[Path, Request]], Generators], list[Update | Refusal]]
"""(a site's folder and what it is asked, for each; generators) -> what came over the wire from each."""


def site_reply(site: Site, request: Request) -> RecordDict:
    """What a site sends back, as it goes on the wire."""
    return answer_to_records(answer(site, asked_of(site.folder, request)))


def site_metrics(
    model: InterestModel,
    histories: Histories,
    held_out: npt.NDArray[np.int64],
    plan: Plan,
    noise: GaussianNoise,
) -> dict[str, Tensor]:
    """Metrics as a site releases them that was told nothing of how to compute."""
    return release_metrics(model, histories, held_out, plan, noise, unit_rows=Performance().micro_batch)


def one_by_one(questions: Sequence[tuple[Path, Request]], generators: Generators) -> list[Update | Refusal]:
    """What sites answer as they do in a deployment, each by itself."""
    found = [
        answer(Site.load(folder), asked_of(folder, request), generators=generators)
        if generators is not SECURE
        else answer(Site.load(folder), asked_of(folder, request))
        for folder, request in questions
    ]
    return [answer_from_records(answer_to_records(each)) for each in found]


def in_one_go(questions: Sequence[tuple[Path, Request]], generators: Generators) -> list[Update | Refusal]:
    """What the sites of a simulation answer, all in one batch."""
    asked = [
        Question(folder, request_to_records(signed_for(folder, request)), math.inf)
        for folder, request in questions
    ]
    found = (
        answered_together(asked, generators=generators)
        if generators is not SECURE
        else answered_together(asked)
    )
    return [answer_from_records(each) for each in found]


@dataclass(frozen=True)
class Code:
    """What is tested; a site's own unless told.

    Attributes:
        paths: the ways from a request to an answer: of a site by itself, and of many in one batch.
        sampler, noise: make the generators that a site makes for each round.
    """

    trainer: Trainer = train_round
    statistics: StatisticsRelease = release_statistics
    metrics: MetricsRelease = site_metrics
    reply: Reply = site_reply
    paths: Mapping[str, Answers] = field(
        default_factory=lambda: {"one site": one_by_one, "sites together": in_one_go}
    )
    sampler: Callable[[], UserSampler] = SecurePoissonSampler
    noise: Callable[[], GaussianNoise] = SecureGaussian


def by_engine(engine: Engine, trainer: Trainer) -> Trainer:
    """The trainer with steps made by an engine, whatever its settings say."""

    def trained(
        model: InterestModel, histories: HistoryBatch, settings: StepSettings, **given: Any
    ) -> dict[str, Tensor]:
        return trainer(model, histories, replace(settings, engine=engine), **given)

    return trained


class Everyone:
    """A sampler for paired runs: every user takes part."""

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        """All of them."""
        return np.ones(users, dtype=np.bool_)


@dataclass(frozen=True)
class Chosen:
    """A sampler for paired runs: the users of a mask take part."""

    mask: npt.NDArray[np.bool_]

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        """Those of the mask."""
        return self.mask


class SameAgain:
    """One stream of fresh normals, the same for each run of a pair after `rewind`."""

    def __init__(self) -> None:
        """Nothing is drawn yet."""
        self._drawn: list[npt.NDArray[np.float64]] = []
        self._next = 0

    def rewind(self) -> SameAgain:
        """From the beginning."""
        self._next = 0
        return self

    @property
    def drawn(self) -> Sequence[npt.NDArray[np.float64]]:
        """What was drawn so far, call by call."""
        return self._drawn

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        """As in the first run."""
        if self._next == len(self._drawn):
            self._drawn.append(SecureGaussian().normal(size))
        self._next += 1
        return self._drawn[self._next - 1].copy()
