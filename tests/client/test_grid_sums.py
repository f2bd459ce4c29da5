"""Sums in whole steps of the noise's grid: what a user adds is that user's own to the last bit, and at most C."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from client import bookkeeping, grid_sums
from client.bookkeeping import _gram_of, _OnGrid
from client.grid_sums import grid_step, product_rounding, sum_on_grid
from common.privacy.noise import GRID_BITS

CLIP = 0.7
PLACES, INPUTS, OUTPUTS = 8, 90, 70


def made_up(users: int, seed: int = 0, places: int = PLACES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(users, places, INPUTS, generator=generator)
    return a, torch.randn(users, places, OUTPUTS, generator=generator)


def factors_of(a: Tensor, g: Tensor, clip_norm: float = CLIP) -> Tensor:
    """[users] float64, as a step finds them."""
    everyone = slice(0, len(a))
    norms = _OnGrid(a, g, clip_norm).squared_norms(everyone, partial(_gram_of, everyone)).sqrt()
    return torch.where(norms.isfinite(), (clip_norm / norms).clamp(max=1.0), 0.0)


def summed(a: Tensor, g: Tensor, clip_norm: float = CLIP, factors: Tensor | None = None) -> Tensor:
    total = torch.zeros(g.shape[2], a.shape[2], dtype=torch.float64)
    sum_on_grid(total, a, g, factors_of(a, g, clip_norm) if factors is None else factors, clip_norm)
    return total


def in_float32(a: Tensor, g: Tensor, clip_norm: float = CLIP) -> Tensor:
    """What must not be used: one long float32 sum."""
    scaled = g * factors_of(a, g, clip_norm).float().view(-1, 1, 1)
    return (scaled.flatten(0, 1).T @ a.flatten(0, 1)).double()


def test_a_sum_is_that_of_the_users_products_rounded_one_by_one() -> None:
    a, g = made_up(40)
    steps = summed(a, g) / grid_step(CLIP)
    assert float((steps - steps.round()).abs().max()) < 1e-6
    each = torch.einsum("upo,upi->uoi", g.double() * factors_of(a, g).view(-1, 1, 1), a.double())
    wanted = (each / grid_step(CLIP)).round().sum(dim=0)
    assert float((steps.round() - wanted).abs().max()) <= 3  # a product near a half falls to either side
    assert float((steps.round() - wanted).abs().mean()) < 0.5


def moves(way: Callable[[Tensor, Tensor], Tensor]) -> set[bytes]:
    """In how many ways one user's part comes out, over others and places among them, in 2^-40 of C."""
    own_a, own_g = made_up(1, seed=5)
    found = set()
    for others in (0, 1, 7, 30):
        a, g = made_up(others)
        for place in {0, others // 2, others}:
            with_a, with_g = (
                torch.cat([each[:place], own, each[place:]]) for each, own in ((a, own_a), (g, own_g))
            )
            change = (way(with_a, with_g) - way(a, g)) / CLIP
            found.add((change * 2.0**40).round().numpy().tobytes())
    return found


def test_what_a_user_adds_is_the_same_to_the_last_bit_beside_whomever() -> None:
    assert len(moves(summed)) == 1
    assert len(moves(in_float32)) > 1  # so it would be seen


@pytest.mark.parametrize("users", [1, 1024, 1025, 2500])
def test_any_number_of_users_may_be_added_up(users: int) -> None:
    a, g = made_up(1, places=2)
    one = summed(a, g)
    assert float(one.norm()) == pytest.approx(CLIP, rel=1e-4)
    largest = torch.zeros_like(one)
    largest[0, 0] = 2.0**GRID_BITS  # all of C in one coordinate, as often as it can be
    torch.testing.assert_close(
        summed(a.expand(users, -1, -1), g.expand(users, -1, -1)), users * one, rtol=1e-12, atol=0
    )
    a, g = torch.zeros_like(a), torch.zeros_like(g)
    a[0, 0, 0], g[0, 0, 0] = 1.0, 2.0
    found = summed(a.expand(users, -1, -1), g.expand(users, -1, -1))
    torch.testing.assert_close(found / grid_step(CLIP), users * largest, rtol=1e-4, atol=0)
    assert float(found[0, 0]) <= users * CLIP


def test_nobody_and_those_left_out_add_nothing() -> None:
    a, g = made_up(3)
    assert float(summed(a[:0], g[:0]).abs().max()) == 0
    only = torch.tensor([0.0, 1e-3, 0.0], dtype=torch.float64)
    spoilt = torch.where(only.view(-1, 1, 1) > 0, a, torch.nan)
    assert torch.equal(summed(spoilt, g, factors=only), summed(a[1:2], g[1:2], factors=only[1:2]))


def norms_of(a: Tensor, g: Tensor) -> Tensor:
    everyone = slice(0, len(a))
    return _OnGrid(a, g, CLIP).squared_norms(everyone, partial(_gram_of, everyone)).sqrt()


@pytest.mark.parametrize("single", [0, 2**30], ids=["float64", "float32"])
@pytest.mark.parametrize("places", [1, 32, 300])
def test_a_norm_is_never_below_that_of_the_float32_product(
    places: int, single: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where places cancel, and the product is rounding alone."""
    monkeypatch.setattr(bookkeeping, "_SINGLE", single)
    for cancels in (0.0, 1.0, 1 - 1e-4, 1 - 1e-6):
        a, g = made_up(20, places=2 * places)
        a[:, places:], g[:, places:] = a[:, :places], -cancels * g[:, :places]
        norms = norms_of(a, g)
        made = torch.stack([own_g.T @ own_a for own_a, own_g in zip(a, g, strict=True)]).double()
        assert bool((made.flatten(1).norm(dim=1) <= norms * (1 + 1e-9)).all())
        if cancels == 0.0:
            most = 1 + (2.0**-25 * (INPUTS + OUTPUTS + 8) * 2 * places if single else 0) + 1e-3
            assert bool((norms <= made.flatten(1).norm(dim=1) * most).all())


def test_in_float32_a_norm_without_room_would_be_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of positive numbers, whose float32 products round down or up as they come."""
    generator = torch.Generator().manual_seed(3)
    a, g = torch.rand(200, 1, 900, generator=generator), torch.rand(200, 1, 380, generator=generator)
    exact = a.double().norm(dim=2) * g.double().norm(dim=2)
    assert bool((norms_of(a, g) >= exact[:, 0]).all())
    monkeypatch.setattr(bookkeeping, "_single_rounding", lambda *_: 0.0)
    monkeypatch.setattr(bookkeeping, "product_rounding", lambda *_: 0.0)
    assert not bool((norms_of(a, g) >= exact[:, 0]).all())


def test_the_room_for_a_product_is_more_than_float32_takes() -> None:
    """Products of positive numbers, where each addition rounds by as much as it can, against float64."""
    for places in (3, 30, 1000):
        chance = np.random.default_rng(places)
        a, g = (chance.random((places, 200), dtype=np.float32) + np.float32(0.5) for _ in range(2))
        exact = g.astype(np.float64).T @ a.astype(np.float64)
        off = float(np.linalg.norm(g.T @ a - exact))
        sizes = float((np.linalg.norm(a, axis=1) * np.linalg.norm(g, axis=1)).sum())
        assert 0 < off <= product_rounding(places) * sizes


BIG, SMALL = 1e37, 1e-37
SIZES = [
    (1.0, 1e36),
    (1e36, 1.0),
    (1e36, SMALL),
    (SMALL, 1e36),
    (BIG, BIG),
    (SMALL, SMALL),
    (1e-24, 1e17),
    (1e17, 1e-24),
]


def change_by_one_of_size(of_a: float, of_g: float, clip_norm: float) -> float:
    """How far a user, in clip norms, moves a sum, whose a and g are so many times what others' are."""
    a, g = made_up(5)
    others = [0, 1, 3, 4]
    without = summed(a[others], g[others], clip_norm)
    a[2] *= of_a
    g[2] *= of_g
    return float((summed(a, g, clip_norm) - without).norm()) / clip_norm


@pytest.mark.parametrize("single", [0, 2**16], ids=["float64", "float32"])
@pytest.mark.parametrize(("of_a", "of_g"), SIZES)
@pytest.mark.filterwarnings("error")
def test_a_user_of_any_size_adds_no_more_than_c_and_leaves_others_alone(
    of_a: float, of_g: float, single: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bookkeeping, "_SINGLE", single)
    for clip_norm in (CLIP, 1e-9):
        assert change_by_one_of_size(of_a, of_g, clip_norm) <= 1 + 1e-4


def test_a_user_whose_squares_are_no_float32_is_clipped_as_others_are() -> None:
    assert change_by_one_of_size(1.0, 1e20, CLIP) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "sizes", "single", "clip_norm"),
    [("REACH", float("inf"), (SMALL, 1e36), 0, CLIP), ("_FLOOR", 0.0, (1e-23, 1e14), 2**16, 1e-9)],
)
def test_sizes_out_of_reach_would_spoil_a_sum(
    name: str,
    value: float,
    sizes: tuple[float, float],
    single: int,
    clip_norm: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Squares that are zero in float32, say, of numbers that are not: a norm of nothing."""
    monkeypatch.setattr(bookkeeping, "_SINGLE", single)
    assert change_by_one_of_size(*sizes, clip_norm) <= 1 + 1e-4
    monkeypatch.setattr(bookkeeping, name, value)
    with pytest.raises((RuntimeError, AssertionError)):
        assert change_by_one_of_size(*sizes, clip_norm) <= 1 + 1e-4


def test_a_sum_beyond_what_clipped_users_make_is_refused() -> None:
    a, g = made_up(3)
    with pytest.raises(RuntimeError, match="larger than its users' clipped gradients"):
        summed(a, g, factors=40 * factors_of(a, g))


def test_without_rounding_one_by_one_what_a_user_adds_would_depend_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were the constant smaller, numbers would keep places below the grid, and their bits would be no whole steps."""
    smaller = np.float32(1.5 * 2**20)
    monkeypatch.setattr(grid_sums, "_ROUNDS", smaller)
    monkeypatch.setattr(grid_sums, "_BITS", int(smaller.view(np.int32)))
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_sum_is_that_of_the_users_products_rounded_one_by_one()
