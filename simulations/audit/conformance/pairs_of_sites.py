"""One user more at a site, from request to decoded update: runs of the same request under one stream of noise.

The plan's own C, normaliser and learning rate turn an update back into sums, so a site that works with others is seen,
too. Each question is put to a site by itself and to sites that a simulation trains in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.config import Plan
from common.phases import Phase
from simulations.audit.conformance.by_hand import gradients_of, norm_of
from simulations.audit.conformance.checking import Vector, at_most
from simulations.audit.conformance.code import Answers, Chosen
from simulations.audit.conformance.made_up_sites import (
    ITEMS,
    MICRO_BATCH,
    Draws,
    MadeUpSites,
    Rows,
    SiteRefusedError,
    distance,
    in_sums,
)
from simulations.audit.conformance.sensitivity import ROOM, ROW_ROOM
from simulations.audit.conformance.subjects import some_users
from simulations.audit.evidence import Check

LOUD = [7, 11] * 100
"""Far more events than a plan's max_events, which all pull the same way."""
LONG = [int(item) for item in np.random.default_rng(4).integers(0, ITEMS, 300)]
SILENT = [5]
"""One event has nothing before it: the loss is zero, and so is the gradient."""

LOUDNESS = (2.0, 16.0, 1e3, 1e6)
"""The loud user's gradient before clipping, in units of C."""
UNITS = 6
"""Of rows, in each of which the loud user stands once."""

NEIGHBOURS = some_users(7, ITEMS, longest=40, seed=8)


@dataclass(frozen=True)
class Way:
    """From a request to an answer.

    Attributes:
        name: of the path.
    """

    sites: MadeUpSites
    name: str
    path: Answers

    def loudness(self, user: Sequence[int]) -> float:
        """The norm of a user's gradient at the parameters that are broadcast."""
        self.sites.model.load_trainable(self.sites.start)
        return norm_of(gradients_of(self.sites.model, self.sites.batch([user]), 0))

    def plan(self, loudness: float = 16.0) -> Plan:
        """One step, in which C is so much smaller than the loud user's gradient."""
        return self.sites.plan(self.loudness(LOUD) / loudness)

    def released(self, plan: Plan, rows: Rows, draws: Draws) -> list[dict[str, Tensor]]:
        """What a site with these users releases, and what its neighbour does."""
        return self.sites.released(self.path, plan, [rows, NEIGHBOURS], draws.again())


def answer_sensitivity(way: Way, loudness: Sequence[float] = LOUDNESS, units: int = UNITS) -> list[Check]:
    """`answer sensitivity`, `answer own row` and `other site`.

    At the second loudness, or the only one, there are so many units of rows, and the loud user stands in each in turn.
    """
    moved, strange, heard, disturbed = list[float](), list[float](), list[float](), 0
    for loud in loudness:
        plan, draws = way.plan(loud), Draws()

        def sums(rows: Rows, plan: Plan = plan, draws: Draws = draws) -> tuple[Vector, dict[str, Tensor]]:
            own, neighbour = way.released(plan, rows, draws)
            return in_sums(own, plan), neighbour

        many = units * MICRO_BATCH - 2
        nobody = sums([])[0]
        newcomers = {"loud": LOUD, "long": LONG, "quiet": [4, 5]}
        alone = {name: sums([user])[0] - nobody for name, user in newcomers.items()}
        moved += [float(np.linalg.norm(own)) for own in alone.values()]
        heard.append(float(np.linalg.norm(alone["loud"])))
        places = range(1, many, MICRO_BATCH) if loud == loudness[min(1, len(loudness) - 1)] else ()
        for others, pairs in (
            (9, [(name, 4) for name in newcomers]),
            (many, [("loud", at) for at in places]),
        ):
            rows = some_users(others, ITEMS, longest=40)
            without, beside = sums(rows) if pairs else (nobody, {})
            for name, place in pairs:
                found, then = sums([*rows[:place], newcomers[name], *rows[place:]])
                moved.append(distance(found, without))
                strange.append(distance(found - without, alone[name]))
                disturbed += not same(beside, then)
    told = ", ".join(f"{each:g}" for each in loudness)
    says = (
        f"One user more moves an update by {max(moved):.4f} C at most, beside 0 to {many} others, by the plan's own C, "
        f"normaliser and learning rate; the loudest user's gradient is {told} C before clipping."
    )
    check = at_most("answer sensitivity", way.name, max(moved), 1 + ROOM, says)
    if min(heard) < 1 - ROOM:
        quiet = (
            f"The loud user moves an update by {min(heard):.4f} C alone, so the bound was not reached: "
            "nothing is shown, or the update is smaller than the plan says."
        )
        check = replace(check, holds=False, says=quiet)
    return [
        check,
        at_most(
            "answer own row",
            way.name,
            max(strange),
            ROW_ROOM,
            f"Among other users, a user adds what the same user adds alone: off by {max(strange):.2g} C at most.",
        ),
        at_most(
            "other site",
            way.name,
            float(disturbed),
            0.0,
            f"{disturbed} times a user more at one site changed the update of another that was asked with it.",
        ),
    ]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two releases are, bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def unheard_user(way: Way) -> list[Check]:
    """`unheard user`: who was not drawn, or has nothing to say, changes not one bit of an update."""
    plan, changed = way.plan(), 0
    rows = some_users(9, ITEMS, longest=40)
    mask = np.array([True, False, True, True, False, True, False, True, True])
    for newcomer, taken in ((LOUD, False), (LONG, False), (SILENT, True)):
        for place in (0, 5, len(rows)):
            draws = Draws(Chosen(mask))
            without = way.released(plan, rows, draws)[0]
            more = Draws(Chosen(np.insert(mask, place, taken)))
            more.streams = draws.streams
            changed += not same(
                without, way.released(plan, [*rows[:place], newcomer, *rows[place:]], more)[0]
            )
    return [
        at_most(
            "unheard user",
            way.name,
            float(changed),
            0.0,
            f"{changed} of 9 users who were not drawn, or whose gradient is zero, changed a bit of an update.",
        )
    ]


