"""Readers: a log file of any known format as a lazy frame in the one schema.

Everything is lazy: nothing is held in memory until cleaning collects it in streams, so a log may be larger
than memory. Text formats are read as text and cast here, so that no type is guessed from the first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from common.events.schema import (
    DEFAULT_KIND,
    EVENT_SCHEMA,
    LogError,
    id_expression,
    pick_columns,
    time_expression,
)

Format = Literal["auto", "csv", "tsv", "parquet", "jsonl", "movielens", "recbole"]

KNOWN_COLUMNS = {
    "user": ("user", "user_id", "userid"),
    "item": ("item", "item_id", "itemid", "movieid", "movie_id"),
    "time": ("time", "timestamp", "datetime"),
    "kind": ("kind", "event", "event_type"),
    "value": ("value", "rating"),
}
"""Names of columns that need no mapping."""

_SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".inter": "recbole",
    ".item": "recbole",
    ".user": "recbole",
    ".dat": "movielens",
    ".data": "movielens",
}
_RATINGS = ("user", "item", "rating", "timestamp")


@dataclass(frozen=True)
class Log:
    """A log in the schema of `EVENT_SCHEMA`, for cleaning to read.

    Attributes:
        frame: unusable times and values are null.
        untidy: texts of users, items and kinds are as the file has them; cleaning tidies each distinct one once.
        default_kind: of an event that names none.
        events: how many there are, where the file says.
    """

    frame: pl.LazyFrame
    untidy: bool = False
    default_kind: str = DEFAULT_KIND
    events: int | None = None

    def tidied(self) -> pl.LazyFrame:
        """The frame with tidy texts, each event's tidied by itself."""
        if not self.untidy:
            return self.frame
        return self.frame.with_columns(
            *(id_expression(name, pl.String()) for name in ("user", "item")),
            kind=pl.coalesce(id_expression("kind", pl.String()), pl.lit(self.default_kind)),
        )


def read_log(
    path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None
) -> pl.LazyFrame:
    """A log in the schema of `EVENT_SCHEMA`, read lazily; unusable fields are null, for cleaning to count.

    Args, Raises: as for `scan_log`, which is what cleaning reads faster.
    """
    return scan_log(path, format, columns).tidied()


def scan_log(path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None) -> Log:
    """A log as cleaning reads it: lazily, with texts as the file has them.

    Args:
        path: a file (`.gz` too, for text formats), or a folder of parts that all have one format. Text is
            UTF-8. The columns of JSON lines are those that the first 1,000 rows name.
        format: one of `Format`; "auto" goes by the file's name.
        columns: field -> column name, such as {"user": "CustomerID"}; known names need none.

    Raises:
        LogError: the file is missing, empty, of unknown format, or lacks a column.
    """
    path = Path(path).expanduser()
    table, format = scan_table(path, format)
    try:
        schema = table.collect_schema()
        picked = pick_columns(
            schema.names(), columns, KNOWN_COLUMNS, ("user", "item", "time"), f"log {path.name}"
        )
        if table.head(1).collect().is_empty():
            raise LogError(f"log {path} holds no event: give one that has some")
        events = int(table.select(pl.len()).collect().item()) if format == "parquet" else None
    except pl.exceptions.PolarsError as error:
        raise _unreadable(path, format) from error
    rated = format in ("movielens", "recbole") and "value" in picked
    value = pl.lit(None)
    if "value" in picked:
        value = pl.col(picked["value"]).cast(pl.Float32, strict=False)
        value = pl.when(value.is_finite()).then(value).otherwise(None)
    texts = {name: _text(picked[name], schema) for name in ("user", "item")}
    frame = table.select(
        **texts,
        time=time_expression(picked["time"], schema[picked["time"]]),
        kind=_text(picked["kind"], schema) if "kind" in picked else pl.lit(None, dtype=pl.String),
        value=value.cast(EVENT_SCHEMA["value"]),
    )
    return Log(frame, untidy=True, default_kind="rating" if rated else DEFAULT_KIND, events=events)


def _text(name: str, schema: pl.Schema) -> pl.Expr:
    """A column as text: what is text already stays as it is."""
    dtype = schema[name]
    return pl.col(name) if dtype == pl.String else id_expression(name, dtype)


