"""Questions of `fedtide audit noise` on how numbers were drawn: tails, repetition, draws left out, grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from common.privacy.noise import GRID_BITS
from simulations.audit import noise_statistics as test
from simulations.audit.evidence import Check
from simulations.audit.noise_repeats import least_likeness, most_alike_turned
from simulations.audit.witnesses import Release


def how_drawn(sites: Mapping[str, Sequence[Release]], share: float) -> list[Check]:
    """`tails`, `places`, `sizes` and `grid`.

    Args:
        share: of false alarms, of each of the first three; the last never alarms falsely.
    """
    everything = [each for own in sites.values() for each in own]
    checks = [
        _tails(site, own, share / (2 * len(sites) if len(sites) > 1 else 1)) for site, own in sites.items()
    ]
    if len(sites) > 1:
        checks.append(_tails("all sites", everything, share / 2))
    return [*checks, _places(everything, share), _sizes(everything, share), *_grid(everything)]


def _tails(subject: str, own: Sequence[Release], probability: float) -> Check:
    z, each = np.concatenate([release.z for release in own]), probability / len(test.TAILS)
    found = {beyond: test.tail_probability(z, beyond) for beyond in test.TAILS}
    odd = [beyond for beyond in test.TAILS if found[beyond][1] < each]
    worst = min(test.TAILS, key=lambda beyond: found[beyond][1])
    counted = round(found[worst][0] * z.size)
    expected = 2 * float(stats.norm.sf(worst)) * z.size
    low, high = test.tail_limits(z.size, worst, each)
    said = (
        f"{counted} of {z.size} numbers lie beyond {worst:g} deviations, {expected:.1f} should: the noise's tails are "
        f"{'cut or thin' if counted < expected else 'too heavy'}"
        if odd
        else f"as many of {z.size} numbers lie far out as normal noise has"
    )
    bound = f"{round(low * z.size)} to {round(high * z.size)} beyond {worst:g} deviations"
    return Check("tails", subject, float(counted), bound, not odd, said)


def _places(everything: Sequence[Release], probability: float) -> Check:
    """Each release with each and with itself, at every turn of the witness: numbers, and their sizes."""
    z = np.stack([each.z for each in everything])
    worst = most_alike_turned(z)
    holds = worst.log_probability >= math.log(probability)
    first, second = everything[worst.first], everything[worst.second]
    others = "itself" if worst.first == worst.second else f"{second.site}, round {second.round}"
    said = (
        "no release repeats another, or itself, at other places"
        if holds
        else f"{first.site}, round {first.round} and {others}, turned by {worst.turn} places, have noise in common "
        f"({'sizes correlate by' if worst.sizes else 'correlation'} {worst.likeness:+.2f})"
    )
    own, log_level = worst.first == worst.second, math.log(probability)
    limit = least_likeness(len(z), z.shape[1], log_level, own=own, sizes=worst.sizes)
    bound = f"at most {limit:.3f}{' of itself' if own else ''}{', in sizes' if worst.sizes else ''}"
    return Check("places", "all releases", abs(worst.likeness), bound, holds, said)


def _sizes(everything: Sequence[Release], probability: float) -> Check:
    """Were draws thrown away for being large? Then sums of squares are spread otherwise than by chance."""
    distance, found = test.norms_probability([each.z for each in everything])
    said = (
        "the sizes of releases' noise are spread as chance spreads them"
        if found >= probability
        else "the sizes of releases' noise are not spread as chance spreads them: draws were left out, or the level is "
        "another"
    )
    bound = f"at most {test.shape_limit(len(everything), probability):.3f}"
    return Check("sizes", "all releases", distance, bound, found >= probability, said)


def _grid(everything: Sequence[Release]) -> list[Check]:
    """Of sums alone: what an update's steps add up to is rounded by its parameters, and on no grid."""
    asked = [each for each in everything if each.off_grid is not None]
    if not asked:
        return []
    odd = [f"{each.site} in round {each.round}" for each in asked if each.off_grid]
    said = (
        f"numbers between steps of the grid: {', '.join(odd[:3])}{f' and {len(odd) - 3} more' if odd[3:] else ''}; the "
        "noise was added in other arithmetic, whose rounding may tell of what it was added to"
        if odd
        else f"each number of {len(asked)} sums' witnesses is a whole step of the grid of 2^-{GRID_BITS}"
    )
    off = sum(each.off_grid or 0 for each in asked)
    return [Check("grid", "all sums", float(off), "0 numbers", not odd, said)]
