"""How a question becomes a `Check`: statistics are held against one level, and code that breaks off does not hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from simulations.audit.evidence import Check

LEVEL = 1e-6
"""How often a statistical check refuses honest code, all its comparisons together (Bonferroni)."""

ANSWER = "an answer"
"""The bound of a check that got none, as the code broke off."""

Vector = npt.NDArray[np.float64]


def attempted(name: str, subject: str, ask: Callable[[], Sequence[Check]]) -> list[Check]:
    """The checks, or one that does not hold where the code breaks off: with made-up users, errors may be shown."""
    try:
        return list(ask())
    except Exception as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        said = f"breaks off on made-up users: {type(error).__name__}: {first}"
        return [Check(name, subject, None, ANSWER, False, said)]


def at_most(name: str, subject: str, measured: float, bound: float, says: str) -> Check:
    """Holds where the figure keeps the bound; a figure that is no number does not."""
    figure = measured if math.isfinite(measured) else None
    return Check(name, subject, figure, f"at most {bound:g}", bool(measured <= bound), says)


def statistical(name: str, subject: str, measured: float, p: float, claim: str, says: str) -> Check:
    """Holds where the p-value, corrected for all comparisons in it, is not below LEVEL.

    Args:
        claim: what the figure should be, in words.
    """
    return Check(
        name, subject, measured, f"{claim} (p {p:.2g}, refused below {LEVEL:g})", bool(p >= LEVEL), says
    )


def corrected(p_values: Sequence[float]) -> float:
    """Bonferroni's p-value of several."""
    return min(1.0, len(p_values) * min(p_values))
