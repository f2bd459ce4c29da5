"""Whether draws of noise repeat themselves or each other: at other places, with other signs, or in any order.

`most_alike_turned` is asked of draws that may be alike in part, at any distance; `same_numbers` of draws on a grid,
whose numbers come again in whatever order. Both give a bound on the chance of what was found in independent noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, stats

from simulations.audit.noise_statistics import Array

_BLOCKS = 8
"""Parts of a draw, each of which is compared with all that came before."""

_WIDEST = 9.5
"""Standard deviations beyond which numbers are not compared: the generator has none there."""


@dataclass(frozen=True, slots=True)
class Turned:
    """The most alike of draws, each against each and itself at every turn of their places.

    Attributes:
        first, second, turn: which two, and by how many places the second is turned.
        likeness: their correlation, or that of the sizes of their numbers.
        sizes: whether it is that of sizes alone, whatever the signs.
        log_probability: logarithm of a bound on the chance of it in independent noise, all comparisons together.
    """

    first: int
    second: int
    turn: int
    likeness: float
    sizes: bool
    log_probability: float


def most_alike_turned(draws: Array) -> Turned:
    """The places that repeat others most, within a draw and between two, at whatever distance.

    Numbers against numbers shows what repeats, or repeats negated; whether they are larger than half of all are, or
    smaller, against the same, shows what repeats with other signs.

    Args:
        draws: [draws, numbers], standard normals as is claimed.
    """
    count, numbers = draws.shape
    large = np.where(np.abs(draws) > stats.norm.ppf(0.75), 1.0, -1.0)
    spectra = [fft.rfft(each, axis=1) for each in (draws, large)]
    worst = Turned(0, 0, 0, 0.0, False, 0.0)
    for first in range(count):
        for sizes, spectrum in zip((False, True), spectra, strict=True):
            # [draws from the first on, turns] sums of products
            products = fft.irfft(spectrum[first].conj() * spectrum[first:], n=numbers, axis=1)
            products[0, 0] = 0.0  # of a draw with itself as it is
            turns = np.abs(products).argmax(axis=1)
            found = np.take_along_axis(products, turns[:, None], axis=1)[:, 0]
            others = 1 + int(np.abs(found[1:]).argmax()) if len(found) > 1 else 0
            for place in {0, others}:
                log_chance = log_chance_of_products(float(found[place]), numbers, own=place == 0, sizes=sizes)
                if log_chance < worst.log_probability:
                    likeness = float(found[place]) / numbers
                    worst = Turned(first, first + place, int(turns[place]), likeness, sizes, log_chance)
    return Turned(
        worst.first,
        worst.second,
        worst.turn,
        worst.likeness,
        worst.sizes,
        min(0.0, worst.log_probability + math.log(comparisons_of(count, numbers))),
    )


def comparisons_of(count: int, numbers: int) -> float:
    """How many sums of products `most_alike_turned` looks at."""
    return 2.0 * numbers * (count * (count + 1) / 2)


def least_likeness(
    count: int, numbers: int, log_probability: float, *, own: bool = False, sizes: bool = False
) -> float:
    """The likeness from which on one of so many draws is said, with this probability, to be like another.

    Args:
        own, sizes: as for `log_chance_of_products`.
    """
    wanted = log_probability - math.log(comparisons_of(count, numbers))
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        chance = log_chance_of_products(middle * numbers, numbers, own=own, sizes=sizes)
        low, high = (middle, high) if chance > wanted else (low, middle)
    return high


def log_chance_of_products(products: float, count: int, *, own: bool, sizes: bool) -> float:
    """Logarithm of a bound on the chance of so large a sum of products (of either sign) in independent noise.

    Chernoff's bound at its best exponent, from bounds of E exp(s sum) for n products:

    - of two draws of normals: (1 - s^2)^(-n/2), exact;
    - of a draw of normals with itself turned: a quadratic form whose eigenvalues are cosines with sum 0 and sum of
      squares n/2, or n at half a turn, so (1 - 4 s^2)^(-n/4), reached at half a turn;
    - of signs of two draws: exp(n s^2 / 2) (Hoeffding 1963);
    - of signs of a draw with itself turned: rings of m products, each cosh(s)^m + sinh(s)^m, so exp(n s^2), reached
      in the limit at half a turn, where each product is there twice.

    Args:
        products: their sum.
        count: n.
        own: whether the draw is compared with itself.
        sizes: whether signs take the place of normals.
    """
    t, n = abs(products), float(count)
    if t == 0.0:
        return 0.0
    if sizes:
        bound = -t * t / ((4 if own else 2) * n)
    elif own:
        s = (-2 * n + math.sqrt(4 * n * n + 16 * t * t)) / (8 * t)
        bound = -s * t - n / 4 * math.log1p(-4 * s * s)
    else:
        s = (-n + math.sqrt(n * n + 4 * t * t)) / (2 * t)
        bound = -s * t - n / 2 * math.log1p(-s * s)
    return min(0.0, math.log(2) + bound)


def same_numbers(steps: npt.NDArray[np.int64], wide: float) -> tuple[float, float]:
    """Whether numbers of earlier draws, or of the same, come again more often than chance has it, with either sign.

    Draws are cut into blocks. Given all that came before, each number of a block is one of those that were there
    (up to its sign) with a probability that is known, independently, so their number is binomial, exactly.

    Args:
        steps: [draws, numbers] noise in whole steps of the grid.
        wide: its claimed standard deviation, in steps; so many that the density hardly changes from one to the next.

    Returns:
        The largest share of a block's numbers that came again beyond what chance has, and the p-value of all blocks.
    """
    sizes = np.abs(steps)
    seen = np.zeros(int(_WIDEST * wide) + 1, dtype=np.bool_)
    mass, excess, worst, asked = 0.0, 0.0, 1.0, 0
    for block in (part for draw in sizes for part in np.array_split(draw, min(_BLOCKS, len(draw)))):
        inside = block[block < len(seen)]
        again = int(seen[inside].sum())
        if mass > 0:
            asked += 1
            worst = min(worst, float(stats.binom.sf(again - 1, len(block), min(1.0, mass))))
            excess = max(excess, again / len(block) - mass)
        new = np.unique(inside[~seen[inside]])
        seen[new] = True
        density = np.exp(-np.square(new / wide) / 2) * (math.sqrt(2 / math.pi) / wide)
        mass += float(np.where(new == 0, density / 2, density).sum())
    return excess, min(1.0, asked * worst)
