"""Separated text: CSV, TSV and files with other separators, with a line of names or without; MovieLens and RecBole.

Text is read as text, so that no type is guessed from the first rows.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from common.events.fields import Found, looks_like_a_name
from common.events.layout import JOINER, Asked, Layout
from common.events.parts import Part
from common.events.plain import Plain, make_copy, plain_text
from common.events.quoting import Look, Quoting, first_rows, look_at_quotes, with_tidy_quotes
from common.events.schema import LogError
from common.events.table import Section

RATINGS = ("user", "item", "rating", "timestamp")
"""Fields of MovieLens' ratings files, which have no line of names."""

_AT_ONCE = 4
_ITEMS_OF_DAT = ("item", "text", "categories")
_CANDIDATES = (("\t", "tab"), (";", "';'"), ("|", "'|'"), ("::", "'::'"), (",", "','"), (" ", "space"))


@dataclass(frozen=True)
class _Read:
    """A part that is ready to be scanned."""

    part: Part
    plain: Plain
    separator: str
    quoting: Quoting
    rows: list[tuple[str, ...]]  # of the first two lines that are not blank
    skipped: int  # lines to pass over: those up to the line of names
    notes: tuple[str, ...]


def separated(
    parts: Sequence[Part],
    format: str,
    layout: Layout,
    places: Mapping[str, str] | None,
    known: Mapping[str, Sequence[str]],
    work: Path | None,
    asked: Asked,
) -> list[Section]:
    """Sections of separated text.

    Args:
        places: field -> place from 1 on, where the file has no line of names; None where it has one.
        known: names that a line of names may have, by field.

    Raises:
        LogError: a part cannot be read as text, or its quotes cannot.
    """
    default = "," if format == "csv" else "\t"
    separator = layout.fields_end_in(default)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _AT_ONCE)) as threads:
        reads = list(threads.map(lambda part: _read(part, separator, layout, work, asked), parts))
    groups: dict[tuple[object, ...], list[_Read]] = {}
    for first in reads:
        read = first
        names: tuple[str, ...] = read.rows[0]
        wanted = len(names)
        if format == "recbole":
            if not all(":" in name for name in names):
                raise LogError(f"{read.part.path} is no RecBole atomic file: its header must read name:type")
            names = tuple(name.partition(":")[0] for name in names)
        if places is None or _has_names(names, places, known):
            read = replace(first, skipped=_lines_to_names(first.plain))
        if places is not None:
            if read.skipped and len(read.rows) > 1:
                wanted = len(read.rows[1])  # whoever gives places need not have a name for each
            names = tuple(str(place) for place in range(1, wanted + 1))
        _refuse_wide_rows(read.part, read.quoting, wanted, asked)
        if places is not None and _stands_in_quotes(read, layout, read.rows):
            quotes = asked.option("quotes")
            raise LogError(
                f"{asked.noun} {read.part.shown}: its fields stand in quotes: say {quotes} double, or {quotes} none "
                "where these are part of the text"
            )
        key = (
            names,
            read.separator,
            read.quoting.quoted,
            bool(read.quoting.blank),
            read.skipped,
            tuple(read.part.keys.items()),
        )
        groups.setdefault(key, []).append(read)
    return [
        _section(group, list(names), asked, format, places is None, layout).with_keys(group[0].part.keys)  # type: ignore[call-overload]
        for (names, *_), group in groups.items()
    ]


def _read(part: Part, separator: str, layout: Layout, work: Path | None, asked: Asked) -> _Read:
    quotes = layout.has_quotes(separator)
    look = Look(separator, quotes) if len(separator) == 1 and separator.isascii() else None
    plain, notes, seen = plain_text(part, layout, work, asked, look.add if look else None)
    head = plain.head()
    if head[:4].lower() == b"sep=":
        raise LogError(
            f"{part.path} begins with a spreadsheet's own line, sep=: remove it, and name the separator with "
            f"{asked.option('separator')}"
        )
    if separator == " " and b'"' not in head:
        quotes, seen = False, False
        plain = make_copy(map(_single_blanks, plain.lines()), work)
    elif len(separator) > 1 or not separator.isascii():
        quotes = False
        plain, separator = _joined(plain, separator, work, part), JOINER
    quoting = look.result() if look and seen else look_at_quotes(plain, separator, quotes)
    if quoting.quoted and not quoting.tidy:
        trusted = layout.quotes == "double"
        plain = with_tidy_quotes(plain, part.shown, separator, work, asked, trusted=trusted)
        quoting = replace(look_at_quotes(plain, separator, True), quoted=True)
    rows = [tuple(row) for row in first_rows(plain, separator, quoting.quoted)]
    if not rows:
        raise LogError(f"{part.path} is empty: give a file with rows")
    return _Read(part, plain, separator, quoting, rows, 0, tuple(notes))


