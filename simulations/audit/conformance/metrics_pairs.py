"""One user more or less in metrics, at widths and parameters where rounding is large enough to turn others' ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.policy import Performance
from simulations.audit.conformance.checking import at_most
from simulations.audit.conformance.code import Code, SameAgain
from simulations.audit.conformance.sensitivity import ROOM
from simulations.audit.conformance.subjects import Subject, some_users
from simulations.audit.conformance.sums import a_plan, histories_of
from simulations.audit.evidence import Check

UNIT = Performance().micro_batch
OTHERS = (8, 16, 64, UNIT)
"""Beside how many users the one comes and goes: where kernels were seen to change, and where a unit is full."""

WIDE: dict[str, Any] = {"core": "gru", "hidden_width": 384, "width": 16}
"""A model whose rounding was seen to turn ranks where the number of rows followed that of users."""

OFF = (1.0, 3.0, 10.0)
"""How far parameters lie off their start, in standard deviations of 1: the server's choice."""


def metrics_sensitivity(subject: Subject, code: Code, offs: Sequence[float] = OFF) -> list[Check]:
    """`sum sensitivity` of metrics, in the units that a site ranks its users in.

    Args:
        subject: of such a width.
    """
    moved = [each for off in offs for each in _moved(subject, code, off)]
    says = (
        f"One user more moves the metrics of a model as wide as runs have them by {max(moved):.4f} at most, beside "
        f"{', '.join(map(str, OTHERS))} others, at parameters off by {', '.join(f'{off:g}' for off in offs)}."
    )
    found = at_most("sum sensitivity", f"metrics, {subject.name}", max(moved), 1 + ROOM, says)
    return [
        found if min(moved) > 0.5 else Check(found.name, found.subject, min(moved), found.bound, False, says)
    ]


def _moved(subject: Subject, code: Code, off: float) -> list[float]:
    plan, noise, users = a_plan(), SameAgain(), some_users(max(OTHERS) + 1, subject.items)
    generator = torch.Generator().manual_seed(round(off))
    subject.model.load_trainable(
        {
            name: start + off * torch.randn(start.shape, generator=generator).to(subject.device)
            for name, start in subject.start.items()
        }
    )

    def released(count: int) -> Tensor:
        histories, last = histories_of(users[:count]).without_last(1)
        found = code.metrics(subject.model, histories, last[:, 0].astype(np.int64), plan, noise.rewind())
        return torch.cat([found[name].flatten() for name in sorted(found)]).double()

    return [float((released(others + 1) - released(others)).norm()) for others in OTHERS]
