"""The catalog: public item metadata, one row an item. It says nothing about any user, and never may."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import polars as pl

from common.events.fields import check_type, pick_columns
from common.events.ids import check_ids, id_expression
from common.events.layout import CATALOG, Layout
from common.events.parts import Part
from common.events.plain import plain_text
from common.events.readers import open_table
from common.events.schema import LogError
from common.events.table import Section

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


def read_catalog(
    path: str | Path,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Catalog:
    """A catalog from CSV, TSV, Parquet, JSON lines, MovieLens (movies.csv, movies.dat, u.item) or RecBole.

    Categories are a list, or text split at "|" (RecBole: at blanks). A text that is a list is its parts, with
    blanks between. MovieLens texts are titles with their year; RecBole's have it added where the file has a release
    year.

    Args:
        path: a file, or a folder of parts, as for `readers.read_log`.
        format, layout: as for `readers.read_log`; "auto" goes by the file's name.
        columns: field (item, text, categories) -> column name, or place where there are no names; known names
            need none.
        say: told what is to be known of the file: its encoding, texts that were damaged before.

    Raises:
        LogError: the file is missing, empty, of unknown format, or lacks a column; a `CatalogError` when an
            item has no id, or stands twice.
    """
    path, layout = Path(path).expanduser(), layout or Layout()
    if _is_u_item(path, format, columns, layout):
        rows, notes = _rows_of_u_item(path, layout)
    else:
        rows, notes = [], []
        table = open_table(path, format, columns, layout, CATALOG, KNOWN_COLUMNS)
        for section in table.sections:
            rows += _rows(section, table.format, columns)
        notes += table.notes
    for note in notes:
        say(note)
    catalog = make_catalog(rows)
    damaged = sum("\ufffd" in text for text in catalog.texts)
    if damaged:
        say(
            f"{damaged:,} of {len(catalog):,} texts of catalog {path.name} have characters that were lost before "
            "(U+FFFD): find a catalog in which they are whole, as the language model reads them"
        )
    return catalog


@dataclass(frozen=True)
class CatalogFile:
    """A catalog's file, and what a person says of it: the arguments of `read_catalog`."""

    path: Path
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    layout: Layout = field(default_factory=Layout)

    def read(self, say: Callable[[str], None] = lambda _: None) -> Catalog:
        """The catalog. Raises as `read_catalog` does."""
        return read_catalog(self.path, self.format, self.columns, self.layout, say=say)


def _rows(
    section: Section, format: str, columns: Mapping[str, str] | None
) -> list[tuple[str, str, tuple[str, ...]]]:
    picked = pick_columns(section.found, columns, KNOWN_COLUMNS, ("item", "text"))
    types = dict(section.types)
    for what, name in list(picked.items()):
        listed = what != "item" and isinstance(types[name], pl.List)
        if listed and not getattr(types[name], "inner", pl.String()).is_nested():
            continue
        if what == "categories" and what not in (columns or {}) and types[name].is_nested():
            del picked[what]  # nobody asked for it
        else:
            check_type(section.found, what, name, types[name])
    asked_for = [*dict.fromkeys(picked.values())]
    year = "release_year" if format == "recbole" and "release_year" in types else None
    frame = section.scan([*asked_for, *([year] if year else [])], ())
    check_ids(section.found, "item", picked["item"], types[picked["item"]], frame)
    text = pl.col(picked["text"])
    text = (
        text.cast(pl.List(pl.String)).list.join(" ") if isinstance(types[picked["text"]], pl.List) else text
    )
    text = text.cast(pl.String).fill_null("").str.strip_chars()
    if year:
        known = pl.col(year).str.contains(r"^\d{4}$")
        text = pl.when(known).then(text + " (" + pl.col(year) + ")").otherwise(text)
    try:
        rows = frame.select(
            item=id_expression(picked["item"], types[picked["item"]]).fill_null(""),
            text=text,
            categories=_categories(picked, types, format),
        ).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        section.look_again()
        raise CatalogError(
            f"{section.found.shown} cannot be read to its end as {format}: look for a damaged row, or name its format "
            f"with {CATALOG.option('format')}"
        ) from error
    return [
        (item, text, tuple(name for name in categories if name and name != _NO_GENRES))
        for item, text, categories in rows.iter_rows()
    ]


def _categories(picked: Mapping[str, str], types: Mapping[str, pl.DataType], format: str) -> pl.Expr:
    if "categories" not in picked:
        return pl.lit([], dtype=pl.List(pl.String))
    column = pl.col(picked["categories"])
    if isinstance(types[picked["categories"]], pl.List):
        return column.cast(pl.List(pl.String)).fill_null([])
    if format == "recbole":
        return column.fill_null("").str.extract_all(r"\S+")
    return column.cast(pl.String).fill_null("").str.split("|").list.eval(pl.element().str.strip_chars())


def _is_u_item(path: Path, format: str, columns: Mapping[str, str] | None, layout: Layout) -> bool:
    """Whether the file is MovieLens-100K's, with a flag for each genre."""
    if not path.is_file() or columns or layout.separator is not None:
        return False
    return path.name.startswith("u.item") and format in ("auto", "movielens")


def _rows_of_u_item(path: Path, layout: Layout) -> tuple[list[tuple[str, str, tuple[str, ...]]], list[str]]:
    plain, notes, _ = plain_text(Part(path, path.name, {}), layout, None, CATALOG)
    rows = []
    for number, line in enumerate(plain.lines(), start=1):
        fields = line.decode("utf-8", "replace").rstrip("\r\n").split("|")
        if len(fields) != 5 + len(_GENRES_100K) and any(fields):
            raise CatalogError(f"{path} is no MovieLens items file: line {number} has {len(fields)} fields")
        genres = tuple(name for name, flag in zip(_GENRES_100K, fields[5:], strict=False) if flag == "1")
        if any(fields):
            rows.append((fields[0].strip(), fields[1].strip(), genres))
    return rows, notes
