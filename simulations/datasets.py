"""Data sets for simulations: MovieLens-100K as a verified asset, or one's own log and catalog.

This is the researcher's side: raw user ids and traits appear here, before users fall to sites. A site sees
its own part of the log only, and de-identifies it first of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from common.assets import Asset, AssetFile, Say, fetch
from common.events.catalog import KNOWN_COLUMNS as CATALOG_COLUMNS
from common.events.catalog import Catalog, CatalogFile, make_catalog, read_catalog
from common.events.fields import are_places, check_type, pick_columns
from common.events.ids import id_expression
from common.events.layout import CATALOG, LOG, Layout
from common.events.parts import format_of
from common.events.readers import KNOWN_COLUMNS as LOG_COLUMNS
from common.events.readers import keep, open_table, read_log, scan_log
from common.events.schema import LogError
from common.events.times import check_times

MOVIELENS_100K = Asset(
    name="movielens-100k",
    licence=(
        "GroupLens research licence: research use, no redistribution, no commercial use without permission "
        "(https://grouplens.org/datasets/movielens/100k/); cite Harper and Konstan, 2015"
    ),
    files=tuple(
        AssetFile(name, sha256, size, f"recbole/dataset_example/ml-100k/{name}")
        for name, sha256, size in (
            ("ml-100k.inter", "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff", 1_979_230),
            ("ml-100k.item", "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532", 66_632),
            ("ml-100k.user", "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972", 22_697),
        )
    ),
    package="recbole",
    version="1.2.1",
    notes=(
        "GroupLens serves the same data in another layout only, which these checksums cannot verify; to use "
        "its files, give u.data as --log and u.item as --catalog"
    ),
)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A log, its public catalog, and what is known of the users for dividing them among sites.

    Attributes:
        name: for tables and run folders.
        log: in the schema of `EVENT_SCHEMA`, lazy, with raw user ids.
        catalog: public.
        users: one row a user, column "user" and traits such as "zip_code".
        licence: one line.
        public: whether anybody can have the log.
        notes: what a reader of the results must know, one line each.
    """

    name: str
    log: pl.LazyFrame
    catalog: Catalog
    users: pl.DataFrame
    licence: str
    public: bool = False
    notes: tuple[str, ...] = ()


def load_movielens_100k(
    source: Path | None = None, *, offline: bool = False, say: Say = lambda _: None
) -> Dataset:
    """MovieLens-100K: 943 users, 1,682 films, 100,000 ratings with times.

    Raises:
        AssetError: it cannot be fetched.
    """
    folder = fetch(MOVIELENS_100K, source=source, offline=offline, say=say)
    users = open_table(folder / "ml-100k.user", "auto", None, Layout(), LOG, LOG_COLUMNS).sections[0]
    return Dataset(
        name=MOVIELENS_100K.name,
        log=read_log(folder / "ml-100k.inter"),
        catalog=read_catalog(folder / "ml-100k.item"),
        users=users.scan(users.found.names).rename({"user_id": "user"}).collect(),
        licence=MOVIELENS_100K.licence,
        public=True,
        notes=(
            "About half of all consecutive events share a time: the order within these is arbitrary.",
            "A language model may know the film titles from its own, public training.",
        ),
    )


