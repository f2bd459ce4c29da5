"""Popularity, transitions and metrics: one user moves each by 1 at most, and each carries the noise of its event."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.config import Plan, make_plan
from common.events.histories import Histories
from common.phases import Phase
from common.privacy.noise import INFLATION, GaussianNoise
from common.privacy.statistics import noise_chi_square
from common.sums import METRICS, POPULARITY, TRANSITIONS, PairLayout
from common.wire import Request
from common.witness import witness_name
from simulations.audit.conformance.checking import Vector, at_most, attempted, corrected, statistical
from simulations.audit.conformance.code import Code, SameAgain
from simulations.audit.conformance.noise import detectable
from simulations.audit.conformance.sensitivity import OTHERS, ROOM
from simulations.audit.conformance.subjects import WITNESS_PLACES, Subject, some_users
from simulations.audit.evidence import Check

NAMES = ("popularity", "transitions", "metrics")
SIGMA = 1.3
CATALOG, TOP = 1200, 50
MORE_OTHERS = (8, 16, 47, 48, 64)
"""Beside how many users more the one comes and goes: around multiples of kernels' tiles and of a unit of rows."""
LOUD = [0, 1, *(int(item) for item in np.random.default_rng(6).integers(0, TOP, 400))]
"""Many events, at first two items that only the loudest of users has in this order."""
HEAVY = [5] * 200 + [6, 5]
"""One item, over and over."""
WIDE = list(range(400))
"""Hundreds of distinct items."""
LONG = [int(item) for item in np.random.default_rng(8).integers(0, TOP, 2000)]
"""More events than the plan lets anyone contribute."""


@dataclass(frozen=True)
class Sum:
    """One release of sums under test.

    Attributes:
        release: [places] what leaves the site for these users' histories.
        fields: name -> places of what a release holds: the sum, and its witness.
        rounds: how many releases the noise is judged by.
        reached: what the loud user must move it by at least, or the test shows nothing.
    """

    name: str
    release: Callable[[Sequence[Sequence[int]], GaussianNoise], dict[str, Tensor]]
    fields: Mapping[str, int]
    rounds: int
    reached: float = 1 - ROOM


def histories_of(rows: Sequence[Sequence[int]]) -> Histories:
    """Made-up users' histories, an hour between events."""
    flat = [item for row in rows for item in row]
    return Histories(
        users=np.array([f"made-up-{place}" for place in range(len(rows))], dtype=np.str_),
        offsets=np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64),
        items=np.array(flat, dtype=np.int32),
        times=1_000_000_000 + 3600 * np.arange(len(flat), dtype=np.int64),
        kinds=np.zeros(len(flat), dtype=np.int16),
        values=np.full(len(flat), np.nan, dtype=np.float32),
        kind_names=("view",),
    )


def a_plan() -> Plan:
    """A plan of every phase, calibrated by hand."""
    return make_plan(
        {
            "statistics": {
                "popularity_share": 0.2,
                "transition_share": 0.2,
                "popularity_noise_multiplier": SIGMA,
                "transition_noise_multiplier": SIGMA,
                "top_items": TOP,
            },
            "privacy": {"witness_places": WITNESS_PLACES},
            "metrics": {"share": 0.1, "noise_multiplier": SIGMA, "top": 20},
        }
    )


def sums_of(subject: Subject, code: Code) -> list[Sum]:
    """The three sums; metrics rank with the subject's model."""
    plan = a_plan()
    witness = plan.privacy.witness_places

    def fields(name: str, places: int) -> Mapping[str, int]:
        return {name: places, witness_name(name): witness}

    def statistic(phase: Phase) -> Callable[[Sequence[Sequence[int]], GaussianNoise], dict[str, Tensor]]:
        released = {POPULARITY: torch.arange(CATALOG, 0, -1, dtype=torch.float32)}
        request = Request(
            run="conformance",
            round=1,
            attempt=1,
            nonce="ab" * 16,
            plan="",
            state={},
            phase=phase,
            released=released,
        )
        return lambda rows, noise: code.statistics(
            histories_of(rows), CATALOG, plan.statistics, request, noise, witness
        )

    def metrics(rows: Sequence[Sequence[int]], noise: GaussianNoise) -> dict[str, Tensor]:
        whole = histories_of([[item % subject.items for item in row] for row in rows])
        histories, last = whole.without_last(1)
        held_out: npt.NDArray[np.int64] = last[:, 0].astype(np.int64)
        return code.metrics(subject.rewound(), histories, held_out, plan, noise)

    pairs = PairLayout(TOP, plan.statistics.symmetric).places
    return [
        Sum("popularity", statistic(Phase.POPULARITY), fields(POPULARITY, CATALOG), 8),
        Sum("transitions", statistic(Phase.TRANSITIONS), fields(TRANSITIONS, pairs), 8),
        Sum("metrics", metrics, fields(METRICS, 3), 40, reached=0.5),
    ]


