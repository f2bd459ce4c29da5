"""Partitions: seeded, every user at exactly one site, and skewed as asked."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, clean
from common.events.schema import EVENT_SCHEMA
from simulations.datasets import Dataset, load_movielens_100k
from simulations.partition import (
    by_hash,
    by_zip_digit,
    describe,
    dirichlet,
    divide,
    dominant_categories,
    log_of_site,
    site_table,
)

USERS = [f"user-{row}" for row in range(2000)]


@pytest.fixture(scope="module")
def movielens() -> Dataset:
    return load_movielens_100k()


def test_the_first_digit_of_a_zip_code_is_the_site_and_others_fall_by_hash() -> None:
    codes = ["02139", "94043", "L9G2B", "T8H1N", "E2A4H", "V3N4P", None, ""]
    sites = by_zip_digit(codes)
    assert sites[:2].tolist() == [0, 9]
    assert ((sites >= 0) & (sites < 10)).all()
    assert sites.tolist() == by_zip_digit(codes).tolist()
    assert any(by_zip_digit(codes, seed).tolist() != sites.tolist() for seed in range(1, 4))


@given(st.permutations(range(20)), st.integers(1, 7), st.integers(0, 5))
def test_by_hash_a_users_site_depends_on_no_other_user(order: list[int], n_sites: int, seed: int) -> None:
    users = USERS[:20]
    sites = by_hash(users, n_sites, seed)
    shuffled = by_hash([users[place] for place in order], n_sites, seed)
    assert shuffled.tolist() == [sites[place] for place in order]
    assert ((sites >= 0) & (sites < n_sites)).all()


def test_by_hash_sites_are_about_equal_and_seeds_differ() -> None:
    counts = np.bincount(by_hash(USERS, 10), minlength=10)
    assert 140 < counts.min() <= counts.max() < 260  # 200 +- 4.5 standard deviations
    assert (by_hash(USERS, 10, 0) != by_hash(USERS, 10, 1)).mean() > 0.8


def _distance_from_even(sites: np.ndarray, tastes: list[str]) -> float:
    """Mean total variation between a site's tastes and everyone's, over users."""
    names = sorted(set(tastes))
    overall = np.array([tastes.count(name) for name in names]) / len(tastes)
    total = 0.0
    for site in range(10):
        mine = Counter(taste for taste, place in zip(tastes, sites, strict=True) if place == site)
        count = max(sum(mine.values()), 1)
        total += count * 0.5 * np.abs(np.array([mine[name] for name in names]) / count - overall).sum()
    return total / len(tastes)


def test_dirichlet_is_skewed_at_small_alpha_even_at_large_and_seeded() -> None:
    tastes = [f"taste-{row % 5}" for row in range(2000)]
    skew = {alpha: _distance_from_even(dirichlet(tastes, alpha, 10, 3), tastes) for alpha in (0.1, 1, 1000)}
    assert skew[0.1] > 0.4
    assert skew[0.1] > skew[1] > skew[1000]
    assert skew[1000] < 0.1
    assert (dirichlet(tastes, 0.5, 10, 3) == dirichlet(tastes, 0.5, 10, 3)).all()
    assert (dirichlet(tastes, 0.5, 10, 3) != dirichlet(tastes, 0.5, 10, 4)).any()


def test_dirichlet_gives_each_site_its_minimum_or_says_that_it_cannot() -> None:
    tastes = [f"taste-{row % 5}" for row in range(200)]
    assert np.bincount(dirichlet(tastes, 0.3, 5, 0, 10), minlength=5).min() >= 10
    with pytest.raises(ValueError, match="choose a larger alpha or fewer sites"):
        dirichlet(tastes, 0.3, 30, 0, 10)
    with pytest.raises(ValueError, match="alpha is 0"):
        dirichlet(tastes, 0, 5)
    with pytest.raises(ValueError, match="number of sites is 0"):
        by_hash(USERS, 0)


def _dataset(rows: list[tuple[str, str]], users: list[str]) -> Dataset:
    log = pl.LazyFrame(
        [(user, item, place, "view", None) for place, (user, item) in enumerate(rows)],
        schema=dict(EVENT_SCHEMA),
        orient="row",
    )
    catalog = Catalog(("x", "y", "z"), ("", "", ""), (("A", "B"), ("B",), ()))
    return Dataset("small", log, catalog, pl.DataFrame({"user": users}), "CC0-1.0")


def test_a_users_taste_is_the_category_of_most_events_with_ties_by_name() -> None:
    data = _dataset([("u", "x"), ("u", "y"), ("v", "x"), ("w", "z"), ("w", "unheard-of")], ["v", "w", "u"])
    assert dominant_categories(data.log, data.catalog, ["v", "w", "u"]) == ["A", "", "B"]


def test_the_table_counts_every_user_and_event_and_shows_empty_sites() -> None:
    data = _dataset([("u", "x"), ("u", "y"), ("v", "x")], ["u", "v", "silent"])
    rows = describe(data, np.array([0, 2, 2]))
    assert [(row.site, row.users, row.events) for row in rows] == [(0, 1, 2), (1, 0, 0), (2, 2, 1)]
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(site_table(rows))
    assert "all" in console.export_text()
    with pytest.raises(ValueError, match="one site for each user"):
        describe(data, np.array([0]))


@pytest.mark.parametrize("how", ["zip", "hash", "dirichlet"])
def test_movielens_falls_to_ten_sites_that_clean_their_own_logs(movielens: Dataset, how: str) -> None:
    sites = divide(movielens, how, seed=7)
    rows = describe(movielens, sites)
    assert len(rows) == 10
    assert (sum(row.users for row in rows), sum(row.events for row in rows)) == (943, 100_000)
    pseudonyms: set[str] = set()
    for row in rows:
        log = log_of_site(movielens, sites, row.site)
        histories, _ = clean(log, movielens.catalog, CleaningPolicy(), bytes([row.site]) * 32)
        assert (len(histories), histories.events) == (row.users, row.events)
        pseudonyms.update(histories.users.tolist())
    assert len(pseudonyms) == 943


def test_the_ten_regions_of_movielens_are_natural_and_unequal(movielens: Dataset) -> None:
    users = [row.users for row in describe(movielens, divide(movielens, "zip"))]
    assert (min(users), max(users)) == (57, 174)


def test_what_cannot_be_divided_is_refused(movielens: Dataset) -> None:
    with pytest.raises(ValueError, match="no way 'taste'"):
        divide(movielens, "taste")
    with pytest.raises(ValueError, match="ZIP codes make 10 sites"):
        divide(movielens, "zip", n_sites=5)
    with pytest.raises(ValueError, match="has no ZIP codes"):
        divide(_dataset([("u", "x")], ["u"]), "zip")
