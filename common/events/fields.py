"""Fields: which column of a file is which, by name or by place, and what is said where none is.

A column's name stands in messages; a file without names has a user's first event where names would be. So a line
that does not look like names is never quoted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from common.events.layout import Asked
from common.events.schema import LogError

_NAME = re.compile(r"[^\W\d][^@\x00-\x1f\ufffd]{0,63}\Z")
_DIGITS_AT_MOST = 0.4  # of a name's letters, or two
_SHOWN_AT_MOST = 40
_PLACE = re.compile(r"(?:0|[1-9]\d{0,3})\Z")


@dataclass(frozen=True, slots=True)
class Found:
    """The columns of a file, or of parts that have the same.

    Attributes:
        shown: the file in messages: "log events.csv".
        names: of its columns; where it has no line of names, their places: "1", "2", ...
        asked: what is read, for messages.
        may_lack_names: whether the names are a first line that may be a row in truth.
        may_be_a_row: whether that line cannot be told from the next one: it is not quoted then.
        hint: what is odd of the file, with the way out, where columns are missing.
        by_place: whether the names are places.
    """

    shown: str
    names: Sequence[str]
    asked: Asked
    may_lack_names: bool = False
    may_be_a_row: bool = False
    hint: str = ""
    by_place: bool = False


def looks_like_a_name(text: str) -> bool:
    """Whether a text can be the name of a column: no number, time, address or long text."""
    text = text.strip().strip('"').lstrip("#(")
    digits = sum(map(str.isdigit, text))
    return not text or (_NAME.match(text) is not None and digits <= max(2, _DIGITS_AT_MOST * len(text)))


def are_places(columns: Mapping[str, str] | None) -> bool:
    """Whether all of the columns that a person names are places, from 1 on."""
    return bool(columns) and all(_PLACE.match(name) for name in (columns or {}).values())


def pick_columns(
    found: Found,
    columns: Mapping[str, str] | None,
    known: Mapping[str, Sequence[str]],
    required: Sequence[str],
) -> dict[str, str]:
    """Which of the columns is which field: as mapped by `columns`, else by a `known` name.

    Args:
        columns: field -> name of the column, the caller's word.
        known: field -> names that need no mapping, matched without regard to case.

    Raises:
        LogError: a mapped column is not there or stands there twice, a field is unknown, a required one has no
            column, or the line of names looks like a row.
    """
    option = found.asked.option("columns")
    columns = columns or {}
    by_lower = {name.lower(): name for name in reversed(found.names)}
    picked: dict[str, str] = {}
    for field, name in columns.items():
        if field not in known:
            raise LogError(
                f"{found.shown}: there is no field {field!r} to map; fields are {', '.join(known)}"
            )
        if name not in found.names:
            raise _missing(found, f"has no column {name!r} (for {field})", required, "")
        picked[field] = name
    for field, names in known.items():
        if field not in picked:
            fitting = next((by_lower[alias] for alias in names if alias in by_lower), None)
            if fitting is not None and fitting not in picked.values():
                picked[field] = fitting
    for field in required:
        if field not in picked:
            raise _missing(found, f"has no column for {field}", required, f". Map one with {field}=COLUMN")
    if found.may_lack_names and not all(map(looks_like_a_name, picked.values())):
        raise _no_names(found, required)
    twice = next((name for name in picked.values() if list(found.names).count(name) > 1), None)
    if twice is not None:
        raise LogError(
            f"{found.shown} has two columns {twice!r}: name them apart, or give places, {option} user=1,..."
        )
    return picked


def _missing(found: Found, what: str, required: Sequence[str], way_out: str) -> LogError:
    if found.may_lack_names and not all(map(looks_like_a_name, found.names)):
        return _no_names(found, required)
    if found.hint:
        return LogError(f"{found.shown} {what}: {found.hint}")
    if found.by_place:
        return LogError(
            f"{found.shown} {what}: read by places, it has {len(found.names)} columns, which "
            f"{found.asked.option('columns')} counts from 1"
        )
    if found.may_be_a_row:
        names = ",".join(f"{field}=NAME" for field in required)
        option = found.asked.option("columns")
        return LogError(
            f"{found.shown} {what}: say which it is, {option} {names}, or give places where the first line has no "
            f"names, {option} {_places(required)}"
        )
    shown = [name for name in found.names if name and looks_like_a_name(name)]
    there = ", ".join(shown[:_SHOWN_AT_MOST]) or "none that looks like a name"
    if len(shown) < len(found.names) or len(shown) > _SHOWN_AT_MOST:
        there += f" ({len(found.names)} in all)"
    return LogError(f"{found.shown} {what}; it has: {there}{way_out}")


def _no_names(found: Found, required: Sequence[str]) -> LogError:
    if found.hint:
        return LogError(f"{found.shown} cannot be read: {found.hint}")
    return LogError(
        f"{found.shown}: its first line does not look like column names; give places, such as "
        f"{found.asked.option('columns')} {_places(required)}"
    )


def _places(required: Sequence[str]) -> str:
    return ",".join(f"{field}={place}" for place, field in enumerate(required, start=1))


def check_type(found: Found, field: str, name: str, dtype: pl.DataType) -> None:
    """Refuses a column that cannot be one id, time or number a row.

    Raises:
        LogError: it holds lists or objects, or bytes.
    """
    if isinstance(dtype, (pl.List, pl.Array)):
        raise LogError(
            f"{found.shown}: column {name!r} (for {field}) holds lists, type {dtype}, where a row is to be one event: "
            "write a row for each, as polars' explode does"
        )
    if dtype.is_nested():
        raise LogError(
            f"{found.shown}: column {name!r} (for {field}) holds objects, type {_short(dtype)}: write the one of their "
            "fields that is meant as a column of its own"
        )
    if dtype in (pl.Binary, pl.Object):
        raise LogError(
            f"{found.shown}: column {name!r} (for {field}) holds bytes, type {dtype}: write it as text"
        )


def _short(dtype: pl.DataType) -> str:
    text = str(dtype).removesuffix("({})")
    return text if len(text) <= 80 else text[:76] + " ..."