def _refuse_wide_rows(part: Part, quoting: Quoting, fields: int, asked: Asked) -> None:
    """Refuses a file in which a row has more fields than the first: something stands in the wrong column there."""
    if quoting.widest > fields:
        raise LogError(
            f"{asked.noun} {part.shown}: line {quoting.line} has {quoting.widest} fields, where the first has "
            f"{fields}: mend it or the first line, or say what stands between and around fields, "
            f"{asked.option('separator')} and {asked.option('quotes')}"
        )


def _single_blanks(line: bytes) -> bytes:
    return b" ".join(line.split()) + b"\n"


def _joined(plain: Plain, separator: str, work: Path | None, part: Part) -> Plain:
    between, joiner = separator.encode(), JOINER.encode()
    if any(joiner in block for block in plain.blocks()):
        raise LogError(
            f"{part.path} holds unit separators (0x1F), which a separator {separator!r} cannot stand beside"
        )
    return make_copy((line.replace(between, joiner) for line in plain.lines()), work)


def _lines_to_names(plain: Plain) -> int:
    for number, line in enumerate(plain.lines(), start=1):
        if line.strip():
            return number
    return 0


def _has_names(fields: Sequence[str], places: Mapping[str, str], known: Mapping[str, Sequence[str]]) -> bool:
    """Whether the first line of a file that is read by places is one of names nevertheless, and no row."""
    numbers = [str(first + place) for first in (0, 1) for place in range(len(fields))]
    if list(fields) in (numbers[: len(fields)], numbers[len(fields) :]) and len(fields) > 2:
        return True
    there = {field: fields[int(place) - 1] for field, place in places.items() if int(place) <= len(fields)}
    if "time" in places:
        text = there.get("time", "".join(fields))
        return all(map(looks_like_a_name, there.values())) and not any(map(str.isdigit, text))
    return any(text.lower() in known.get(field, ()) for field, text in there.items())


def _section(
    reads: list[_Read], names: list[str], asked: Asked, format: str, named: bool, layout: Layout
) -> Section:
    first = reads[0]
    found = Found(
        f"{asked.noun} {first.part.shown}",
        names,
        asked,
        may_lack_names=named,
        may_be_a_row=named and asked.noun == "log" and not _differs_from_rows(first.rows),
        by_place=not named,
        hint=_hint(first, asked, layout) if format in ("csv", "tsv") else "",
    )
    inner = [f"{place}" for place in range(len(names))]
    frame = pl.scan_csv(
        [read.plain.path for read in reads],
        separator=first.separator,
        has_header=False,
        skip_lines=first.skipped,
        schema=dict.fromkeys(inner, pl.String()),
        quote_char='"' if first.quoting.quoted else None,
        encoding="utf8-lossy",
        missing_columns="insert",
        glob=False,
    )
    blank = first.quoting.blank
    if blank:
        frame = frame.filter(pl.any_horizontal(pl.all().is_not_null()))
    own = dict(zip(reversed(names), reversed(inner), strict=True))

    def scan(asked_for: Sequence[str], optional: Collection[str] = ()) -> pl.LazyFrame:
        return frame.select(pl.col(own[name]).alias(name) for name in asked_for)

    return Section(
        found,
        dict.fromkeys(names, pl.String()),
        scan,
        None if blank else sum(read.quoting.rows - first.skipped for read in reads),
        tuple(note for read in reads for note in read.notes),
        tuple(read.plain for read in reads),
    )


