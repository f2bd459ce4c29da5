"""The one schema of a behaviour log, and what counts as a time. Readers write it; cleaning reads it."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

EVENT_SCHEMA: Mapping[str, pl.DataType] = {
    "user": pl.String(),
    "item": pl.String(),
    "time": pl.Int64(),
    "kind": pl.String(),
    "value": pl.Float32(),
}
"""user and item: ids as text. time: whole seconds since 1970-01-01 UTC. value: nullable."""

DEFAULT_KIND = "view"
"""The kind of an event whose log does not say; logs of ratings say "rating"."""

MILLISECONDS_FROM = 1e11
"""A number of this magnitude or more is milliseconds (from 1973 on); as seconds it would be the year 5138."""

LATEST = 1e14
"""A number of this magnitude or more is no time."""


class LogError(ValueError):
    """A log or catalog cannot be read as asked: one line, with the way out, and nothing about a user."""


def id_expression(name: str, dtype: pl.DataType) -> pl.Expr:
    """Column `name` as id text: trimmed, and 17850.0 (a whole float) as 17850.

    Empty ids are null, and so are ids in another encoding than UTF-8: read approximately, two users could
    become one, and share a row.
    """
    column = pl.col(name)
    if dtype.is_float():
        whole = column.is_finite() & (column == column.floor()) & (column.abs() < 2.0**53)
        text = pl.when(whole).then(column.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(None)
    else:
        text = column.cast(pl.String)
    text = text.str.strip_chars()
    known = (text.str.len_bytes() > 0) & ~text.str.contains("\ufffd", literal=True)
    return pl.when(known).then(text).otherwise(None)


def time_expression(name: str, dtype: pl.DataType) -> pl.Expr:
    """Column `name` as whole seconds since the epoch, UTC; what is no time becomes null.

    Numbers (also as text) are epoch seconds, or milliseconds from `MILLISECONDS_FROM` on. Text may be
    ISO 8601, with or without offset; times without one are read as UTC.
    """
    column = pl.col(name)
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        return column.cast(pl.Datetime("ms", getattr(dtype, "time_zone", None))).dt.epoch("s")
    if dtype.is_integer():
        return _from_whole(column.cast(pl.Int64, strict=False))
    if dtype.is_numeric():
        return _from_number(column.cast(pl.Float64))
    if dtype != pl.String:
        return pl.lit(None, dtype=pl.Int64)
    return column.map_batches(_from_text, return_dtype=pl.Int64, is_elementwise=True)


def _from_text(texts: pl.Series) -> pl.Series:
    whole = pl.DataFrame({"number": texts.cast(pl.Int64, strict=False)})
    times = whole.select(_from_whole(pl.col("number"))).to_series()
    odd = (times.is_null() & texts.is_not_null()).arg_true()  # reading these is slow, and most logs have none
    if not len(odd):
        return times
    return times.scatter(odd, _from_odd_text(texts.gather(odd)))


def _from_odd_text(texts: pl.Series) -> pl.Series:
    text = pl.col("text")
    frame = pl.DataFrame({"text": texts.str.strip_chars()})
    frame = frame.with_columns(time=_from_number(text.cast(pl.Float64, strict=False)))
    if frame["time"].null_count():  # reading dates is slower still
        frame = frame.with_columns(time=pl.coalesce(pl.col("time"), _from_iso(text)))
    return frame["time"]


def _from_whole(number: pl.Expr) -> pl.Expr:
    """As `_from_number`, for int64."""
    seconds, latest = int(MILLISECONDS_FROM), int(LATEST)
    is_seconds = (number > -seconds) & (number < seconds)
    known = (number > -latest) & (number < latest)
    return pl.when(is_seconds).then(number).when(known).then(number.floordiv(1000)).otherwise(None)


def _from_number(number: pl.Expr) -> pl.Expr:
    seconds = pl.when(number.abs() < MILLISECONDS_FROM).then(number).otherwise(number / 1000)
    known = number.is_finite() & (number.abs() < LATEST)
    return pl.when(known).then(seconds.floor()).otherwise(None).cast(pl.Int64, strict=False)


def _from_iso(text: pl.Expr) -> pl.Expr:
    plain = (
        text.str.replace("T", " ", literal=True)
        .str.replace(r" ?[Zz]$", "+0000")
        .str.replace(r" ?([+-]\d\d):?(\d\d)?$", "${1}${2}")
    )
    # A date ends in "-07", which is no offset: offsets count only after a clock time.
    clocked = text.str.contains(r"\d:\d\d")
    plain = pl.when(clocked).then(plain).otherwise(text)
    plain = plain.str.replace(r"^(\S+ \d\d:\d\d)($|[+-])", "${1}:00${2}")
    plain = plain.str.replace(r"(:\S*[+-]\d\d)$", "${1}00")
    forms = ("%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%d %H:%M:%S%.f")
    times = [plain.str.to_datetime(form, strict=False, time_unit="ms", time_zone="UTC") for form in forms]
    day = plain.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")
    return pl.coalesce(*times, day).dt.epoch("s")
