"""Bounds on chance in `noise_repeats.py` hold, against brute force and draws; what repeats is found anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from common.privacy.noise import SecureGaussian
from simulations.audit.conformance.sabotages_noise import last_numbers_shuffled, second_half_negated
from simulations.audit.noise_repeats import (
    least_likeness,
    log_chance_of_products,
    most_alike_turned,
    same_numbers,
)
from simulations.audit.noise_statistics import TAILS, norms_probability, tail_limits, tail_probability

Array = npt.NDArray[np.float64]
WIDE = 1.7 * 2**20


def brute_force(draws: Array) -> float:
    """The smallest chance of all, by four loops."""
    count, numbers = draws.shape
    signs = np.where(np.abs(draws) > stats.norm.ppf(0.75), 1.0, -1.0)
    return min(
        log_chance_of_products(
            float(each[i] @ np.roll(each[j], -turn)), numbers, own=i == j, sizes=each is signs
        )
        for each in (draws, signs)
        for i in range(count)
        for j in range(i, count)
        for turn in range(numbers)
        if i != j or turn
    )


@pytest.mark.parametrize("numbers", [9, 16])
def test_every_turn_of_every_pair_is_looked_at(numbers: int) -> None:
    chance = np.random.default_rng(numbers)
    for _ in range(20):
        draws = 2.0 * chance.standard_normal((3, numbers))
        found, comparisons = most_alike_turned(draws), 2 * numbers * 6
        wanted = min(0.0, brute_force(draws) + math.log(comparisons))
        assert found.log_probability == pytest.approx(wanted, abs=1e-9)
        signs = np.where(np.abs(draws) > stats.norm.ppf(0.75), 1.0, -1.0)
        one, other = (signs if found.sizes else draws)[[found.first, found.second]]
        assert float(one @ np.roll(other, -found.turn)) / numbers == pytest.approx(found.likeness)


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("turn", [None, 1, 4, 8, 16])
def test_sums_of_products_exceed_their_bounds_no_more_often_than_they_say(
    turn: int | None, sizes: bool
) -> None:
    """At half a turn each product is there twice, which is where a bound made for independent ones would fail."""
    chance = np.random.default_rng(11)
    draws = chance.standard_normal((60_000, 32))
    others = chance.standard_normal((60_000, 32))
    if sizes:
        draws, others = np.sign(draws), np.sign(others)
    second = others if turn is None else np.roll(draws, turn, axis=1)
    sums = np.abs((draws * second).sum(axis=1))
    for least in (8.0, 12.0, 16.0, 20.0, 24.0):
        bound = math.exp(log_chance_of_products(least, 32, own=turn is not None, sizes=sizes))
        count = int((sums >= least - 1e-9).sum())
        assert stats.binomtest(count, len(sums), min(1.0, bound), alternative="greater").pvalue > 1e-6
    if turn == 16 and sizes:  # the bound of two draws would be broken here
        bound = math.exp(log_chance_of_products(24.0, 32, own=False, sizes=True))
        assert (sums >= 24.0 - 1e-9).mean() > 2 * bound


def negated_half(draws: Array) -> Array:
    return np.stack([second_half_negated(draw) for draw in draws])


def turned(draws: Array) -> Array:
    return np.concatenate([draws[:-1], np.roll(draws[:1], 5, axis=1)])


def other_signs(draws: Array) -> Array:
    signs = np.random.default_rng(12).choice((-1.0, 1.0), draws.shape[1])
    return np.concatenate([draws[:-1], np.roll(draws[:1], 77, axis=1) * signs])


def a_part_again(draws: Array) -> Array:
    """A fifth of the last draw's variance is that of the first, turned."""
    mixed = 0.8**0.5 * draws[-1] + 0.2**0.5 * np.roll(draws[0], 30)
    return np.concatenate([draws[:-1], mixed[None]])


