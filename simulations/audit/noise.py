"""The noise in every release of a run, from the releases themselves: `fedtide audit noise`.

Each release carries a witness (`common/witness.py`): places that no user can reach. Divided by the noise that the plan
claims, they must be independent standard normals: of the right level in each release, over a site's rounds and over
all sites, of the right shape out to the tails, never repeated, at no other place either (`noise_checks.py`).

Series: `sites`: site -> [{round, phase, ratio, low, high, so_far, so_far_low, so_far_high, drift}], low and high three
standard deviations from 1; `drift_limit`; `correlations`: {limit, within: {site: {correlation, rounds}}, between:
{correlation, releases: [[site, round], [site, round]]}}.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simulations.audit import noise_statistics as test
from simulations.audit.evidence import Check, Evidence
from simulations.audit.noise_checks import QUESTIONS, between, drift_limit, drift_of, judge
from simulations.audit.witnesses import Release, Witnesses, by_site, read_witnesses

LEVEL = 1e-3
"""The most that an honest run, of however many sites and rounds, alarms with."""

LIMITS = (
    "A malicious site can noise the witness and nothing else, or send a witness that it made up: this finds bugs, "
    "not fraud. Of what lies outside the witness it sees only whether it is too small to hold any noise.",
    "It says nothing of clipping, sampling, or how many rows a user has: `fedtide audit conformance` does.",
    "Noise that repeats in another run, or outside the witness, is not looked for, and neither is a generator that "
    "can be foretold. Whether an update's noise lies on its grid cannot be seen; a sum's is looked at.",
    "The claimed level is the plan's. Whether receipts charge for the same, and whether the releases kept are those "
    "that were signed for, is shown by `fedtide audit receipts`.",
    "Releases that were not admitted are not in the run's folder, and are not looked at.",
)


def audit_noise(
    path: Path, *, level: float = LEVEL, on_asked: Callable[[int, int], None] = lambda done, of: None
) -> Evidence:
    """Tests a run's releases; reads the run's folder alone. Writes nothing.

    Args:
        level: of false alarms of the whole audit.
        on_asked: as for `judge`.

    Raises:
        RunError: there is no run, or what it says of its rounds cannot be read.
        PlanError: its plan cannot be read.
    """
    began = time.monotonic()
    found = read_witnesses(path)
    checks = [_kept(found)]
    series: dict[str, Any] = {"sites": {}}
    if found.releases:
        checks += judge(found.releases, level=level, on_asked=on_asked)
        series = _series(by_site(found.releases), level / len(QUESTIONS))
    return Evidence(
        tool="noise",
        command=f"fedtide audit noise {path.name}",
        checks=checks,
        parameters={
            "level": level,
            "questions": list(QUESTIONS),
            "witness_places": found.places,
            "drift": test.DRIFT,
            "releases": len(found.releases),
            "claimed": {str(number): deviation for number, deviation in found.claimed.items()},
        },
        series=series,
        limits=LIMITS,
        seconds=time.monotonic() - began,
    )


def _kept(found: Witnesses) -> Check:
    """Whether every admitted release is there with its witness."""
    if not found.places:
        said = (
            "the plan has privacy.witness_places = 0, so nobody can check this run's noise from its releases: "
            "leave the field out in the next plan"
        )
    elif found.faults:
        said = "; ".join(found.faults[:3]) + (
            f"; and {len(found.faults) - 3} more" if found.faults[3:] else ""
        )
    elif not found.releases:
        said = "no release was admitted in this run yet: there is nothing to check"
    else:
        said = f"all {len(found.releases)} admitted releases are kept, each with a witness of {found.places}"
    return Check(
        name="kept",
        subject="run",
        measured=float(len(found.releases)),
        bound="every admitted release, with its witness",
        holds=bool(found.places and found.releases and not found.faults),
        says=said,
    )


def _series(sites: Mapping[str, Sequence[Release]], share: float) -> dict[str, Any]:
    charts: dict[str, list[dict[str, Any]]] = {}
    within: dict[str, Any] = {}
    for site, own in sites.items():
        drift, squares, count = drift_of(own), 0.0, 0
        charts[site] = []
        for place, each in enumerate(own):
            squares, count = squares + float(np.square(each.z).sum()), count + each.z.size
            (low, high), (so_far_low, so_far_high) = (
                test.control_limits(each.z.size),
                test.control_limits(count),
            )
            charts[site].append(
                {
                    "round": each.round,
                    "phase": each.phase,
                    "ratio": test.ratio(each.z),
                    "low": low,
                    "high": high,
                    "so_far": math.sqrt(squares / count),
                    "so_far_low": so_far_low,
                    "so_far_high": so_far_high,
                    "drift": float(drift[place]),
                }
            )
        found = test.most_alike(np.stack([each.z for each in own]))
        if found is not None:
            rounds = [own[found.first].round, own[found.second].round]
            within[site] = {"correlation": found.correlation, "rounds": rounds}
    found, everything = between(sites)
    pairs = len(everything) * (len(everything) - 1) // 2
    limit = test.correlation_limit(everything[0].z.size, share / pairs) if pairs else 1.0
    correlations: dict[str, Any] = {"limit": limit, "within": within, "between": None}
    if found is not None:
        places = [everything[found.first], everything[found.second]]
        correlations["between"] = {
            "correlation": found.correlation,
            "releases": [[each.site, each.round] for each in places],
        }
    return {"sites": charts, "drift_limit": drift_limit(len(sites), share), "correlations": correlations}