@dataclass(frozen=True)
class Overflow:
    """Parameters at which some users' numbers are no numbers, and others' are.

    Attributes:
        state: the parameters.
        odd: a user whose numbers are none.
        others: users whose numbers are.
    """

    state: dict[str, Tensor]
    odd: Sequence[int]
    others: Rows


def overflow(sites: MadeUpSites, of: str) -> Overflow:
    """Parameters that a server might send to make one user's `gradients` or `scores` overflow.

    Raises:
        ValueError: none was found.
    """
    rows = [LOUD, LONG, *some_users(10, ITEMS, longest=30, seed=12)[1:]]
    for name, tensor in reversed(sites.start.items()):  # heads stand last
        for exponent in np.arange(38.5, 37.5, -0.01) if tensor.ndim == 2 else ():
            factor = 10.0**exponent / float(tensor.abs().max())

            def at(
                off: float, name: str = name, tensor: Tensor = tensor, factor: float = factor
            ) -> list[bool]:
                state = {**sites.start, name: (tensor.double() * factor * off).float()}
                return _finite(sites, state, rows, of)

            found = at(1.0)
            if 3 <= sum(found) < len(rows) and found == at(0.998) == at(1.002):
                state = {**sites.start, name: (tensor.double() * factor).float()}
                others = [row for row, fine in zip(rows, found, strict=True) if fine]
                return Overflow(state, rows[found.index(False)], others)
    raise ValueError(f"no parameters were found at which one user's {of} overflow and others' do not")


def _finite(sites: MadeUpSites, state: dict[str, Tensor], rows: Rows, of: str) -> list[bool]:
    """Whose numbers are numbers."""
    sites.model.load_trainable(state)
    if of == "gradients":
        batch = sites.batch(rows)
        return [math.isfinite(norm_of(gradients_of(sites.model, batch, user))) for user in range(len(rows))]
    with torch.no_grad():
        scores = sites.model.scores(sites.model.prepare(sites.batch([row[:-1] for row in rows])))
    return scores.isfinite().all(dim=1).tolist()


def numbers_that_are_none(way: Way, phase: Phase = Phase.UPDATE) -> list[Check]:
    """`no number`: a user whose numbers overflow is answered for as any other, and moves no more than any other."""
    of = "gradients" if phase is Phase.UPDATE else "scores"
    found, draws = overflow(way.sites, of), Draws()
    more = {"metrics": {"share": 0.1, "noise_multiplier": 6.0}} if phase is Phase.METRICS else {}
    plan = way.sites.plan(1.0, **more)
    way.sites.released(way.path, plan, [[], []])  # the model has shown what it must, at its start

    def released(rows: Rows) -> Vector:
        own = way.sites.released(
            way.path, plan, [rows, found.others], draws.again(), state=found.state, phase=phase
        )[0]
        if phase is Phase.UPDATE:
            # Beside such parameters noise and sums round away, but for the parts that start at zero.
            return in_sums(own, plan)
        return torch.cat([own[name].flatten() for name in sorted(own)]).double().numpy()

    without = released(found.others)
    try:
        moved = distance(released([*found.others, found.odd]), without)
        says = f"A user whose {of} are no numbers is answered for, and moves the release by {moved:.4g}."
    except SiteRefusedError:
        moved, says = (
            math.inf,
            f"A site refuses where a user's {of} are no numbers, and answers without that user.",
        )
    return [at_most("no number", f"{way.name}, {phase}", moved, 1 + ROOM, says)]