def _differs_from_rows(rows: Sequence[Sequence[str]]) -> bool:
    """Whether a first line is no row for sure: it has no digit where the next line has one, as a time has."""
    digits = [[any(map(str.isdigit, field)) for field in row] for row in rows]
    return len(rows) > 1 and any(after and not before for before, after in zip(*digits, strict=False))


def _hint(read: _Read, asked: Asked, layout: Layout) -> str:
    """What separator or quotes the first line has in truth, where it is one column, or its names stand in quotes."""
    line = next((line for line in read.plain.lines() if line.strip()), b"").decode("utf-8", "replace")
    if read.rows[0][0].startswith(("{", "[")):
        return f"it holds JSON: say {asked.option('format')} jsonl"
    if len(read.rows[0]) == 1:
        for candidate, shown in _CANDIDATES:
            if candidate in line and candidate != read.separator:
                return f"its first line is one column, with {shown} in it: say {asked.option('separator')} {shown}"
    if _stands_in_quotes(read, layout, read.rows[:1]):
        return f"its column names stand in quotes: say {asked.option('quotes')} double"
    return ""


def _stands_in_quotes(read: _Read, layout: Layout, rows: Sequence[Sequence[str]]) -> bool:
    """Whether all fields of rows stand in quotes that are read as text, though nobody said so."""
    fields = [field for row in rows for field in row]
    in_quotes = all(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)
    return layout.quotes == "auto" and not read.quoting.quoted and in_quotes


def movielens(parts: Sequence[Part], layout: Layout, work: Path | None, asked: Asked) -> list[Section]:
    """The section of a MovieLens file without names: ratings.dat, u.data, movies.dat.

    Raises:
        LogError: it is none of them.
    """
    part = parts[0]
    plain, notes, _ = plain_text(part, layout, work, asked)
    line = plain.head().partition(b"\n")[0].decode("utf-8", "replace")
    separator, fields = "\t", line.split("\t")
    if "::" in line:
        separator, fields = "::", line.split("::")
    names: tuple[str, ...] = {len(RATINGS): RATINGS, len(_ITEMS_OF_DAT): _ITEMS_OF_DAT}.get(len(fields), ())
    if not names:
        expected = "user, item, rating, timestamp" if asked.noun == "log" else "item, title, genres"
        raise LogError(
            f"{part.path} is no MovieLens file, as its name would say: expected {expected}; say what it is with "
            f"{asked.option('format')} and {asked.option('columns')}"
        )
    places = [str(place) for place in range(len(names))]
    if separator == "::" and len(line.split(":")) == 2 * len(names) - 1 and names is RATINGS:
        # Read at ":", every second field is empty, and no copy is needed.
        separator, places = ":", [str(place) for place in range(2 * len(names) - 1)]
    elif separator == "::":
        plain, separator = _joined(plain, separator, work, part), JOINER
    quoting = look_at_quotes(plain, separator, False)
    _refuse_wide_rows(part, quoting, len(places), asked)
    frame = pl.scan_csv(
        plain.path,
        separator=separator,
        has_header=False,
        schema=dict.fromkeys(places, pl.String()),
        quote_char=None,
        encoding="utf8-lossy",
        missing_columns="insert",
        glob=False,
    )
    own = dict(zip(names, places[:: 2 if separator == ":" else 1], strict=True))

    def scan(asked_for: Sequence[str], optional: Collection[str] = ()) -> pl.LazyFrame:
        return frame.select(pl.col(own[name]).alias(name) for name in asked_for)

    found = Found(f"{asked.noun} {part.shown}", names, asked)
    return [Section(found, dict.fromkeys(names, pl.String()), scan, quoting.rows, tuple(notes), (plain,))]


def format_by_first_line(part: Part, layout: Layout, asked: Asked) -> tuple[str, Layout]:
    """The format of a file that is named as MovieLens' are, and is read by places or with a separator: CSV or TSV."""
    if layout.separator is not None:
        return "csv", layout
    plain, _, _ = plain_text(part, layout, None, asked)
    line = plain.head().partition(b"\n")[0]
    if b"::" in line:
        return "csv", replace(layout, separator="::")
    return ("tsv" if b"\t" in line else "csv"), layout
