"""Is the noise normal out to its tails, on its grid, and nowhere a repetition? Seen in what a site with nobody in it
releases: noise alone, in settings in which float32 holds each whole step of the grid exactly."""

from __future__ import annotations

import math

import numpy as np
import torch

from common.phases import Phase
from common.privacy.noise import GRID_BITS, INFLATION
from common.sums import CONTRIBUTION_NORM, POPULARITY, TRANSITIONS
from common.wire import Request
from common.witness import witness_name
from simulations.audit.conformance.checking import LEVEL, Vector, corrected, statistical
from simulations.audit.conformance.code import Code, Everyone
from simulations.audit.conformance.noise import SIGMA
from simulations.audit.conformance.subjects import WITNESS_PLACES, Subject, one_step
from simulations.audit.conformance.sums import a_plan, histories_of
from simulations.audit.evidence import Check
from simulations.audit.noise_repeats import most_alike_turned, same_numbers
from simulations.audit.noise_statistics import TAILS, norms_probability, tail_limits, tail_probability

CLIP = 0.5
"""A power of two, as all else that a released number is multiplied by."""

ITEMS, RELEASES = 800, 8
"""Among so many items transitions are counted, so often: 2.6 million numbers."""

TURNED = 3
"""Draws of so many numbers that are compared at every turn."""

DRAWS = 400
"""Rounds of a small model, of which the sizes of draws are compared."""


def shape_of_steps(subject: Subject, code: Code, rounds: int) -> list[Check]:
    """`grid`, `tails`, `other places` and `same numbers`, of one step of training in each of so many rounds."""
    return _checks(subject.name, _of_training(subject, code, rounds), SIGMA, rounds)


def shape_of_sums(code: Code) -> list[Check]:
    """The same of transitions among hundreds of items: millions of numbers."""
    plan = a_plan()
    sigma = plan.statistics.transition_noise_multiplier
    assert sigma is not None
    asked = plan.statistics.model_copy(update={"top_items": ITEMS})
    request = Request(
        run="conformance",
        round=1,
        attempt=1,
        nonce="ab" * 16,
        plan="",
        state={},
        phase=Phase.TRANSITIONS,
        released={POPULARITY: torch.arange(ITEMS, 0, -1, dtype=torch.float32)},
    )
    found = []
    for _ in range(RELEASES):
        released = code.statistics(histories_of([]), ITEMS, asked, request, code.noise(), WITNESS_PLACES)
        both = [released[name].double() for name in (TRANSITIONS, witness_name(TRANSITIONS))]
        found.append((torch.cat(both) / math.ldexp(CONTRIBUTION_NORM, -GRID_BITS)).numpy())
    return _checks(f"transitions of {ITEMS} items", np.stack(found), sigma, TURNED)


def draw_sizes(subject: Subject, code: Code) -> list[Check]:
    """`sizes of draws`: is no draw thrown away for being large, or small?"""
    found = _of_training(subject, code, DRAWS) / _steps_wide(SIGMA)
    distance, p = norms_probability(found)
    says = f"The sizes of {DRAWS} draws lie {distance:.3f} from what chance makes them."
    return [statistical("sizes of draws", subject.name, distance, p, "0: as chance makes them", says)]


def _of_training(subject: Subject, code: Code, rounds: int) -> Vector:
    """[rounds, coordinates] the noise of one step, in steps of the grid: parameters start at zero."""
    settings = one_step(CLIP, noise_multiplier=SIGMA, normaliser=1.0, learning_rate=1.0)
    zero = {name: torch.zeros_like(each) for name, each in subject.start.items()}
    found = []
    for _ in range(rounds):
        subject.model.load_trainable(zero)
        update = code.trainer(
            subject.model, subject.batch([]), settings, sampler=Everyone(), noise=code.noise()
        )
        whole = torch.cat([update[name].flatten() for name in subject.start]).double().cpu()
        found.append((whole / math.ldexp(CLIP, -GRID_BITS)).numpy())
    return np.stack(found)


def _steps_wide(sigma: float) -> float:
    """Steps of the grid in a standard deviation."""
    return math.ldexp(sigma * (1 + INFLATION), GRID_BITS)


def _checks(subject: str, steps: Vector, sigma: float, turned: int) -> list[Check]:
    wide = _steps_wide(sigma)
    return [
        _grid(subject, steps),
        _tails(subject, steps / wide),
        _other_places(subject, steps[:turned] / wide),
        _same_numbers(subject, steps, wide),
    ]


def _grid(subject: str, steps: Vector) -> Check:
    """Noise beside the grid would be noise in another arithmetic, whose rounding tells of what it was added to."""
    off = int((steps != np.rint(steps)).sum())
    says = f"{off} of {steps.size} numbers of noise lie between steps of the grid of 2^-{GRID_BITS} C."
    return Check("grid", subject, float(off), "0 numbers", off == 0 and bool(steps.any()), says)


def _tails(subject: str, found: Vector) -> Check:
    """Are there as many numbers beyond 3 to 4.5 deviations as a normal distribution has?"""
    shares = {beyond: tail_probability(found, beyond) for beyond in TAILS}
    worst = min(TAILS, key=lambda beyond: shares[beyond][1])
    claim = math.erfc(worst / math.sqrt(2))
    refused = []
    for beyond in TAILS:
        chance = math.erfc(beyond / math.sqrt(2))
        low = tail_limits(found.size, beyond, LEVEL / len(TAILS))[0] / chance
        refused.append(f"{100 * (1 - low):.0f} % beyond {beyond:g}" if low > 0 else "")
    says = (
        f"Of {found.size} numbers a share of {shares[worst][0]:.3g} lies beyond {worst:g} deviations, {claim:.3g} "
        f"should. Refused would be where more is missing than {', '.join(filter(None, refused))}."
    )
    p = corrected([chance for _, chance in shares.values()])
    return statistical(
        "tails", subject, shares[worst][0], p, f"{claim:.2g} beyond {worst:g} deviations", says
    )


def _other_places(subject: str, found: Vector) -> Check:
    """Does a draw repeat itself, or another one, at other places, turned or negated, or in sizes alone?"""
    worst = most_alike_turned(found)
    says = (
        f"Draws {worst.first} and {worst.second}, one turned by {worst.turn} of {found.shape[1]} places, are alike by "
        f"{worst.likeness:+.3f}{' in sizes' if worst.sizes else ''}: none of {len(found)} are more, at any turn."
    )
    p = math.exp(worst.log_probability)
    return statistical("other places", subject, worst.likeness, p, "0: unlike at every distance", says)


def _same_numbers(subject: str, steps: Vector, wide: float) -> Check:
    """Does a draw hold numbers of an earlier one, or of its own, in whatever order and with either sign?"""
    excess, p = same_numbers(np.rint(steps).astype(np.int64), wide)
    says = f"Of an eighth of a draw, {100 * max(0.0, excess):.2f} % at most were there before, beyond what chance has."
    return statistical("same numbers", subject, excess, p, "no more than chance has", says)
