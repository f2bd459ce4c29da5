"""Times: the forms that are read, one for all numbers of a column, and whether what they come to can be believed.

A number alone says no unit. So a column of numbers is looked at as a whole: they are seconds, milliseconds,
microseconds or nanoseconds since 1970, or dates written together, as what most of them then lie between 1990 and 2100;
and a column of which none of this is true is read as seconds, which `Span` then refuses to believe. A `--time-format`
says it outright.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from common.events.fields import Found
from common.events.schema import LogError

FORMS = (
    "ISO 8601 (2017-07-14T02:40:00, with a blank for the T, a fraction, Z, UTC, GMT or +02:00), 2017-07-14, "
    "2017/07/14, 20170714, 20170714024000, RFC 2822 (Fri, 14 Jul 2017 02:40:00 +0000), and seconds, milliseconds, "
    "microseconds or nanoseconds since 1970"
)
"""The forms that need no `--time-format`."""

NAMED: dict[str, str] = {
    "epoch-s": "seconds since 1970-01-01 UTC",
    "epoch-ms": "milliseconds",
    "epoch-us": "microseconds",
    "epoch-ns": "nanoseconds",
    "compact": "YYYYMMDD, or with hhmm or hhmmss behind",
    "excel": "days since 1899-12-30, as spreadsheets count them",
}
"""What `--time-format` takes beside a pattern of strptime's."""

_PER_SECOND = {"epoch-s": 1, "epoch-ms": 10**3, "epoch-us": 10**6, "epoch-ns": 10**9}
_FROM, _UNTIL = 631_152_000, 4_102_444_800  # 1990 and 2100
_EARLIEST, _LATEST = -62_135_596_800, 253_402_300_799  # years 1 and 9999
_EXCEL_EPOCH = 25_569  # days from 1899-12-30 to 1970-01-01
_SAMPLE = 10_000
_DAY = 86_400
_EXACT_FLOAT32 = 2**24
_UNREADABLE_AT_MOST = 0.05

_ZONED = (
    "%Y-%m-%d %H:%M:%S%.f%z",
    "%a %d %b %Y %H:%M:%S %z",
    "%d %b %Y %H:%M:%S %z",
    "%a %b %d %H:%M:%S %z %Y",
    "%d/%b/%Y:%H:%M:%S %z",
)
_PLAIN = (
    "%Y-%m-%d %H:%M:%S%.f",
    "%a %d %b %Y %H:%M:%S",
    "%d %b %Y %H:%M:%S",
    "%a %b %d %H:%M:%S %Y",
)
_DAYS = ("%Y-%m-%d", "%d %b %Y", "%b %d %Y")
_COMPACT = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}


