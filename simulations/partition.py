"""How users fall to sites: by region, by hash, or skewed by taste.

This is the researcher's side of a simulation: it works on raw user ids, before any site has cleaned and
de-identified its own part of the log. Each way is a function of the users and a seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from rich.table import Table

from common.events.catalog import Catalog
from common.events.schema import LogError
from simulations.datasets import Dataset

Sites = npt.NDArray[np.int64]
"""[users] the site of each user, counted from 0."""

ZIP_SITES = 10
NO_CATEGORY = ""
_DRAWS = 200


def by_zip_digit(zip_codes: Sequence[str | None], seed: int = 0) -> Sites:
    """Ten sites, by first digit of the ZIP code; others fall by a hash of the code, or of their place."""
    return np.array(
        [
            int(code[0]) if code and code[0] in "0123456789" else _hash(code or str(place), seed, ZIP_SITES)
            for place, code in enumerate(zip_codes)
        ],
        dtype=np.int64,
    )


def by_hash(users: Sequence[str], n_sites: int, seed: int = 0) -> Sites:
    """About equal sites, by a seeded hash of the user id: one user's site depends on no other user."""
    _check_sites(n_sites)
    return np.array([_hash(user, seed, n_sites) for user in users], dtype=np.int64)


def dirichlet(
    tastes: Sequence[str], alpha: float, n_sites: int, seed: int = 0, minimum_users: int = 1
) -> Sites:
    """Sites skewed by taste: users of each taste fall to sites by shares drawn from Dirichlet(alpha).

    Hsu, Qi and Brown, 2019 (arXiv:1909.06335), per class. Shares are drawn again until each site has
    `minimum_users`.

    Args:
        tastes: [users] such as `dominant_categories` gives.
        alpha: concentration; small is skewed, large is alike.

    Raises:
        ValueError: alpha is not above 0, or no draw gave each site its minimum of users.
    """
    _check_sites(n_sites)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}, but must be above 0: 0.1 is skewed, 100 is nearly even")
    generator = np.random.default_rng(seed)
    names, taste = np.unique(np.asarray(tastes, dtype=np.str_), return_inverse=True)
    for _ in range(_DRAWS if len(tastes) >= n_sites * minimum_users else 0):
        sites = np.zeros(len(tastes), dtype=np.int64)
        for place in range(len(names)):
            shares = generator.dirichlet(np.full(n_sites, alpha))
            chosen = taste == place
            sites[chosen] = generator.choice(n_sites, size=int(chosen.sum()), p=shares)
        if np.bincount(sites, minlength=n_sites).min() >= minimum_users:
            return sites
    raise ValueError(
        f"no division of {len(tastes)} users at alpha {alpha:g} gave each of {n_sites} sites "
        f"{minimum_users} users: choose a larger alpha or fewer sites"
    )


def dominant_categories(log: pl.LazyFrame, catalog: Catalog, users: Sequence[str]) -> list[str]:
    """[users] the category that most of each user's events have; ties fall to the first by name.

    A user without events in any category has "".
    """
    pairs = [
        (item, name) for item, names in zip(catalog.ids, catalog.categories, strict=True) for name in names
    ]
    table = pl.LazyFrame(
        {"item": [item for item, _ in pairs], "category": [name for _, name in pairs]},
        schema={"item": pl.String, "category": pl.String},
    )
    counted = (
        log.select("user", "item")
        .join(table, on="item", how="inner")
        .group_by("user", "category")
        .agg(pl.len().alias("events"))
        .sort("events", "category", descending=[True, False])
        .group_by("user", maintain_order=True)
        .agg(pl.col("category").first())
        .collect()
    )
    found = dict(counted.iter_rows())
    return [found.get(user, NO_CATEGORY) for user in users]


def divide(
    dataset: Dataset,
    how: str,
    n_sites: int = ZIP_SITES,
    seed: int = 0,
    alpha: float = 0.5,
    minimum_users: int = 1,
) -> Sites:
    """[users of dataset.users] sites by one of the ways: "zip", "hash" or "dirichlet".

    Raises:
        ValueError: an unknown way, or one that this data set or these numbers do not allow.
    """
    users = dataset.users["user"].to_list()
    match how:
        case "zip":
            if "zip_code" not in dataset.users.columns:
                raise ValueError(f"{dataset.name} has no ZIP codes: divide it by hash or dirichlet")
            if n_sites != ZIP_SITES:
                raise ValueError(
                    f"ZIP codes make {ZIP_SITES} sites, not {n_sites}: ask for {ZIP_SITES}, or hash"
                )
            return by_zip_digit(dataset.users["zip_code"].to_list(), seed)
        case "hash":
            return by_hash(users, n_sites, seed)
        case "dirichlet":
            tastes = dominant_categories(dataset.log, dataset.catalog, users)
            return dirichlet(tastes, alpha, n_sites, seed, minimum_users)
    raise ValueError(f"there is no way {how!r} to divide users: choose zip, hash or dirichlet")


def log_of_site(dataset: Dataset, sites: Sites, site: int) -> pl.LazyFrame:
    """One site's part of the log, with raw user ids, for that site to clean with its own secret."""
    mine = dataset.users.lazy().select("user").filter(pl.Series(sites == site))
    return dataset.log.join(mine, on="user", how="semi")


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One line of the site table: the researcher's exact counts, which no site would tell."""

    site: int
    users: int
    events: int


def describe(dataset: Dataset, sites: Sites) -> list[SiteRow]:
    """A row for each site from 0 to the last, empty ones too.

    Raises:
        LogError: the log cannot be read to its end.
    """
    if len(sites) != len(dataset.users):
        raise ValueError(f"{len(sites)} places for {len(dataset.users)} users: give one site for each user")
    placed = dataset.users.lazy().select("user").with_columns(pl.Series("site", sites))
    try:
        events = (
            dataset.log.select("user")
            .join(placed, on="user", how="inner")
            .group_by("site")
            .agg(pl.len().alias("events"))
            .collect(engine="streaming")
        )
    except pl.exceptions.PolarsError as error:
        raise LogError("the log cannot be read to its end: look for a damaged row") from error
    by_site = dict(events.iter_rows())
    users = np.bincount(sites)
    return [SiteRow(site, int(count), int(by_site.get(site, 0))) for site, count in enumerate(users)]


def site_table(rows: Sequence[SiteRow], title: str = "sites") -> Table:
    """The site table for a terminal, with totals."""
    table = Table(title=title)
    for name in ("site", "users", "events", "events a user"):
        table.add_column(name, justify="right")
    for row in rows:
        each = f"{row.events / row.users:.1f}" if row.users else "-"
        table.add_row(str(row.site), f"{row.users:,}", f"{row.events:,}", each)
    table.add_section()
    users, events = sum(row.users for row in rows), sum(row.events for row in rows)
    table.add_row("all", f"{users:,}", f"{events:,}", f"{events / users:.1f}" if users else "-")
    return table


def _hash(text: str, seed: int, n_sites: int) -> int:
    digest = hashlib.sha256(f"fedtide/partition/{seed}/{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % n_sites


def _check_sites(n_sites: int) -> None:
    if n_sites < 1:
        raise ValueError(f"the number of sites is {n_sites}, but must be at least 1")
