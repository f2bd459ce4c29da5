"""Power and false alarms of `fedtide audit noise`, measured: `python -m tests.simulations.audit.noise_power`.

Witnesses are drawn by the mechanism's own generator; the questions are the tool's own. Lies are told in the witness
alone, so that what finds them is the witness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from common.privacy.noise import SecureGaussian
from simulations.audit.conformance.sabotages_noise import cut_at_three, four_uniforms, large_drawn_again
from simulations.audit.noise import LEVEL
from simulations.audit.noise_checks import judge
from simulations.audit.witnesses import Release
from tests.simulations.audit.noise_cases import simulated

Lie = Callable[[list[Release]], list[Release]]


class Secure:
    """The mechanism's generator, in the form that `simulated` takes."""

    def standard_normal(self, size: int) -> npt.NDArray[np.float64]:
        return SecureGaussian().normal(size)

    def chisquare(self, degrees: int) -> float:
        return float(np.square(self.standard_normal(degrees)).sum())


def one_site(releases: list[Release]) -> list[Release]:
    """Nine tenths of the noise at one site of several."""
    return [replace(each, z=0.9 * each.z) if each.site == "site-3" else each for each in releases]


def changed(change: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Lie:
    """Numbers that are drawn otherwise."""
    return lambda releases: [replace(each, z=change(each.z)) for each in releases]


def turned(releases: list[Release]) -> list[Release]:
    """Every second release has the noise of the one before it, turned by one place."""
    return [
        replace(each, z=np.roll(releases[place - 1].z, 1)) if place % 2 else each
        for place, each in enumerate(releases)
    ]


def measure(
    name: str,
    repetitions: int,
    change: Lie = lambda releases: releases,
    *,
    sites: int = 1,
    rounds: int = 20,
    factor: float = 1.0,
) -> None:
    """Prints in how many repetitions anything alarms, and what."""
    alarms: Counter[str] = Counter()
    for _ in range(repetitions):
        releases = simulated(Secure(), sites=sites, rounds=rounds, places=256, factor=factor)
        releases = change(releases)
        if factor != 1.0 or change is one_site:  # what users add would hide that noise is missing there
            releases = [replace(each, rest={"all": (1e9, 500)}) for each in releases]
        odd = {check.name for check in judge(releases, level=LEVEL) if not check.holds}
        alarms.update(odd | ({"any"} if odd else set()))
    told = ", ".join(f"{question} {count}" for question, count in alarms.most_common() if question != "any")
    print(f"{name}: {alarms['any']} of {repetitions} ({told or 'nothing alarms'})", flush=True)


def main() -> None:
    """The table of docs/audit.md."""
    for factor in (0.9, 0.95, 0.97):
        measure(f"{factor:g} of the noise, 1 site, 20 rounds", 100, factor=factor)
    for rounds in (2, 5):
        measure(f"0.9 of the noise, 1 site, {rounds} rounds", 100, rounds=rounds, factor=0.9)
    measure("0.8 of the noise, 1 site, 1 round", 100, rounds=1, factor=0.8)
    measure("0.9 of the noise at one of 10 sites, 20 rounds", 50, one_site, sites=10)
    measure("cut at 3 deviations, 1 site, 20 rounds", 50, changed(cut_at_three))
    measure("cut at 3 deviations, 10 sites, 3 rounds", 50, changed(cut_at_three), sites=10, rounds=3)
    measure("four uniforms, 1 site, 20 rounds", 50, changed(four_uniforms))
    measure("four uniforms, 10 sites, 10 rounds", 50, changed(four_uniforms), sites=10, rounds=10)
    measure("every second release turned by a place, 1 site, 4 rounds", 50, turned, rounds=4)
    measure("large draws again, 10 sites, 20 rounds", 50, changed(large_drawn_again), sites=10)
    measure("honest, 10 sites, 20 rounds", 200, sites=10)


if __name__ == "__main__":
    main()