def load_own(
    log_path: Path,
    catalog_path: Path | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    *,
    layout: Layout | None = None,
    catalog: CatalogFile | None = None,
    time_format: str | None = None,
    sure: bool = False,
) -> Dataset:
    """One's own log, with its public catalog; without one, the log's item list is declared public.

    Args:
        log_path: as for `read_log`.
        catalog_path: as for `read_catalog`.
        format: of the log; the catalog's goes by its name, or is the same where the name says none.
        columns: user, item, time, kind, value name columns of the log; catalog_item, text, categories name
            columns of the catalog (of the log, where there is no catalog). Known names need none.
        layout: of the log's text.
        time_format, sure: as for `scan_log`.
        catalog: what is said of the catalog's file by options of its own; in place of `catalog_path`.

    Raises:
        LogError: a file or column is missing, empty or unreadable.
    """
    columns = columns or {}
    of_log = {field: name for field, name in columns.items() if field in LOG_COLUMNS}
    of_catalog = {field: name for field, name in columns.items() if field in ("text", "categories")}
    odd = sorted(set(columns) - set(of_log) - set(of_catalog) - {"catalog_item"})
    if odd:
        raise LogError(
            f"there is no field {odd[0]!r} to map; fields are {', '.join(LOG_COLUMNS)}, catalog_item, text, "
            "categories"
        )
    log_path = Path(log_path).expanduser()
    scanned = scan_log(log_path, format, of_log, layout, time_format=time_format, sure=sure)
    keep(scanned)
    log, notes = scanned.tidied(), [f"{note}." for note in scanned.notes]
    if catalog is None and catalog_path is not None:
        catalog = CatalogFile(Path(catalog_path).expanduser())
    if catalog is not None:
        items = _own_catalog(catalog, format, columns, of_catalog).read(lambda note: notes.append(f"{note}."))
    else:
        items = _catalog_of_log(log_path, format, of_log, of_catalog, layout or Layout())
        notes.append(
            "No catalog was given: this simulation declares the log's own item list public, which a "
            "deployment must not do (an item that one user alone touched would tell of that user)."
        )
    check_times(scanned.frame, span=scanned.check_span, forms=scanned.check_forms)
    return Dataset(
        name=log_path.name.partition(".")[0],
        log=log,
        catalog=items,
        users=log.select("user").drop_nulls().unique().sort("user").collect(engine="streaming"),
        licence="the owner's",
        notes=tuple(notes),
    )


def _own_catalog(
    catalog: CatalogFile, format: str, columns: Mapping[str, str], of_catalog: Mapping[str, str]
) -> CatalogFile:
    """The catalog's file, with what the log's own options say of it where none of its own do."""
    if catalog.format == "auto" and catalog.path.is_file() and catalog.layout.separator is None:
        # Where the catalog's name says nothing, the log's format it is.
        catalog = replace(
            catalog, format=format_of(catalog.path, CATALOG, None if format == "auto" else format)
        )
    mapped = {**of_catalog, **(catalog.columns or {})}
    if "item" not in mapped and "catalog_item" in columns:
        mapped["item"] = columns["catalog_item"]
    elif "item" in columns and "item" not in mapped and not are_places({**columns, **mapped}):
        table = open_table(catalog.path, catalog.format, mapped, catalog.layout, CATALOG, CATALOG_COLUMNS)
        if columns["item"] in table.sections[0].found.names:  # the log's name for items is the catalog's too
            mapped["item"] = columns["item"]
    return replace(catalog, columns=mapped)


def _catalog_of_log(
    path: Path, format: str, of_log: Mapping[str, str], of_catalog: Mapping[str, str], layout: Layout
) -> Catalog:
    table = open_table(path, format, of_log, layout, LOG, LOG_COLUMNS)
    mapped = {field: name for field, name in of_log.items() if field == "item"} | dict(of_catalog)
    known = {"item": LOG_COLUMNS["item"], "text": CATALOG_COLUMNS["text"], "categories": ()}
    frames = []
    for section in table.sections:
        picked = pick_columns(section.found, mapped, known, ("item",))
        for field, name in picked.items():
            check_type(section.found, field, name, section.types.get(name, pl.String()))
        item = id_expression(picked["item"], section.types.get(picked["item"], pl.String()))
        # An item's text is one of those that its events give: the last in the alphabet, whoever's it is.
        text = pl.col(picked["text"]).cast(pl.String) if "text" in picked else item
        categories = pl.col(picked["categories"]).cast(pl.String) if "categories" in picked else pl.lit("")
        scanned = section.scan(list(dict.fromkeys(picked.values())))
        frames.append(scanned.select(item=item, text=text, categories=categories))
    items = (
        pl.concat(frames)
        .filter(pl.col("item").is_not_null())
        .group_by("item")
        .agg(pl.col("text").max(), pl.col("categories").max())
        .sort("item")
        .collect(engine="streaming")
    )
    return make_catalog(
        (item, text or item, tuple(name.strip() for name in (categories or "").split("|") if name.strip()))
        for item, text, categories in items.iter_rows()
    )
