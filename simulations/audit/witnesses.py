"""The witnesses of a run's admitted releases, read from its folder and divided by the noise that the plan claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from common.config import Plan
from common.phases import Exchange, Phase
from common.privacy.mechanisms import PoissonSubsampledGaussian
from common.privacy.noise import GRID_BITS, INFLATION
from common.sums import CONTRIBUTION_NORM
from common.witness import is_witness, without_witness
from server.runs import RunError, RunFolder

WHOLE = "all outside the witness"


@dataclass(frozen=True)
class Release:
    """One admitted release in units of its claimed noise.

    Attributes:
        z: [places] float64, of the witness.
        steps: how many sums were added up in it.
        rest: name of each other tensor -> its sum of squares, and its number of coordinates.
        off_grid: of a sum, how many places of its witness are no whole steps of the noise's grid; None of an update,
            which float32 parameters have rounded.
    """

    site: str
    round: int
    phase: str
    z: npt.NDArray[np.float64]
    steps: int = 1
    rest: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    off_grid: int | None = None

    def parts(self) -> dict[str, tuple[float, int]]:
        """The rest, tensor by tensor and as a whole."""
        squares, count = (sum(column) for column in zip(*self.rest.values(), strict=True))
        return {**self.rest, WHOLE: (squares, int(count))}


@dataclass
class Witnesses:
    """What was found in a run's folder.

    Attributes:
        places: of each witness, as the plan says.
        claimed: round -> standard deviation of its noise.
        releases: in the order of rounds, then of sites.
        faults: what is missing or damaged, one line each.
    """

    places: int
    claimed: dict[int, float] = field(default_factory=dict)
    releases: list[Release] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def by_site(releases: Iterable[Release]) -> dict[str, list[Release]]:
    """Each site's releases, in their order."""
    sites: dict[str, list[Release]] = {}
    for release in releases:
        sites.setdefault(release.site, []).append(release)
    return sites


def steps_of(exchange: Exchange) -> int:
    """How many Gaussian sums add up in a release."""
    event = exchange.event
    return event.steps if isinstance(event, PoissonSubsampledGaussian) else 1


def claimed_deviation(plan: Plan, exchange: Exchange) -> float:
    """Standard deviation of the noise in each coordinate of a round's release."""
    stated = plan.stated(exchange.phase)
    of_a_sum = (1 + INFLATION) * exchange.event.noise_multiplier * stated.clip_norm / stated.normaliser
    return (stated.learning_rate or 1.0) * of_a_sum * math.sqrt(steps_of(exchange))


def read_witnesses(path: Path) -> Witnesses:
    """Every release that rounds.jsonl says was admitted.

    Raises:
        RunError: there is no run in the folder, or its lines cannot be read.
        PlanError: its plan cannot be read, or is not calibrated.
    """
    if not (path / "plan.json").is_file():
        raise RunError(f"there is no run in {path}: give a run's folder, such as those under runs/")
    run = RunFolder(path)
    plan = run.plan()
    found = Witnesses(plan.privacy.witness_places)
    schedule = {exchange.round: exchange for exchange in plan.schedule()}
    found.claimed = {number: claimed_deviation(plan, each) for number, each in schedule.items()}
    if not found.places:
        return found
    for number, site, key_id in _admitted(run):
        place = f"round {number}, site {_printable(site)}"
        if number not in schedule:
            found.faults.append(f"{place}: the plan has no such round")
        elif key_id is None:
            found.faults.append(f"{place}: it was admitted, but has no receipt")
        else:
            try:
                update = run.update(number, key_id)
            except Exception as error:  # a missing or damaged file, whatever the reader makes of it
                found.faults.append(f"{place}: its release cannot be read ({type(error).__name__})")
                continue
            try:
                deviation = found.claimed[number]
                found.releases.append(_release(site, schedule[number], update, deviation, found.places))
            except ValueError as error:
                found.faults.append(f"{place}: {error}")
    return found


def _admitted(run: RunFolder) -> Iterator[tuple[int, str, str | None]]:
    """(round, site, id of the site's key or None without a receipt) of each admitted release."""
    file = run.rounds_file
    try:
        pairs = [(int(each["round"]), str(name)) for each in run.records() for name in each["admitted"]]
        file = run.receipts_file
        keys: dict[tuple[int, str], str] = {}
        for number in sorted({number for number, _ in pairs}):
            keys |= {(number, str(line["site"])): str(line["key_id"]) for line in run.receipts(number)}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} cannot be read ({type(error).__name__}): restore the run's folder from a backup"
        ) from error
    for number, name in sorted(set(pairs)):
        yield number, name, keys.get((number, name))


def _release(
    site: str, exchange: Exchange, update: dict[str, Tensor], deviation: float, places: int
) -> Release:
    """One release in units of its noise.

    Raises:
        ValueError: it has no witness of so many places, or holds values that are not finite.
    """
    witnesses = [value for name, value in update.items() if is_witness(name)]
    if [tuple(each.shape) for each in witnesses] != [(places,)]:
        raise ValueError(f"it has no witness of {places} places, which the plan asks for")
    rest = {
        _printable(name): (float((value.double() / deviation).square().sum()), value.numel())
        for name, value in without_witness(update).items()
        if value.numel()
    }
    witness = witnesses[0].double().numpy()
    z = witness / deviation
    if not rest:
        raise ValueError("it holds nothing but its witness")
    if not np.isfinite(z).all() or not all(math.isfinite(squares) for squares, _ in rest.values()):
        raise ValueError("it holds values that are not finite")
    return Release(
        site=_printable(site),
        round=exchange.round,
        phase=exchange.phase.value,
        z=z,
        steps=steps_of(exchange),
        rest=rest,
        off_grid=None if exchange.phase is Phase.UPDATE else _off_grid(witness),
    )


def _off_grid(witness: npt.NDArray[np.float64]) -> int:
    """How many numbers of a sum are no whole steps; float32 holds a step exactly, and whole steps where it does not."""
    steps = witness / math.ldexp(CONTRIBUTION_NORM, -GRID_BITS)
    return int((steps != np.rint(steps)).sum())


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)