def scan_table(path: Path, format: str = "auto") -> tuple[pl.LazyFrame, str]:
    """A table file with its own columns, lazily, and the format that it was read as.

    Raises:
        LogError: the file is missing, empty, unreadable or of unknown format.
    """
    parts, format = _find_parts(path, format)
    scanners: Mapping[str, Callable[[list[Path]], pl.LazyFrame]] = {
        "csv": lambda files: _scan_separated(files, ","),
        "tsv": lambda files: _scan_separated(files, "\t"),
        "parquet": pl.scan_parquet,
        "jsonl": _scan_json_lines,
        "movielens": _scan_movielens,
        "recbole": _scan_recbole,
    }
    try:
        table = scanners[format](parts)
        table.collect_schema()
    except pl.exceptions.NoDataError as error:
        raise LogError(f"{path} is empty: give a file that has rows") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, format) from error
    return table, format


def format_of(path: Path) -> str:
    """The format that a file's name says.

    Raises:
        LogError: the name says none.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if path.name in ("ratings.csv", "u.item"):
        return "movielens"
    if suffix not in _SUFFIXES:
        raise LogError(f"{path} has no known format by its name: say which with --format, {_formats()}")
    return _SUFFIXES[suffix]


def _formats() -> str:
    return "one of " + ", ".join(get_args(Format)[1:])


def _unreadable(path: Path, format: str) -> LogError:
    # The library's own text may quote a row, which is a user's data: only the format is named.
    return LogError(f"{path} cannot be read as {format}: check the file, or name its format with --format")


def _find_parts(path: Path, format: str) -> tuple[list[Path], str]:
    if format not in get_args(Format):
        raise LogError(f"format {format!r} is unknown: choose {_formats()}")
    if not path.exists():
        raise LogError(f"{path} does not exist: check the path")
    parts = [path]
    if path.is_dir():
        parts = sorted(
            part for part in path.iterdir() if part.is_file() and not part.name.startswith((".", "_"))
        )
        if not parts:
            raise LogError(f"folder {path} holds no files: give a log file, or a folder of parts")
    if format == "auto":
        formats = {format_of(part) for part in parts}
        if len(formats) > 1:
            raise LogError(f"folder {path} mixes formats ({', '.join(sorted(formats))}): name one file of it")
        format = formats.pop()
    if format in ("movielens", "recbole") and len(parts) > 1:
        raise LogError(f"folder {path} holds several files: name the one with the events")
    if any(part.stat().st_size == 0 for part in parts):
        raise LogError(f"{next(p for p in parts if p.stat().st_size == 0)} is empty: give a file with rows")
    return parts, format


def _scan_separated(files: list[Path], separator: str) -> pl.LazyFrame:
    return pl.scan_csv(files, separator=separator, infer_schema=False, encoding="utf8-lossy")


def _scan_json_lines(files: list[Path]) -> pl.LazyFrame:
    # The first rows say which columns there are; scalars are then read as text, whatever their type.
    schema = pl.scan_ndjson(files, infer_schema_length=1000).collect_schema()
    as_text = {name: pl.String() for name, dtype in schema.items() if not dtype.is_nested()}
    return pl.scan_ndjson(files, infer_schema_length=1000, schema_overrides=as_text)


def _scan_movielens(files: list[Path]) -> pl.LazyFrame:
    name = files[0].name.removesuffix(".gz")
    if name.endswith(".csv"):
        return _scan_separated(files, ",")
    if name.endswith(".dat"):
        # Fields stand between "::"; read at ":", every second field is empty.
        table = pl.scan_csv(
            files, separator=":", has_header=False, infer_schema=False, quote_char=None, encoding="utf8-lossy"
        )
        fields = table.collect_schema().names()[::2]
    else:
        table = pl.scan_csv(files, separator="\t", has_header=False, infer_schema=False, quote_char=None)
        fields = table.collect_schema().names()
    if len(fields) != len(_RATINGS):
        raise LogError(f"{files[0]} is no MovieLens ratings file: expected user, item, rating, timestamp")
    return table.select(pl.col(field).alias(name) for field, name in zip(fields, _RATINGS, strict=True))


def _scan_recbole(files: list[Path]) -> pl.LazyFrame:
    table = pl.scan_csv(files, separator="\t", infer_schema=False, quote_char=None, encoding="utf8-lossy")
    names = table.collect_schema().names()
    if not all(":" in name for name in names):
        raise LogError(f"{files[0]} is no RecBole atomic file: its header must read name:type")
    return table.rename({name: name.partition(":")[0] for name in names})
