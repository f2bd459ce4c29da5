"""Readers: a log file of any known format as a lazy frame in the one schema.

Everything is lazy: nothing is held in memory until cleaning collects it in streams, so a log may be larger
than memory. What is packed, or no plain UTF-8, is copied first (`plain.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from common.events.fields import are_places, check_type, pick_columns
from common.events.ids import check_ids, id_expression
from common.events.json_lines import json_lines
from common.events.layout import LOG, Asked, Layout
from common.events.parquet import parquet
from common.events.parts import find_parts
from common.events.plain import Plain, allow_files
from common.events.schema import DEFAULT_KIND, EVENT_SCHEMA, LogError
from common.events.separated import format_by_first_line, movielens, separated
from common.events.several_ids import refuse_several_ids
from common.events.table import Section, Table
from common.events.times import TimeForm, form_of

KNOWN_COLUMNS = {
    "user": ("user", "user_id", "userid"),
    "item": ("item", "item_id", "itemid", "movieid", "movie_id"),
    "time": ("time", "timestamp", "datetime"),
    "kind": ("kind", "event", "event_type"),
    "value": ("value", "rating"),
}
"""Names of columns that need no mapping."""

_FILES = 512  # that a process has open besides
_REQUIRED = ("user", "item", "time")
_kept: list[Plain] = []  # copies that frames read which do not hold them: `read_log`'s


@dataclass(frozen=True)
class Log:
    """A log in the schema of `EVENT_SCHEMA`, for cleaning to read.

    Attributes:
        frame: unusable times and values are null.
        untidy: texts of users, items and kinds are as the file has them; cleaning tidies each distinct one once.
        default_kind: of an event that names none.
        events: how many there are, where the files say; so many must be read.
        notes: what is to be said of the files, a line each, and nothing about a user.
        check_span, check_forms: whether times that cannot be believed, or are unreadable for the most, are refused.
        kept: plain copies of what was packed, which live as long as this does.
        look_again: where the frame cannot be read to its end: raises a `LogError` that says why, if that is found.
    """

    frame: pl.LazyFrame
    untidy: bool = False
    default_kind: str = DEFAULT_KIND
    events: int | None = None
    notes: tuple[str, ...] = ()
    check_span: bool = False
    check_forms: bool = False
    kept: tuple[Plain, ...] = field(default=(), repr=False)
    look_again: Callable[[], None] = lambda: None

    def tidied(self) -> pl.LazyFrame:
        """The frame with tidy texts, each event's tidied by itself."""
        if not self.untidy:
            return self.frame
        return self.frame.with_columns(
            *(id_expression(name, pl.String()) for name in ("user", "item")),
            kind=pl.coalesce(id_expression("kind", pl.String()), pl.lit(self.default_kind)),
        )