def sum_checks(subject: Subject, code: Code, only: Sequence[str] = NAMES) -> list[Check]:
    """`sum sensitivity`, `sum noise` and `sum fields` of each sum that is named."""
    found: list[Check] = []
    for each in sums_of(subject, code):
        if each.name in only:
            found += attempted("sum sensitivity", each.name, partial(_sensitivity, each))
            found += attempted("sum noise", each.name, partial(_noise, each, code))
    return found


def _sensitivity(each: Sum) -> list[Check]:
    noise, moved, loud = SameAgain(), list[float](), list[float]()
    newcomers = [LOUD, [2, 3], [5], some_users(4, TOP, seed=9)[3], HEAVY, WIDE, LONG]

    def released(rows: Sequence[Sequence[int]]) -> Vector:
        found = each.release(rows, noise.rewind())
        return torch.cat([found[name].flatten() for name in sorted(found)]).double().numpy()

    beside = sorted({*OTHERS, *MORE_OTHERS})
    for others in beside:
        rows = some_users(others, TOP)
        without = released(rows)
        for user in newcomers:
            moved.append(float(np.linalg.norm(released([*rows, user]) - without)))
        loud.append(moved[-len(newcomers)])
    says = (
        f"One user more, of {len(newcomers)} that were tried, moves the sum by {max(moved):.4f} at most, beside "
        f"{', '.join(map(str, beside))} others."
    )
    check = at_most("sum sensitivity", each.name, max(moved), 1 + ROOM, says)
    if min(loud) >= each.reached:
        return [check]
    return [
        replace(
            check, holds=False, says=f"The loud user moves it by {min(loud):.3f} alone: nothing is shown."
        )
    ]


def _noise(each: Sum, code: Code) -> list[Check]:
    """Releases of the same users: what differs between two of them is noise, in every field and at every place."""
    users = some_users(4, TOP)
    releases = [each.release(users, code.noise()) for _ in range(each.rounds)]
    forms = [{name: tensor.numel() for name, tensor in release.items()} for release in releases]
    known = all(form == each.fields for form in forms)
    parts = [_differences(releases, name) for name in each.fields]
    if parts[0].shape[1] < len(releases):  # few places: each is judged alone
        parts += list(parts[0].T)
    drawn = np.concatenate([_drawn(releases, name) for name in each.fields], axis=1)  # [releases, places]
    constant = int((drawn == drawn[0]).all(axis=0).sum())
    whole = np.concatenate([part.ravel() for part in parts[: len(each.fields)]])
    p = 0.0 if constant else corrected([noise_chi_square(part, 1.0) for part in (whole, *parts)])
    ratio = float(np.sqrt(np.mean(np.square(whole))))
    low, high = detectable(whole.size, 1 + len(parts))
    says = (
        f"The noise of two releases of the same users is {ratio:.4f} times as wide as stated; {low:.3f} or "
        f"{high:.3f} would be refused. {constant} places are always the same."
    )
    names = sorted(set().union(*forms))
    return [
        statistical("sum noise", each.name, ratio, p, "1: as wide as stated, at every place", says),
        Check(
            "sum fields",
            each.name,
            float(len(names)),
            " and ".join(f"{name} of {places} numbers" for name, places in each.fields.items()),
            known,
            f"The release holds {', '.join(names)}, and nothing else.",
        ),
    ]


def _drawn(releases: Sequence[Mapping[str, Tensor]], name: str) -> Vector:
    """[releases, places] of a field."""
    return np.stack([release[name].flatten().double().numpy() for release in releases])


def _differences(releases: Sequence[Mapping[str, Tensor]], name: str) -> Vector:
    """[pairs of releases, places] in units of the noise that is claimed."""
    drawn = _drawn(releases, name)
    differences: Vector = (drawn[0::2] - drawn[1::2]) / math.sqrt(2) / (SIGMA * (1 + INFLATION))
    return differences