@pytest.mark.parametrize("lie", [negated_half, turned, other_signs, a_part_again])
def test_what_repeats_at_another_place_is_found_and_honest_draws_are_not(
    lie: Callable[[Array], Array],
) -> None:
    draws = np.stack([SecureGaussian().normal(3000) for _ in range(4)])
    assert most_alike_turned(draws).log_probability > math.log(1e-6)
    assert most_alike_turned(lie(draws)).log_probability < math.log(1e-9)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sizes", [False, True])
def test_the_least_likeness_is_that_of_the_probability(own: bool, sizes: bool) -> None:
    least = least_likeness(10, 256, math.log(1e-4), own=own, sizes=sizes)
    comparisons = 2 * 256 * 55
    chance = log_chance_of_products(least * 256, 256, own=own, sizes=sizes) + math.log(comparisons)
    assert chance == pytest.approx(math.log(1e-4), abs=1e-3)


def test_one_number_is_no_error() -> None:
    assert most_alike_turned(np.ones((1, 1))).log_probability == 0.0


def in_steps(draws: Array, wide: float = WIDE) -> npt.NDArray[np.int64]:
    return np.rint(draws * wide).astype(np.int64)


def test_numbers_that_come_again_by_chance_are_as_many_as_it_has() -> None:
    """On a coarse grid, where most come again: p-values are never smaller than they say, and not idle."""
    chance = np.random.default_rng(13)
    found = np.array(
        [same_numbers(in_steps(chance.standard_normal((3, 400)), 3e3), 3e3)[1] for _ in range(400)]
    )
    for level in (0.01, 0.05, 0.2):
        count = int((found < level).sum())
        assert stats.binomtest(count, len(found), level, alternative="greater").pvalue > 1e-4
    assert (found < 0.5).any()


def test_numbers_of_a_draw_that_come_again_in_another_order_are_found() -> None:
    draws = [SecureGaussian().normal(20_000) for _ in range(3)]
    assert same_numbers(in_steps(np.stack(draws)), WIDE)[1] > 1e-6
    change = last_numbers_shuffled()
    assert same_numbers(in_steps(np.stack([change(draw) for draw in draws])), WIDE)[1] < 1e-12
    assert same_numbers(in_steps(negated_half(np.stack(draws))), WIDE)[1] < 1e-12


def test_shares_in_the_tails_are_binomial_and_limits_fit_them() -> None:
    for beyond in TAILS:
        low, high = tail_limits(1_000_000, beyond, 1e-3)
        for share, holds in ((low, True), (high, True), (low - 1e-6, False), (high + 1e-6, False)):
            if share < 0:
                continue
            z = np.zeros(1_000_000)
            z[: round(share * len(z))] = beyond + 1e-9
            assert (tail_probability(z, beyond)[1] >= 1e-3) is holds, (beyond, share)
    chance = np.random.default_rng(14)
    refused = sum(tail_probability(chance.standard_normal(20_000), 3.0)[1] < 0.1 for _ in range(500))
    assert stats.binomtest(refused, 500, 0.1, alternative="greater").pvalue > 1e-4


@pytest.mark.parametrize("cut", [3.0, 3.5, 4.0, 4.5])
def test_tails_that_end_are_seen_in_as_many_numbers_as_conformance_draws(cut: float) -> None:
    z = SecureGaussian().normal(2_500_000)
    assert min(tail_probability(z, beyond)[1] for beyond in TAILS) > 1e-6 / len(TAILS)
    ended = z[np.abs(z) <= cut]
    again = SecureGaussian().normal(len(z) - len(ended)).clip(-cut, cut)
    p = min(tail_probability(np.concatenate([ended, again]), beyond)[1] for beyond in TAILS)
    assert p < 1e-6 / len(TAILS)


def test_sizes_of_draws_are_spread_as_chance_spreads_them_or_are_told_to_be_otherwise() -> None:
    chance = np.random.default_rng(15)
    draws = chance.standard_normal((400, 50))
    assert norms_probability(draws)[1] > 1e-6
    large = np.square(draws).sum(axis=1) > 50
    draws[large] = chance.standard_normal((int(large.sum()), 50))
    assert norms_probability(draws)[1] < 1e-6
