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
from collections.abc import Callable, Iterator
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
        blank: whether a line holds nothing.
    """

    quoted: bool
    tidy: bool
    rows: int
    widest: int
    line: int
    blank: bool


class Look:
    """A look at every quote, separator and line of a file, block by block.

    Args:
        separator: one ASCII character.
        quotes: whether fields may stand in quotes at all.
    """

    def __init__(self, separator: str, quotes: bool) -> None:
        self._between, self._quotes = ord(separator), quotes
        self._held, self._tail = b"", b"\n"  # what is not looked at yet; the last two bytes that are
        self._quoted, self._tidy, self._blank, self._inside = False, True, False, False
        self._rows = self._lines = self._carried = self._widest = self._line = 0
        self._passed_over = bytes(byte for byte in range(256) if byte not in (_NEWLINE, self._between))
        self._kinds = (_NEWLINE, self._between, _QUOTE)

    def add(self, block: bytes) -> None:
        """Looks at the next block."""
        block = self._held + block if self._held else block
        self._held = b""
        if self._quotes and block.endswith(b'"'):
            self._held = block  # what a quote does, the next byte says
        elif block:
            self._look(block)

    def result(self) -> Quoting:
        """What was seen, once all blocks were added."""
        if self._held:
            self._look(self._held)
            self._held = b""
        rows, widest, line = self._rows, self._widest, self._line
        if self._tail[-1] != _NEWLINE:
            rows += 1
            if self._carried + 1 > widest:
                widest, line = self._carried + 1, self._lines + 1
        return Quoting(self._quoted, self._tidy and not self._inside, rows, widest, line, self._blank)

    def _look(self, block: bytes) -> None:
        if self._quotes and (self._inside or b'"' in block):
            shortest = self._look_at_quotes(np.frombuffer(block, dtype=np.uint8))
        else:
            found = np.frombuffer(block.translate(None, self._passed_over), dtype=np.uint8)
            ends = np.flatnonzero(found == _NEWLINE)
            shortest = self._count(ends, len(found), lambda row: row)
            self._lines += len(ends)
        if shortest == 1:  # else no line is blank, which is dear to look for
            texts = (block, self._tail + block[:2])
            self._blank = self._blank or any(end in text for text in texts for end in (b"\n\n", b"\n\r\n"))
        self._tail = (self._tail + block[-2:])[-2:]

    def _look_at_quotes(self, data: npt.NDArray[np.uint8]) -> int:
        self._quoted = True
        marks = (data == _QUOTE) | (data == _NEWLINE) | (data == self._between)
        places = np.flatnonzero(marks)
        if not len(places):
            return 0
        kinds = data[places]
        quotes = kinds == _QUOTE
        so_far = np.cumsum(quotes, dtype=np.int32) + self._inside  # quotes up to each mark, itself too
        odd = (so_far & 1).astype(np.bool_)
        if self._tidy:
            alone = np.diff(places) > 1  # a mark that another byte follows
            begins, closes = quotes & odd, quotes & ~odd
            lonely = begins[1:] & alone
            tidy = not lonely.any() and (
                not begins[0] or places[0] == 0 or data[places[0] - 1] in self._kinds
            )
            loose = places[:-1][closes[:-1] & alone]
            tidy = tidy and bool((data[loose + 1] == _RETURN).all())
            if begins[0] and places[0] == 0:
                tidy = tidy and self._tail[-1] in self._kinds
            if closes[-1] and places[-1] + 1 < len(data):
                tidy = tidy and data[places[-1] + 1] == _RETURN
            self._tidy = bool(tidy) and not bool((odd & (kinds == _NEWLINE)).any())
        outside = ~odd & ~quotes
        rows = kinds[outside]
        ends = np.flatnonzero(rows == _NEWLINE)
        self._inside = bool(odd[-1])
        newlines = np.flatnonzero(kinds == _NEWLINE)
        shortest = self._count(
            ends, len(rows), lambda row: int(np.searchsorted(newlines, np.flatnonzero(outside)[ends[row]]))
        )
        self._lines += len(newlines)
        return shortest

    def _count(self, ends: npt.NDArray[np.int64], found: int, line_of: Callable[[int], int]) -> int:
        """Counts fields of rows: the places of rows' ends among so many ends and separators; the fewest of a row."""
        fields = np.diff(ends, prepend=-1 - self._carried)
        if len(fields) and (most := int(fields.max())) > self._widest:
            self._widest, self._line = most, self._lines + 1 + line_of(int(fields.argmax()))
        self._rows += len(ends)
        self._carried = found - 1 - int(ends[-1]) if len(ends) else self._carried + found
        return int(fields.min()) if len(fields) else 0


def look_at_quotes(plain: Plain, separator: str, quotes: bool) -> Quoting:
    """A `Look` at a whole file."""
    look = Look(separator, quotes)
    for block in plain.blocks():
        look.add(block)
    return look.result()


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
