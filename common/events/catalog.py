"""The catalog: public item metadata, one row an item. It says nothing about any user, and never may."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from common.events.readers import format_of, scan_table
from common.events.schema import LogError, id_expression, pick_columns

KNOWN_COLUMNS = {
    "item": ("item", "item_id", "itemid", "movieid", "movie_id", "id"),
    "text": ("text", "title", "movie_title", "name", "description"),
    "categories": ("categories", "category", "genres", "genre", "class"),
}
"""Names of columns that need no mapping."""

_GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary"),
    *("Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller"),
    *("War", "Western"),
)
_NO_GENRES = "(no genres listed)"


class CatalogError(LogError):
    """A catalog cannot be what was asked for: a duplicate or missing id, a damaged file."""


@dataclass(frozen=True)
class Catalog:
    """Items in a fixed order; an item's place in it is its row, by which histories name it.

    Attributes:
        ids: item ids, unique, none empty.
        texts: what the encoder reads of each item; may be empty.
        categories: names of categories of each item, possibly none.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.texts) == len(self.categories):
            raise CatalogError("a catalog needs one text and one tuple of categories for each id")
        if not self.ids:
            raise CatalogError("the catalog is empty: give one that lists the items")
        if not all(self.ids):
            raise CatalogError("the catalog has an item without an id: remove it, or name it")
        if len(self.index) != len(self.ids):
            twice = Counter(self.ids).most_common(1)[0][0]
            raise CatalogError(f"the catalog lists item {twice!r} twice: keep one row an item")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Item id -> row."""
        return {item: row for row, item in enumerate(self.ids)}

    @cached_property
    def category_count(self) -> int:
        """How many categories there are."""
        return len({name for names in self.categories for name in names})

    def row(self, item_id: str) -> int:
        """The row of an item. Raises `CatalogError` for an id that the catalog lacks."""
        try:
            return self.index[item_id]
        except KeyError:
            raise CatalogError(f"item {item_id!r} is not in the catalog") from None

    def digest(self) -> str:
        """SHA-256 (hex) of the content in row order: two catalogs with one digest are the same."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(b"fedtide/catalog/1\n")
        for line in self._lines():
            digest.update(line)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes one file of JSON lines, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.writelines(self._lines())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Catalog:
        """The catalog that `save` wrote. Raises `CatalogError` when the file is missing or damaged."""
        path = Path(path)
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return make_catalog((row["item"], row["text"], tuple(row["categories"])) for row in rows)
        except FileNotFoundError as error:
            raise CatalogError(f"catalog {path} does not exist: check the path") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CatalogError):
                raise
            raise CatalogError(f"catalog {path} is damaged: write it again") from error

    def _lines(self) -> Iterable[bytes]:
        for item, text, categories in zip(self.ids, self.texts, self.categories, strict=True):
            row = {"categories": list(categories), "item": item, "text": text}
            yield json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def make_catalog(rows: Iterable[tuple[str, str, tuple[str, ...]]]) -> Catalog:
    """A catalog of rows (id, text, categories). Raises `CatalogError` as `Catalog` does."""
    listed = list(rows)
    return Catalog(
        ids=tuple(row[0] for row in listed),
        texts=tuple(row[1] for row in listed),
        categories=tuple(row[2] for row in listed),
    )


def read_catalog(path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None) -> Catalog:
    """A catalog from CSV, TSV, Parquet, JSON lines, MovieLens (movies.csv, movies.dat, u.item) or RecBole.

    Categories are a list, or text split at "|" (RecBole: at blanks). MovieLens texts are titles with their
    year; RecBole's have it added where the file has a release year.

    Args:
        path: one file.
        format: as for `readers.read_log`; "auto" goes by the file's name.
        columns: field (item, text, categories) -> column name; known names need none.

    Raises:
        LogError: the file is missing, empty, of unknown format, or lacks a column; a `CatalogError` when an
            item has no id, or stands twice.
    """
    path = Path(path).expanduser()
    if path.is_file() and format in ("auto", "movielens"):
        found = format_of(path) if format == "auto" else format
        if found == "movielens" and not path.name.endswith((".csv", ".csv.gz")):
            return make_catalog(_movielens_rows(path))
    table, found = scan_table(path, format)
    try:
        schema = table.collect_schema()
        picked = pick_columns(
            schema.names(), columns, KNOWN_COLUMNS, ("item", "text"), f"catalog {path.name}"
        )
        ids = id_expression(picked["item"], schema[picked["item"]]).fill_null("")
        text = pl.col(picked["text"]).cast(pl.String).fill_null("").str.strip_chars()
        if found == "recbole" and "release_year" in schema:
            year = pl.col("release_year")
            text = pl.when(year.str.contains(r"^\d{4}$")).then(text + " (" + year + ")").otherwise(text)
        rows = table.select(item=ids, text=text, categories=_categories(picked, schema, found)).collect()
    except pl.exceptions.PolarsError as error:
        raise CatalogError(f"catalog {path} cannot be read as {found}: check the file") from error
    return make_catalog(
        (item, text, tuple(name for name in categories if name and name != _NO_GENRES))
        for item, text, categories in rows.iter_rows()
    )


def _categories(picked: Mapping[str, str], schema: pl.Schema, format: str) -> pl.Expr:
    if "categories" not in picked:
        return pl.lit([], dtype=pl.List(pl.String))
    column = pl.col(picked["categories"])
    if isinstance(schema[picked["categories"]], pl.List):
        return column.cast(pl.List(pl.String)).fill_null([])
    if format == "recbole":
        return column.fill_null("").str.extract_all(r"\S+")
    return column.cast(pl.String).fill_null("").str.split("|").list.eval(pl.element().str.strip_chars())


def _movielens_rows(path: Path) -> Iterable[tuple[str, str, tuple[str, ...]]]:
    dat = path.name.endswith(".dat")
    for number, line in enumerate(path.read_text(encoding="latin-1").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("::" if dat else "|")
        if len(fields) != (3 if dat else 5 + len(_GENRES_100K)):
            raise CatalogError(f"{path} is no MovieLens items file: line {number} has {len(fields)} fields")
        if dat:
            genres = tuple(name for name in fields[2].split("|") if name and name != _NO_GENRES)
        else:
            genres = tuple(name for name, flag in zip(_GENRES_100K, fields[5:], strict=True) if flag == "1")
        yield fields[0].strip(), fields[1].strip(), genres