@dataclass(frozen=True, slots=True)
class TimeForm:
    """How a column's times are read.

    Attributes:
        unit: of its numbers: one of `NAMED`.
        pattern: of strptime's, for texts; None: the forms of `FORMS`.
    """

    unit: str = "epoch-s"
    pattern: str | None = None

    def expression(self, name: str, dtype: pl.DataType) -> pl.Expr:
        """Column `name` as whole seconds since 1970 UTC; what is no time in this form is null."""
        column = pl.col(name)
        if dtype == pl.Date or isinstance(dtype, pl.Datetime):
            return column.cast(pl.Datetime("ms", getattr(dtype, "time_zone", None))).dt.epoch("s")
        if dtype.is_numeric() and self.pattern is None:
            return self._of_numbers(column, dtype)
        texts = column.cast(pl.String)
        return texts.map_batches(self._of_texts, return_dtype=pl.Int64, is_elementwise=True)

    def _of_numbers(self, column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
        if self.unit == "compact":
            texts = column.cast(pl.Int64, strict=False).cast(pl.String)
            return texts.map_batches(_of_compact, return_dtype=pl.Int64, is_elementwise=True)
        if self.unit == "excel":
            seconds = ((column.cast(pl.Float64) - _EXCEL_EPOCH) * _DAY).round()
        elif dtype.is_integer():
            seconds = column.cast(pl.Int64, strict=False).floordiv(_PER_SECOND[self.unit])
        else:
            seconds = (column.cast(pl.Float64) / _PER_SECOND[self.unit]).floor()
        known = seconds.is_finite() if not dtype.is_integer() or self.unit == "excel" else pl.lit(True)
        known = known & seconds.is_between(_EARLIEST, _LATEST)
        return pl.when(known).then(seconds).otherwise(None).cast(pl.Int64, strict=False)

    def _of_texts(self, texts: pl.Series) -> pl.Series:
        if self.pattern is not None:
            return _by_pattern(texts, self.pattern)
        if self.unit == "compact":
            times = _of_compact(texts)
        else:
            whole = pl.DataFrame({"number": texts.cast(pl.Int64, strict=False)})
            times = whole.select(self._of_numbers(pl.col("number"), pl.Int64())).to_series()
        odd = (
            times.is_null() & texts.is_not_null()
        ).arg_true()  # reading these is slow, and most logs have none
        return times.scatter(odd, self._of_odd(texts.gather(odd))) if len(odd) else times

    def _of_odd(self, texts: pl.Series) -> pl.Series:
        texts = texts.str.strip_chars()
        frame = pl.DataFrame({"number": texts.cast(pl.Float64, strict=False)})
        if self.unit == "compact":
            frame = frame.with_columns(number=pl.lit(None, dtype=pl.Float64))
        times = frame.select(self._of_numbers(pl.col("number"), pl.Float64())).to_series()
        odd = (times.is_null() & frame["number"].is_null() & texts.is_not_null()).arg_true()
        return times.scatter(odd, _of_words(texts.gather(odd))) if len(odd) else times


def _of_compact(texts: pl.Series) -> pl.Series:
    text = pl.col("text")
    frame = pl.DataFrame({"text": texts.str.strip_chars().str.replace(r"\.0+$", "")})
    found = [
        pl.when(text.str.len_bytes() == length)
        .then(text)
        .otherwise(None)
        .str.to_datetime(pattern, strict=False, time_unit="ms")
        if length > 8
        else pl.when(text.str.len_bytes() == length)
        .then(text)
        .otherwise(None)
        .str.to_date(pattern, strict=False)
        .cast(pl.Datetime("ms"))
        for length, pattern in _COMPACT.items()
    ]
    return frame.select(pl.coalesce(found).dt.epoch("s")).to_series()


def _of_words(texts: pl.Series) -> pl.Series:
    """Texts that are no numbers, by `FORMS`."""
    text = pl.col("text")
    plain = (
        text.str.replace(r"^(\d{4})/(\d{1,2})/(\d{1,2})", "$1-$2-$3")
        .str.replace(r"^(\d{4})(\d\d)(\d\d)[T ](\d\d):?(\d\d):?(\d\d)", "$1-$2-$3 $4:$5:$6")
        .str.replace(r"^(\d{4}-\d{1,2}-\d{1,2})[Tt_]", "$1 ")
        .str.replace(r"(:\d\d),(\d+)", "$1.$2")
        .str.replace(r"(?i) ?(?:Z|UTC|GMT)$", " +0000")
        .str.replace(r"^([A-Za-z]{3}),", "$1")
    )
    # A date ends in "-07", which is no offset: offsets count only after a clock time.
    offset = plain.str.replace(r"(\d:\d\d(?::\d\d(?:\.\d+)?)?) ?([+-]\d\d):?(\d\d)?$", "${1}${2}${3}")
    offset = offset.str.replace(r"(:[\d.]+[+-]\d\d)$", "${1}00")
    offset = offset.str.replace(r"^(\d{4}-\S+ \d\d:\d\d)($|[+-])", "${1}:00${2}")
    offset = pl.when(plain.str.contains(r"^\d{4}-")).then(offset).otherwise(plain)
    frame = pl.DataFrame({"text": texts}).select(
        text=pl.when(text.str.contains(r"\d:\d\d")).then(offset).otherwise(plain)
    )
    zoned = [text.str.to_datetime(form, strict=False, time_unit="ms", time_zone="UTC") for form in _ZONED]
    naive = [
        text.str.to_datetime(form, strict=False, time_unit="ms").dt.replace_time_zone("UTC")
        for form in _PLAIN
    ]
    days = [
        text.str.replace_all(",", "")
        .str.to_date(form, strict=False)
        .cast(pl.Datetime("ms"))
        .dt.replace_time_zone("UTC")
        for form in _DAYS
    ]
    return frame.select(pl.coalesce(*zoned, *naive, *days).dt.epoch("s")).to_series()


def _by_pattern(texts: pl.Series, pattern: str) -> pl.Series:
    texts = texts.str.strip_chars()
    if "%p" in pattern or "%P" in pattern:
        texts = texts.str.replace_all(r"(?i)\b([ap])\.? ?m\.?(\W|$)", "${1}M${2}")
    clocked = any(
        part in pattern for part in ("%H", "%I", "%k", "%l", "%T", "%R", "%s", "%c", "%r", "%X", "%+")
    )
    if not clocked:
        return texts.str.to_date(pattern, strict=False).cast(pl.Datetime("ms")).dt.epoch("s")
    zoned = any(part in pattern for part in ("%z", "%:z", "%#z", "%+"))
    found = texts.str.to_datetime(
        pattern, strict=False, time_unit="ms", time_zone="UTC" if zoned else None, ambiguous="earliest"
    )
    return found.dt.epoch("s")


def checked_form(asked: str) -> TimeForm:
    """The form that a `--time-format` says.

    Raises:
        LogError: it is neither a name nor a pattern.
    """
    if asked in NAMED:
        return TimeForm(unit=asked)
    if "%" not in asked:
        raise LogError(
            f"--time-format {asked!r} is unknown: give one of {', '.join(NAMED)}, or a pattern such as "
            "'%d.%m.%Y %H:%M' or '%m/%d/%Y %I:%M:%S %p'"
        )
    try:
        _by_pattern(pl.Series(["x"]), asked)
    except pl.exceptions.PolarsError as error:
        raise LogError(
            f"--time-format {asked!r} is no pattern of strptime's: give one such as '%d.%m.%Y %H:%M'"
        ) from error
    return TimeForm(pattern=asked)


def form_of(found: Found, name: str, dtype: pl.DataType, table: pl.LazyFrame, asked: str | None) -> TimeForm:
    """How a column's times are read: as asked, or as its first values as a whole say.

    Raises:
        LogError: its type holds no times, or cannot tell them apart; or it has none in the form asked for.
    """
    where = f"{found.shown}: column {name!r} (for time)"
    texts = dtype == pl.String or isinstance(dtype, (pl.Categorical, pl.Enum))
    if not (texts or dtype.is_numeric() or dtype == pl.Date or isinstance(dtype, pl.Datetime)):
        raise LogError(
            f"{where} is of type {dtype}, which holds no instants: name a column of times, dates or numbers"
        )
    if isinstance(dtype, pl.Datetime) or dtype == pl.Date:
        return TimeForm()
    column = pl.col(name)
    if dtype == pl.Float32 and table.select((column.abs() > _EXACT_FLOAT32).any()).collect().item():
        raise LogError(
            f"{where} is of type Float32, which tells seconds of today apart to 128 s only: write times as whole "
            "numbers or text, from where they still are"
        )
    some = table.select(column.drop_nulls()).head(_SAMPLE).collect().to_series()
    if asked is not None:
        form = checked_form(asked)
        read = pl.DataFrame({name: some}).select(form.expression(name, some.dtype)).to_series()
        if len(some) and read.null_count() == len(some):
            raise LogError(
                f"{where} has no time in the form --time-format {asked!r}: give the form that it has"
            )
        return form
    return TimeForm(unit=_unit_of(some))


def _unit_of(some: pl.Series) -> str:
    """The unit in which most numbers of a sample are times of 1990 to 2100."""
    texts = some.cast(pl.String).str.strip_chars()
    numbers = texts.cast(pl.Float64, strict=False).drop_nulls().drop_nans()
    if not len(numbers):
        return "epoch-s"
    compact = _of_compact(
        texts if not some.dtype.is_float() else some.cast(pl.Int64, strict=False).cast(pl.String)
    )
    if _between(compact) > len(numbers) / 2:
        return "compact"
    shares = {
        unit: int(numbers.is_between(_FROM * scale, _UNTIL * scale).sum())
        for unit, scale in _PER_SECOND.items()
    }
    best = max(shares, key=lambda unit: shares[unit])
    return best if 2 * shares[best] > len(numbers) else "epoch-s"


def _between(times: pl.Series) -> int:
    return int(times.is_between(_FROM, _UNTIL).sum())


@dataclass(slots=True)
class Span:
    """From when to when a log's events are, and how many cannot be right.

    Attributes:
        first, last: seconds since 1970 UTC; None before the first event.
        early, late: events before 1990, and more than a day from now in the future.
    """

    now: float
    first: int | None = None
    last: int | None = None
    events: int = 0
    early: int = 0
    late: int = 0

    @classmethod
    def begin(cls, clock: Callable[[], float] = time.time) -> Span:
        """Of no events yet."""
        return cls(clock())

    def add(self, times: npt.NDArray[np.int64]) -> None:
        """Takes in some events."""
        if not len(times):
            return
        first, last = int(times.min()), int(times.max())
        self.first = first if self.first is None else min(self.first, first)
        self.last = last if self.last is None else max(self.last, last)
        self.events += len(times)
        self.early += int((times < _FROM).sum())
        self.late += int((times > self.now + _DAY).sum())

    @property
    def days(self) -> str:
        """The first day and the last."""
        if self.first is None or self.last is None:
            return "none"
        return f"{_day(self.first)} to {_day(self.last)}"

    def check(self) -> None:
        """Refuses a span that cannot be believed: most of it before 1990, or in the future.

        Raises:
            LogError: says the span, and how to go on.
        """
        if 2 * max(self.early, self.late) <= self.events or not self.events:
            return
        which = "before 1990" if self.early > self.late else "in the future"
        share = max(self.early, self.late) / self.events
        raise LogError(
            f"the log's times run from {self.days}, {share:.0%} of them {which}: give their form with --time-format "
            f"({', '.join(NAMED)}, or a pattern such as '%d.%m.%Y'), or --yes where they are right"
        )


def check_readable(unreadable: int, events: int) -> None:
    """Refuses a log of which too many events have no time that can be read.

    Raises:
        LogError: names the forms that are read, and how to go on.
    """
    if events and unreadable > _UNREADABLE_AT_MOST * events:
        raise LogError(
            f"{unreadable:,} of {events:,} events have no time that can be read: read are {FORMS}; give another form "
            "with --time-format, or --yes to drop these events"
        )


def check_times(frame: pl.LazyFrame, *, span: bool, forms: bool) -> None:
    """Refuses a log whose times cannot be believed, or for the most not be read; by one reading of its own.

    Args:
        frame: columns user, item and time, in seconds since 1970 UTC.
        span, forms: what is looked at.

    Raises:
        LogError: as `Span.check` and `check_readable`.
    """
    found = Span.begin()
    named, moment = pl.col("user").is_not_null() & pl.col("item").is_not_null(), pl.col("time")
    rows, unreadable, found.first, found.last, found.early, found.late = (
        frame.filter(named)
        .select(
            pl.len(),
            moment.is_null().sum(),
            first=moment.min(),
            last=moment.max(),
            early=(moment < _FROM).sum(),
            late=(moment > found.now + _DAY).sum(),
        )
        .collect(engine="streaming")
        .row(0)
    )
    found.events = rows - unreadable
    if forms:
        check_readable(unreadable, rows)
    if span:
        found.check()


def _day(seconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"the year {1970 + seconds // 31_556_952}"