def read_log(
    path: str | Path,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> pl.LazyFrame:
    """A log in the schema of `EVENT_SCHEMA`, read lazily; unusable fields are null, for cleaning to count.

    Args, Raises: as for `scan_log`, which is what cleaning reads faster.
    """
    log = scan_log(path, format, columns, layout)
    keep(log)
    return log.tidied()


def keep(log: Log) -> None:
    """Lets a log's copies live as long as the process, for frames that do not hold them."""
    _kept.extend(log.kept)


def scan_log(
    path: str | Path,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    work: Path | None = None,
    *,
    time_format: str | None = None,
    sure: bool = False,
) -> Log:
    """A log as cleaning reads it: lazily, with texts as the file has them.

    Args:
        path: a file, or a folder of parts that all have one format, in folders of its own or not. Text formats
            may be packed (`.gz`, `.bz2`, `.xz`, `.zst`, `.zip`). The columns of JSON lines are those that the
            first 1,000 rows name, and those of `columns`.
        format: one of `Format`; "auto" goes by the file's name.
        columns: field -> column name, such as {"user": "CustomerID"}; known names need none. Or field -> place
            from 1 on, {"user": "1", "item": "3", "time": "2"}, of a text file without a line of names.
        layout: separator, quotes and encoding, where they are not what the name says.
        work: where plain copies of packed files lie; None: where the system keeps such files.
        time_format: of the times, where they have not one of `times.FORMS`: a name, or a pattern of strptime's.
        sure: whether times are taken as they are read, however odd.

    Raises:
        LogError: the file is missing, empty, of unknown format, lacks a column, or cannot be read as it is.
    """
    path = Path(path).expanduser()
    table = open_table(path, format, columns, layout or Layout(), LOG, KNOWN_COLUMNS, work)
    frames: list[tuple[pl.LazyFrame, bool]] = []
    form: TimeForm | None = None
    try:
        for section in table.sections:  # parts of one log have one form of times: the first one's
            frame, has_values, form = _events(section, columns, time_format, form)
            frames.append((frame, has_values))
        frame = frames[0][0] if len(frames) == 1 else pl.concat([frame for frame, _ in frames])
        if frame.head(1).collect().is_empty():
            raise LogError(f"log {path} holds no event: give one that has some")
    except pl.exceptions.PolarsError as error:
        table.look_again()
        raise unreadable(path, table.format, LOG) from error
    counts = [section.rows for section in table.sections]
    rated = table.format in ("movielens", "recbole") and any(rated for _, rated in frames)
    return Log(
        frame,
        untidy=True,
        default_kind="rating" if rated else DEFAULT_KIND,
        events=None if None in counts else sum(count or 0 for count in counts),
        notes=table.notes,
        check_span=time_format is None and not sure,
        check_forms=not sure,
        kept=table.kept,
        look_again=table.look_again,
    )


def _events(
    section: Section, columns: Mapping[str, str] | None, time_format: str | None, form: TimeForm | None
) -> tuple[pl.LazyFrame, bool, TimeForm]:
    """A section's events in the schema, whether they have values, and the form of their times.

    Args:
        form: that another section's times have; None for the first section.
    """
    picked = pick_columns(section.found, columns, KNOWN_COLUMNS, _REQUIRED)
    optional = {
        name for field, name in picked.items() if field not in _REQUIRED and field not in (columns or {})
    }
    for field_name, name in list(picked.items()):
        dtype = section.types.get(name, pl.String())
        if name in optional and (dtype.is_nested() or dtype in (pl.Binary, pl.Object)):
            del picked[field_name]  # nobody asked for it
        else:
            check_type(section.found, field_name, name, dtype)
    table = section.scan(list(dict.fromkeys(picked.values())), optional)
    types = {name: section.types.get(name, pl.String()) for name in picked.values()}
    refuse_several_ids(section.found, picked["item"], table)
    for field_name in ("user", "item"):
        check_ids(section.found, field_name, picked[field_name], types[picked[field_name]], table)
    times = picked["time"]
    if form is None:
        form = form_of(section.found, times, types[times], table, time_format)
    value = pl.lit(None)
    if "value" in picked:
        value = pl.col(picked["value"]).cast(pl.Float32, strict=False)
        value = pl.when(value.is_finite()).then(value).otherwise(None)
    frame = table.select(
        **{name: _text(picked[name], types) for name in ("user", "item")},
        time=form.expression(times, types[times]),
        kind=_text(picked["kind"], types) if "kind" in picked else pl.lit(None, dtype=pl.String),
        value=value.cast(EVENT_SCHEMA["value"]),
    )
    return frame, "value" in picked, form


def _text(name: str, types: Mapping[str, pl.DataType]) -> pl.Expr:
    """A column as text: what is text already stays as it is."""
    dtype = types[name]
    return pl.col(name) if dtype == pl.String else id_expression(name, dtype)


def open_table(
    path: Path,
    format: str,
    columns: Mapping[str, str] | None,
    layout: Layout,
    asked: Asked,
    known: Mapping[str, Sequence[str]],
    work: Path | None = None,
) -> Table:
    """A table file or a folder of parts with their own columns, lazily.

    Raises:
        LogError: it is missing, empty, unreadable or of unknown format.
    """
    places = columns if are_places(columns) else None
    if places is not None and "0" in places.values():
        raise LogError(f"{asked.option('columns')} counts columns from 1, and 0 is none: add 1 to each place")
    parts, format = find_parts(path, format, asked, "csv" if layout.separator is not None else None)
    allow_files(_FILES + 2 * len(parts))  # a copy of each, and what a library opens
    try:
        if format == "movielens" and (places is not None or layout.separator is not None):
            format, layout = format_by_first_line(parts[0], layout, asked)
        if format in ("movielens", "recbole") and len(parts) > 1:
            raise LogError(f"folder {path} holds several files: name the one with the {asked.noun}'s rows")
        if format == "parquet":
            sections = parquet(parts, asked)
        elif format == "jsonl":
            sections = json_lines(parts, layout, work, asked, tuple((columns or {}).values()))
        elif format == "movielens" and not parts[0].shown.lower().endswith((".csv", ".csv.gz")):
            sections = movielens(parts, layout, work, asked)
        else:
            of_text = "csv" if format == "movielens" else format
            sections = separated(parts, of_text, layout, places, known, work, asked)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(path, format, asked) from error
    return Table(tuple(sections), format)


def unreadable(path: Path, format: str, asked: Asked) -> LogError:
    """What is said where a library cannot read a file: its own text may quote a row, which is a user's data."""
    return LogError(
        f"{path} cannot be read as {format}: check the file, or name its format with {asked.option('format')}"
    )
