"""Quoting: which line ends and separators of a text file stand within quotes, so that no quote swallows a row.

The rule: a field is quoted when a quote begins it and a quote, before the next separator or line's end, ends it;
two quotes within are one. Quotes that stand otherwise (an inch mark, a word in quotes before other words) are
text, where the line then has as many fields as the first line. A quoted field may hold lines. But where every line
that it would swallow reads as a row of its own (as many fields, and one that begins with a digit wherever the first
row's does), nobody can tell a stray quote from a long field: that file is refused, until the person says which.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.events.layout import Asked
from common.events.plain import Plain, make_copy
from common.events.schema import LogError

_QUOTE, _NEWLINE, _RETURN = b'"\n\r'
_LINES_OF_A_FIELD = 10_000
_INNER = rb'[^"]*(?:""[^"]*)*'


@dataclass(frozen=True, slots=True)
class Quoting:
    """What quotes a file has.

    Attributes:
        quoted: whether it has any.
        tidy: whether all of them begin and end fields, and none has a line's end within.
        rows: lines whose end is not within quotes, the last one too.
        widest: fields of the row that has most.
        line: number of the line with which that row ends.
        blank: lines that hold nothing.
    """

    quoted: bool
    tidy: bool
    rows: int
    widest: int
    line: int
    blank: int


def look_at_quotes(plain: Plain, separator: str, quotes: bool) -> Quoting:
    """Looks at every quote, separator and line of a file.

    Args:
        separator: one ASCII character.
        quotes: whether fields may stand in quotes at all.
    """
    rows = widest = line = lines = carried = blank = begun = 0
    inside, quoted, tidy = False, False, True
    last, between = _NEWLINE, ord(separator)
    none = np.empty(0, dtype=np.int64)
    for block in _not_ending_in_quotes(plain.blocks()):
        data = np.frombuffer(block, dtype=np.uint8)
        at = none
        if quotes and (inside or b'"' in block):
            quoted = True
            at = np.flatnonzero(data == _QUOTE)
            begins, closes = (at[1::2], at[0::2]) if inside else (at[0::2], at[1::2])
            before = np.where(begins > 0, data[begins - 1], last)
            after = np.where(closes + 1 < len(data), data[np.minimum(closes + 1, len(data) - 1)], _NEWLINE)
            kinds = (between, _NEWLINE, _QUOTE)
            tidy = tidy and bool(np.isin(before, kinds).all() and np.isin(after, (*kinds, _RETURN)).all())
        ends, all_ends = _outside(data, _NEWLINE, at, inside)
        separators, _ = _outside(data, between, at, inside)
        tidy = tidy and len(ends) == all_ends
        fields = np.diff(np.searchsorted(separators, ends), prepend=-carried) + 1
        if len(fields) and (most := int(fields.max())) > widest:
            widest, end = most, ends[int(fields.argmax())]
            line = lines + 1 + int((data[:end] == _NEWLINE).sum())
        lengths = np.diff(ends, prepend=-1 - begun) - 1
        if len(lengths) and lengths.min() < 2:
            final = np.where(ends > 0, data[ends - 1], last)
            blank += int(((lengths == 0) | ((lengths == 1) & (final == _RETURN))).sum())
        if len(ends):
            carried, begun = -int(np.searchsorted(separators, ends[-1])), -1 - int(ends[-1])
        carried, begun = carried + len(separators), begun + len(data)
        rows, lines = rows + len(ends), lines + all_ends
        inside = (len(at) + inside) % 2 == 1
        last = block[-1]
    if last != _NEWLINE:
        rows += 1
        widest, line = max((widest, line), (carried + 1, lines + 1), key=lambda each: each[0])
    return Quoting(quoted, tidy and not inside, rows, widest, line, blank)


def _outside(
    data: npt.NDArray[np.uint8], value: int, quotes: npt.NDArray[np.int64], inside: bool
) -> tuple[npt.NDArray[np.int64], int]:
    """Places of a byte that are not within quotes, and how many there are in all."""
    places = np.flatnonzero(data == value)
    if not len(quotes) and not inside:
        return places, len(places)
    return places[(np.searchsorted(quotes, places) + inside) % 2 == 0], len(places)


def _not_ending_in_quotes(blocks: Iterator[bytes]) -> Iterator[bytes]:
    held = b""
    for block in blocks:
        held += block
        if not held.endswith(b'"'):
            yield held
            held = b""
    if held:
        yield held


def with_tidy_quotes(
    plain: Plain, shown: str, separator: str, work: Path | None, asked: Asked, *, trusted: bool
) -> Plain:
    """A copy of the file in which every quote begins or ends a field.

    Args:
        trusted: a quoted field is one, whatever it holds.

    Raises:
        LogError: a line's quotes cannot be read, or can be read two ways.
    """
    lines = _Lines(plain.lines(), shown, separator.encode(), asked, trusted)
    return make_copy(lines.tidied(), work)


class _Lines:
    """Lines of a file as rows whose quotes are tidy."""

    def __init__(
        self, source: Iterator[bytes], shown: str, separator: bytes, asked: Asked, trusted: bool
    ) -> None:
        self._source, self._put_back = source, deque[bytes]()
        self._shown, self._separator, self._asked, self._trusted = shown, separator, asked, trusted
        end = re.escape(separator)
        field = rb'(?:"' + _INNER + rb'"|[^"' + end + rb"]*)"
        self._whole = re.compile(rb"(?:" + field + end + rb")*" + field + rb"\r?\n?\Z")
        self._open = re.compile(rb"(?:" + field + end + rb')*"' + _INNER + rb"\Z")
        self._closing = re.compile(_INNER + rb'"(?=' + end + rb"|\r?\n?\Z)")
        self._field = _field(separator)
        self._number = 0
        self._count = 0  # fields of the first line
        self._digits: list[bool] | None = None  # which fields of the first row begin with a digit

    def tidied(self) -> Iterator[bytes]:
        """Rows, each with its end."""
        while (line := self._next()) is not None:
            row = line if b'"' not in line or self._whole.match(line) else self._row(line)
            if line.strip() and self._digits is None:
                fields = _fields(row, self._field)
                if self._count:
                    self._digits = _digits(fields)
                else:
                    self._count = len(fields)
                    row = row.rstrip(b"\r\n").replace(b"\r", b"").replace(b"\n", b" ") + b"\n"
            yield row

    def _next(self) -> bytes | None:
        line = self._put_back.popleft() if self._put_back else next(self._source, None)
        self._number += line is not None
        return line

    def _row(self, line: bytes) -> bytes:
        """The row that begins with a line whose quotes are not tidy by themselves."""
        began, fields = self._number, _fields(line, self._field)
        count = self._count or len(fields)
        digits = self._digits or _digits(fields)
        if self._open.match(line):
            more = self._lines_of_the_field()
            if more and len(_fields(b"".join([line, *more]), self._field)) == count:
                rows = len(fields) == count and all(
                    _is_row(_fields(each, self._field), digits) for each in more
                )
                if self._trusted or not rows:
                    return b"".join([line, *more])
                quotes = self._asked.option("quotes")
                raise LogError(
                    f"{self._shown}: lines {began} to {self._number} stand between two quotes, and read as rows of "
                    f"their own, too: say {quotes} none where quotes are text, or {quotes} double where they hold "
                    "one field"
                )
            self._give_back(more)
        if len(fields) != count:
            raise LogError(
                f"{self._shown}: the quotes of line {began} neither end where a field ends nor leave as many fields "
                f"as the first line has: mend the line, or say {self._asked.option('quotes')} none"
            )
        return self._separator.join(b'"' + field.replace(b'"', b'""') + b'"' for field in fields) + b"\n"

    def _lines_of_the_field(self) -> list[bytes]:
        """Lines up to the one that closes an open quote; those that were looked at, put back, where none does."""
        taken: list[bytes] = []
        while len(taken) < _LINES_OF_A_FIELD and (line := self._next()) is not None:
            taken.append(line)
            found = self._closing.match(line)
            if found is not None:
                rest = line[found.end() :].removeprefix(self._separator)
                if self._whole.match(rest):
                    return taken
                if not self._open.match(rest):
                    break
            elif b'"' in line.replace(b'""', b""):
                break
        self._give_back(taken)
        return []

    def _give_back(self, lines: list[bytes]) -> None:
        self._put_back.extendleft(reversed(lines))
        self._number -= len(lines)


def _field(separator: bytes) -> re.Pattern[bytes]:
    """A field, in quotes where they hold it whole, and what ends it."""
    end = re.escape(separator)
    return re.compile(rb'("' + _INNER + rb'"(?=' + end + rb"|\Z)|[^" + end + rb"]*)(?:" + end + rb"|\Z)")


def _fields(line: bytes, pattern: re.Pattern[bytes]) -> list[bytes]:
    """The fields of a line or of the lines of a row; quotes are text but where they hold a field."""
    fields, place, line = [], 0, line.rstrip(b"\r\n")
    while True:
        found = pattern.match(line, place)
        assert found is not None  # an empty field matches anywhere
        field = found.group(1)
        held = len(field) > 1 and field[:1] == b'"' == field[-1:]
        fields.append(field[1:-1].replace(b'""', b'"') if held else field)
        if found.end() == found.end(1):
            return fields
        place = found.end()


def _digits(fields: list[bytes]) -> list[bool]:
    return [field[:1].isdigit() for field in fields]


def _is_row(fields: list[bytes], digits: list[bool]) -> bool:
    return len(fields) == len(digits) and all(
        field[:1].isdigit() for field, digit in zip(fields, digits, strict=True) if digit
    )


def first_rows(plain: Plain, separator: str, quotes: bool) -> list[list[str]]:
    """The fields of a file's first two lines that are not blank, or of the one that there is."""
    lines = islice((line for line in plain.lines() if line.strip()), 2)
    pattern = _field(separator.encode())
    rows = (
        _fields(line, pattern) if quotes else line.rstrip(b"\r\n").split(separator.encode()) for line in lines
    )
    return [[field.decode("utf-8", "replace").strip() for field in row] for row in rows]
