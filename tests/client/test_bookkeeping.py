"""The forms that a user's gradient of one weight may have in a step: norms, sums, and what others can do to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from client.bookkeeping import _Factored, _Gradients, _gram_of, _held, _is_small, _OnGrid
from common.privacy.noise import GRID_BITS
from tests.client.training_cases import CLIP

SIZES = [(1, 7, 9), (3, 50, 40), (60, 5, 4), (20, 4, 30)]
"""Places, inputs, outputs."""


Form = Callable[[Tensor, Tensor], _Factored | _Gradients]


def in_form(form: type[_Factored] | type[_Gradients], clip_norm: float = 1.0) -> Form:
    return lambda a, g: form(a, g, clip_norm)


FORMS = [in_form(_Factored), in_form(_Gradients), in_form(_OnGrid)]
NAMES = ["factored", "gradients", "on-grid"]


def squared_norms_of(held: _Factored | _Gradients, users: slice) -> Tensor:
    return held.squared_norms(users, partial(_gram_of, users))


def sum_of(held: _Factored | _Gradients, factors: Tensor, sizes: tuple[int, int]) -> Tensor:
    """The weighted sum [outputs, inputs]."""
    total = torch.zeros(*sizes, dtype=torch.float64)
    held.sum_into(total, factors)
    return total


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("at_once", [2, 32])
@pytest.mark.parametrize(("form", "room"), [(_Factored, 1e-7), (_Gradients, 2e-6), (_OnGrid, 2e-4)])
def test_norms_and_sums_are_the_same_in_all_forms(
    form: type[_Factored] | type[_Gradients],
    room: float,
    sizes: tuple[int, int, int],
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("client.grid_sums._AT_ONCE", at_once)
    places, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, places, inputs, generator=generator)
    g = torch.randn(5, places, outputs, generator=generator)
    rows = torch.einsum("upo,upi->uoi", g.double(), a.double())
    factors = torch.tensor([0.5, 0.0, 1.0, 2.0, 0.1], dtype=torch.float64)
    held = form(a, g, 256.0)
    wanted = rows.flatten(1).square().sum(dim=1)
    for users in (slice(0, 5), slice(3, 5)):
        torch.testing.assert_close(squared_norms_of(held, users), wanted[users], rtol=room, atol=0)
    summed = torch.einsum("u,uoi->oi", factors, rows)
    found = sum_of(held, factors, (outputs, inputs))
    grid = 256.0 * 2.0**-GRID_BITS * summed.numel() ** 0.5 * len(factors)
    assert float((found - summed).norm()) <= room * float(summed.norm()) + grid


def test_each_form_is_taken_somewhere() -> None:
    taken = [_is_small(torch.zeros(1, places, i), torch.zeros(1, places, o)) for places, i, o in SIZES]
    assert taken == [False, False, True, True]
    for places, inputs, outputs in SIZES:
        on_device = (torch.zeros(1, places, size, device="meta") for size in (inputs, outputs))
        assert type(_held(*on_device, CLIP)) is _Factored


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_a_user_whose_places_cancel_still_adds_no_more_than_c(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two places are large and each other's opposite: a Gram sum sees nothing of the third in their rounding."""
    generator = torch.Generator().manual_seed(0)
    a, g = torch.randn(50, 3, 30, generator=generator), torch.randn(50, 3, 40, generator=generator)
    a[:, 1], g[:, 0] = a[:, 0], 1e12 * g[:, 0]
    g[:, 1] = -g[:, 0]

    def most() -> float:
        """What the user who adds the most adds, in clip norms."""
        held = form(a, g)
        factors = (1 / squared_norms_of(held, slice(0, 50)).sqrt()).clamp(max=1.0)
        each = [torch.where(torch.arange(50) == user, factors, 0.0) for user in range(50)]
        return max(float(sum_of(held, f, (40, 30)).norm()) for f in each)

    assert most() <= 1 + 1e-4  # the grid
    for room in ("_rounding", "_single_rounding", "product_rounding"):
        monkeypatch.setattr(f"client.bookkeeping.{room}", lambda *_: 0.0)
    if form is FORMS[0]:
        assert most() > 10  # without room for rounding
    elif form is FORMS[2]:
        with pytest.raises(RuntimeError, match="larger than its users"):  # so much that it is noticed
            most()
    else:
        assert most() == pytest.approx(1)  # the norm is that of the very numbers that are summed


@pytest.mark.parametrize("form", FORMS[1:], ids=NAMES[1:])
def test_a_users_part_is_the_same_to_the_bit_whoever_else_is_there(form: Form) -> None:
    """With parts that cancel to nothing but rounding, so that another order of additions would show."""
    users, places = 20, 31
    generator = torch.Generator().manual_seed(0)
    a, g = (
        torch.randn(users, places, 18, generator=generator),
        torch.randn(users, places, 30, generator=generator),
    )
    for rows in (a, g):
        rows[:, places // 2 + 1 :] = rows[:, : places // 2]
    g[:, places // 2 + 1 :] *= -1
    g[:, places // 2] = 0
    g *= 1000

    def kept(form: Form) -> bool:
        """Whether each user adds the same in every group as alone."""

        def part(first: int, last: int, user: int) -> Tensor:
            factors = torch.zeros(last - first, dtype=torch.float64)
            factors[user - first] = 0.1
            return sum_of(form(a[first:last], g[first:last]), factors, (30, 18))

        alone = [part(user, user + 1, user) for user in range(users)]
        assert all(each.any() for each in alone)
        groups = ((0, 20), (3, 20), (0, 7), (11, 19))
        return all(torch.equal(part(*group, user), alone[user]) for group in groups for user in range(*group))

    def by_count(a: Tensor, g: Tensor) -> _Factored | _Gradients:
        """Adds up in another order where there are many: what a library's product of all users at once may do."""
        return form(a.flip(1), g.flip(1)) if len(a) > 10 else form(a, g)

    assert kept(form)
    assert not kept(by_count)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_no_warning_tells_of_a_user_whose_numbers_are_none(form: Form, size: float) -> None:
    rows = torch.ones(2, 5, 40)
    rows[1] = size
    rows[1, 0, 0] = -size
    norms = squared_norms_of(form(rows, rows), slice(0, 2))
    assert norms.isfinite().tolist() == [True, form is FORMS[0] and size == 3e38]
