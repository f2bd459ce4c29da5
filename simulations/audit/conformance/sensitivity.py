"""One user more or less: paired runs under one stream of noise, which cancels, so nothing here is left to chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from client.opacus_gradients import UnvouchedLayerError, per_user_gradients
from client.self_test import check_rows_are_users
from client.training import StepSettings
from common.privacy.noise import UserSampler
from common.witness import WITNESS
from simulations.audit.conformance.checking import Vector, at_most
from simulations.audit.conformance.code import Chosen, Code, Everyone, SameAgain
from simulations.audit.conformance.subjects import LOUD, Subject, in_steps, one_step, some_users
from simulations.audit.evidence import Check

OTHERS = (0, 1, 5, 40)
"""Beside how many users the one comes and goes."""

MANY = 40
"""Beside so many, the loud one alone is tried."""

LOUDEST = 16.0
"""The loud user's gradient before clipping, in units of C."""

ROOM = 1e-3
"""For float32 parameters; the noise is drawn so much wider than stated to cover such rounding."""

ROW_ROOM = 2e-3
"""How far, in units of C, what a user adds among others may lie from what the same user adds alone."""


@dataclass
class Pairs:
    """Runs of a subject's step that share their noise."""

    subject: Subject
    code: Code
    settings: StepSettings

    def __post_init__(self) -> None:
        self._noise = SameAgain()

    def step(self, rows: Sequence[Sequence[int]], sampler: UserSampler | None = None) -> Vector:
        """What a step on these users releases, in units of C."""
        return in_steps(self.update(rows, sampler), self.settings)

    def update(self, rows: Sequence[Sequence[int]], sampler: UserSampler | None = None) -> dict[str, Tensor]:
        """The same as it leaves the trainer."""
        return self.code.trainer(
            self.subject.rewound(),
            self.subject.batch(rows),
            self.settings,
            sampler=sampler or Everyone(),
            noise=self._noise.rewind(),
        )


def sensitivity(subject: Subject, code: Code) -> list[Check]:
    """What one user more moves, by `sensitivity`, `own row`, `absent user`, `witness`; an update's `update fields`."""
    loud = float(subject.loudness([LOUD])[0])
    pairs = Pairs(subject, code, one_step(loud / LOUDEST))
    newcomers = {"loud": LOUD, "quiet": [4, 5], "long": some_users(3, subject.items, seed=5)[2]}
    nobody = pairs.step([])
    alone = {name: pairs.step([user]) - nobody for name, user in newcomers.items()}
    moved, strange = [float(np.linalg.norm(own)) for own in alone.values()], [0.0]
    for others in OTHERS[1:]:
        rows = some_users(others, subject.items)
        without = pairs.step(rows)
        for name, user in newcomers.items() if others < MANY else [("loud", LOUD)]:
            place = others // 2
            change = pairs.step([*rows[:place], user, *rows[place:]]) - without
            moved.append(float(np.linalg.norm(change)))
            strange.append(float(np.linalg.norm(change - alone[name])))
    return [
        _moved(subject, max(moved), float(np.linalg.norm(alone["loud"])), loud > 0),
        at_most(
            "own row",
            subject.name,
            max(strange),
            ROW_ROOM,
            f"Among other users, a user adds what the same user adds alone: off by {max(strange):.2g} C at most.",
        ),
        _absent(pairs),
        _witness(pairs),
        _fields(pairs),
    ]


def _moved(subject: Subject, most: float, loud: float, heard: bool) -> Check:
    says = (
        f"One user more moves a step by {most:.4f} C at most, beside {', '.join(map(str, OTHERS))} others; "
        f"the loudest user's gradient is {LOUDEST:g} C before clipping."
    )
    check = at_most("sensitivity", subject.name, most, 1 + ROOM, says)
    if heard and loud >= 1 - ROOM:
        return check
    quiet = f"The loud user moves a step by {loud:.4f} C alone, so the bound was not reached, and nothing is shown."
    return replace(check, holds=False, says=quiet)


def _absent(pairs: Pairs) -> Check:
    """A user whom the sampler left out moves nothing, and a part of the users is drawn as the sampler says."""
    rows = some_users(9, pairs.subject.items)
    mask = np.array([True, False, True, True, False, True, False, True, True])
    some = pairs.step(rows, Chosen(mask))
    more = pairs.step([*rows, LOUD], Chosen(np.append(mask, False)))
    moved = float(np.abs(more - some).max())
    same_as = pairs.step([row for row, taken in zip(rows, mask, strict=True) if taken])
    off = float(np.linalg.norm(some - same_as))
    return at_most(
        "absent user",
        pairs.subject.name,
        max(moved, off),
        ROW_ROOM,
        f"A user who was not drawn moves a step by {moved:.2g} C, and only those drawn take part.",
    )


def _witness(pairs: Pairs) -> Check:
    """The places that are there to show noise alone: no user may reach them."""
    rows = some_users(5, pairs.subject.items)
    without, with_one = pairs.update(rows), pairs.update([*rows, LOUD])
    moved = float((with_one[WITNESS] - without[WITNESS]).abs().max())
    says = f"A loud user more moves the witness by {moved:.2g}; it is there to show noise alone."
    return at_most("witness", pairs.subject.name, moved, 0.0, says)


def _fields(pairs: Pairs) -> Check:
    """An update holds each trainable parameter once, float32 on the CPU, and nothing else."""
    wanted = {name: (tuple(t.shape), torch.float32, "cpu") for name, t in pairs.subject.start.items()}
    update = pairs.update(some_users(3, pairs.subject.items))
    found = {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in update.items()}
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return Check(
        "update fields",
        pairs.subject.name,
        float(len(odd)),
        "0 fields",
        not odd,
        f"An update holds {len(found)} tensors; {', '.join(odd[:4]) or 'none'} of them unforeseen.",
    )


def rows_are_users(subject: Subject) -> list[Check]:
    """Every trainable parameter has one row a user, that user's own gradient: compared with a loop over users."""
    model = subject.rewound()
    try:
        check_rows_are_users(model)
    except UnvouchedLayerError as error:
        return [Check("rows are users", subject.name, None, f"at most {ROW_ROOM:g}", False, str(error))]
    batch = model.prepare(subject.batch([*some_users(5, subject.items), LOUD]))
    with per_user_gradients(model) as gradients:
        together = torch.cat([rows.flatten(1) for rows in gradients(batch)], dim=1)
    worst = 0.0
    parameters = [p for name, p in model.trainable().items() if name != WITNESS]
    together = together[:, : sum(p.numel() for p in parameters)]  # the witness, the last, has no gradient
    for user in range(len(batch)):
        loss = model.per_user_loss(batch.rows(torch.tensor([user], device=subject.device))).sum()
        own = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
        room = float(own.norm().clamp(min=1e-3))
        worst = max(worst, float((together[user] - own).norm()) / room)
    return [
        at_most(
            "rows are users",
            subject.name,
            worst,
            ROW_ROOM,
            f"{len(parameters)} parameters have one row a user, which is that user's gradient alone.",
        )
    ]
