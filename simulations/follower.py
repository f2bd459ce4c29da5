"""Follows a run's folder while an engine works in it: steps, rounds, and the quality of each checkpoint."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common.config import Plan
from common.events.cleaning import CleaningReport
from common.models.build import BuiltModel
from common.models.interface import InterestModel
from common.models.priors import make_priors
from server.privacy_record import Releases
from server.runs import RunFolder, append_line
from simulations.evaluation import HeldOut, evaluate, model_scorer
from simulations.quality import Quality
from simulations.sites import SimulatedSite


@dataclass
class Watcher:
    """What the console is told while a run goes on; every hook does nothing unless it is replaced.

    `on_progress` tells how much of the latest phase is done; `on_run`, where the run lies, once it can go on.
    """

    on_sites: Callable[[list[SimulatedSite], CleaningReport, Plan], None] = lambda sites, report, plan: None
    on_step: Callable[[int, int, int], None] = lambda round, done, of: None
    on_round: Callable[[dict[str, Any], Quality, float], None] = lambda record, quality, epsilon: None
    on_phase: Callable[[str], None] = lambda phase: None
    on_progress: Callable[[int, int | None], None] = lambda done, of: None
    on_run: Callable[[RunFolder], None] = lambda run: None

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Bars are shown inside, where there are any."""
        yield


def load_checkpoint(model: InterestModel, run: RunFolder, plan: Plan, number: int | None, items: int) -> None:
    """Parameters and priors after a round, or of the finished run."""
    model.load_trainable(run.model_state() if number is None else run.round_state(number))
    model.set_released(make_priors(run.released_state(number), plan.statistics, items))


class Follower:
    """Evaluates each checkpoint as it appears, and tells the watcher.

    Attributes:
        qualities, epsilons: on the validation split, and PLD epsilon of what was released, after each
            exchange, from the start.
    """

    def __init__(
        self,
        run: RunFolder,
        plan: Plan,
        sites: list[SimulatedSite],
        built: BuiltModel,
        held_out: HeldOut,
        watcher: Watcher,
    ) -> None:
        self._run, self._plan, self._sites = run, plan, sites
        self._built, self._held_out, self._watcher = built, held_out, watcher
        self.epsilons = [0.0]
        self._releases = Releases()
        self._seen = 0
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.qualities: list[Quality] = [self._quality(0)]

    def _quality(self, number: int) -> Quality:
        model = self._built.model
        load_checkpoint(model, self._run, self._plan, number, len(self._built.vectors))
        return evaluate(
            model_scorer(model, self._plan.model.task), self._held_out, "validation", len(self._built.vectors)
        )

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            if self._failure is not None:
                raise self._failure

    def _follow(self) -> None:
        try:
            while not self._stop.wait(0.3):
                self._report_steps()
                self.catch_up()
        except BaseException as error:  # handed to the main thread by `following`
            self._failure = error

    def _report_steps(self) -> None:
        current, done = self._seen + 1, 0
        for site in self._sites:
            with contextlib.suppress(OSError, ValueError):
                number, step, _ = (site.folder / "progress").read_text().split()
                done += int(step) if int(number) == current else 0
        self._watcher.on_step(current, done, len(self._sites) * self._plan.training.steps_per_round)

    def catch_up(self) -> None:
        """Evaluates and reports the rounds that were finished meanwhile."""
        for record in list(self._run.records())[self._seen :]:
            quality = self._quality(record["round"])
            epsilon = self._releases.add(self._run.receipts(record["round"]))
            self.qualities.append(quality)
            self.epsilons.append(epsilon)
            self._seen += 1
            append_line(
                self._run.path / "metrics.jsonl",
                {
                    "round": record["round"],
                    "epsilon": epsilon,
                    "delta": self._plan.privacy.delta,
                    "validation": quality.as_json(),
                },
            )
            self._watcher.on_round(record, quality, epsilon)
