"""Finished simulations side by side: figures with intervals, what they cost, which settings differ, and tests in pairs.

Only runs of the same users, task and split are compared, so that every difference is one user's two figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.config import Plan
from common.metrics import Metric, paired_difference
from server.runs import RunError, RunFolder
from server.shell_lines import resume_line
from simulations.begun import Begun
from simulations.by_user import ByUser, load_by_user
from simulations.outcome import FEDTIDE
from simulations.splits import Part

Z95 = 1.959964
"""Standard errors on either side of a value that make a 95 % interval."""
_LABELS = ("name", "baseline_epochs")
"""Settings that make no difference to the private model."""


@dataclass(frozen=True)
class Compared:
    """One run.

    Attributes:
        metrics: of the private model, by name.
        epsilon: of the run, at the site whose users spent most.
        megabytes: that travelled, to sites and from them.
        seconds: of its rounds.
    """

    run: RunFolder
    plan: Plan
    begun: Begun
    metrics: Mapping[str, Metric]
    by_user: ByUser
    epsilon: float
    megabytes: float
    seconds: float

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def settings(self) -> dict[str, str]:
        """Every setting of plan and simulation: place -> value."""
        flat = {
            f"simulate.{name}": value for name, value in self.begun.settings.items() if name not in _LABELS
        }
        for section, values in self.plan.model_dump(mode="json").items():
            if section not in _LABELS:
                inner = values if isinstance(values, dict) else {"": values}
                flat |= {f"{section}.{name}".rstrip("."): value for name, value in inner.items()}
        return {name: "-" if value is None else str(value) for name, value in flat.items()}


@dataclass(frozen=True)
class Pair:
    """A run against the first one, over the same users.

    Attributes:
        mean, standard_error: of the difference, user by user: this run less the first.
        p: two-sided, if there were no difference; p_holm: allowing for how many runs are held against the first.
        other_event: share of the users who are judged by another event, as the runs' seeds differ.
    """

    run: str
    metric: str
    users: int
    mean: float
    standard_error: float
    p: float
    p_holm: float
    other_event: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return self.mean - Z95 * self.standard_error, self.mean + Z95 * self.standard_error

    @property
    def verdict(self) -> str:
        """In a word, at 5 %."""
        if not self.p_holm < 0.05:
            return "no significant difference"
        return "better" if self.mean > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        part: which held-out events the figures are of.
        headline: the metric that a plot shows.
        differing: setting -> its value in each run, where they are not all the same.
        public: whether the data are.
    """

    part: Part
    headline: str
    runs: Sequence[Compared]
    pairs: Sequence[Pair]
    differing: Mapping[str, Sequence[str]]
    public: bool

    def as_json(self) -> dict[str, Any]:
        """What the runs come to; nothing of a single user."""
        return {
            "part": self.part,
            "headline": self.headline,
            "runs": [
                {
                    "run": each.name,
                    "epsilon": each.epsilon,
                    "delta": each.plan.privacy.delta,
                    "metrics": {
                        name: {"value": m.value, "standard_error": _finite(m.standard_error)}
                        for name, m in each.metrics.items()
                    },
                    "megabytes": each.megabytes,
                    "seconds": each.seconds,
                }
                for each in self.runs
            ],
            "pairs": [
                {
                    "run": pair.run,
                    "against": self.runs[0].name,
                    "metric": pair.metric,
                    "users": pair.users,
                    "difference": pair.mean,
                    "standard_error": _finite(pair.standard_error),
                    "p": _finite(pair.p),
                    "p_holm": _finite(pair.p_holm),
                    "verdict": pair.verdict,
                    "judged_by_another_event": pair.other_event,
                }
                for pair in self.pairs
            ],
            "differing": {name: list(values) for name, values in self.differing.items()},
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(runs: Sequence[RunFolder], part: Part | None = None) -> Comparison:
    """Finished simulations side by side, the first of them as what the others are held against.

    Args:
        part: of the held-out events; None: the test split, or the validation where some run did not look at the test.

    Raises:
        RunError: fewer than two runs, a run twice, one that is not whole, or runs that cannot be compared.
    """
    if len(runs) < 2:
        raise RunError("give two runs or more to compare")
    for place, run in enumerate(runs):
        if run.path in {each.path for each in runs[:place]}:
            raise RunError(f"{run.name} is given twice: a run is not compared with itself")
    chosen = part or ("test" if all(_looked_at(run, "test") for run in runs) else "validation")
    found = [_read(run, chosen) for run in runs]
    for other in found[1:]:
        _check_comparable(found[0], other)
    first = found[0]
    return Comparison(
        part=chosen,
        headline=first.by_user.headline,
        runs=found,
        pairs=_pairs(first, found[1:]),
        differing=_differing(found),
        public=all(each.begun.public for each in found),
    )


def _looked_at(run: RunFolder, part: Part) -> bool:
    return part in _final(run)


def _final(run: RunFolder) -> dict[str, Any]:
    """The last line of what was measured.

    Raises:
        RunError: the run is not whole, or no simulation.
    """
    if not run.is_whole:
        raise RunError(f"{run.name} has not come to its end: `{resume_line(run)}` goes on with it")
    lines = run.metrics_file.read_bytes().splitlines() if run.metrics_file.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    if "final" not in last:
        raise RunError(
            f"{run.name} has no held-out figures, as a deployment's run has none: compare runs of `fedtide simulate`"
        )
    return dict(last)


def _read(run: RunFolder, part: Part) -> Compared:
    final = _final(run)
    if part not in final:
        raise RunError(
            f"{run.name} has no figures of its {part} split: compare the runs by --part validation"
        )
    records = list(run.records())
    return Compared(
        run=run,
        plan=run.plan(),
        begun=Begun.load(run),
        metrics={
            name: Metric(each["value"], each["standard_error"]) for name, each in final[part][FEDTIDE].items()
        },
        by_user=load_by_user(run, part),
        epsilon=float(json.loads((run.path / "privacy.json").read_bytes())["epsilon"]),
        megabytes=sum(record["bytes_down"] + record["bytes_up"] for record in records) / 1e6,
        seconds=sum(record["seconds"] for record in records),
    )


def _check_comparable(one: Compared, other: Compared) -> None:
    """Raises `RunError` where figures of the two say nothing of one another."""

    def refused(why: str) -> RunError:
        return RunError(f"{one.name} and {other.name} cannot be compared: {why}")

    if one.begun.data != other.begun.data or one.plan.catalog != other.plan.catalog:
        raise refused("they are of other data")
    if one.plan.model.task != other.plan.model.task:
        raise refused(f"one is of the task {one.plan.model.task}, the other of {other.plan.model.task}")
    if one.begun.split != other.begun.split:
        raise refused(f"one holds out by {one.begun.split}, the other by {other.begun.split}")
    if not np.array_equal(one.by_user.keys, other.by_user.keys):
        raise refused("they are judged by other users")


def _pairs(first: Compared, others: Sequence[Compared]) -> list[Pair]:
    metric = first.by_user.paired
    own = first.by_user.of[FEDTIDE][metric]
    found = []
    for other in others:
        paired = paired_difference(other.by_user.of[FEDTIDE][metric], own)
        p = math.nan if math.isnan(paired.z) else math.erfc(abs(paired.z) / math.sqrt(2))
        moved = float((other.by_user.targets != first.by_user.targets).mean())
        found.append(Pair(other.name, metric, len(own), paired.mean, paired.standard_error, p, p, moved))
    return _with_holm(found)


def _with_holm(pairs: Sequence[Pair]) -> list[Pair]:
    """Holm's step-down: the smallest of k ps times k, the next times k - 1, ..., never falling."""
    held, so_far = list(pairs), 0.0
    order = sorted(range(len(pairs)), key=lambda place: (math.isnan(pairs[place].p), pairs[place].p))
    for rank, place in enumerate(order):
        adjusted = min(1.0, pairs[place].p * (len(pairs) - rank))
        so_far = adjusted if math.isnan(adjusted) else max(so_far, adjusted)
        held[place] = replace(pairs[place], p_holm=so_far)
    return held


def _differing(found: Sequence[Compared]) -> dict[str, list[str]]:
    settings = [each.settings for each in found]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name, "-") for each in settings] for name in names}
    return {name: of for name, of in values.items() if len(set(of)) > 1}


def interval(metric: Metric) -> str:
    """A value with half of its 95 % interval."""
    error = metric.standard_error
    return f"{metric.value:.4f}" + (f" ±{Z95 * error:.4f}" if math.isfinite(error) else "")
