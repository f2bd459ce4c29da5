"""JSON lines, one object an event; arrays of objects, objects over several lines, and lines of Python's own spelling.

Plain lines are scanned by polars, the asked columns alone. What polars does not read (NaN, arrays, single quotes)
goes through Python's reader into a copy first, which holds the asked columns alone.
"""

from __future__ import annotations

import ast
import codecs
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from common.events.fields import Found
from common.events.layout import Asked, Layout
from common.events.parts import Part
from common.events.plain import Plain, make_copy, plain_text
from common.events.schema import LogError
from common.events.table import Section

LOOKED_AT = 1_000
"""So many objects of each part of a log say what columns there are; a catalog's all do."""

_LONGEST = 1 << 26
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_LONG_NUMBER = re.compile(rb"\d{19}")
_ODD = ((b"N", b"NaN"), (b"I", b"Infinity"), (b"\\", b"\\ud"), (b"\\", b"\\uD"))
_PASSED_OVER = bytes(byte for byte in range(256) if byte not in b"NI\\{[\n")
_NESTED_KEY = re.compile(rb'"((?:[^"\\]|\\.){0,256})"[ \t]*:[ \t]*[\[{]')


@dataclass(frozen=True)
class _Objects:
    """The objects of a part, one after the other, however they are written."""

    part: Part
    plain: Plain
    asked: Asked

    def fault(self, where: str) -> LogError:
        return LogError(
            f"{self.part.path}: {where} is no JSON object: look for a damaged line or a cut-off file"
        )

    def kind(self) -> str:
        """ "lines", "python" or "stream"."""
        head = self.plain.head().lstrip()
        if head[:1] not in (b"{", b"["):
            raise LogError(
                f"{self.part.path} does not begin as JSON does: name its format with {self.asked.option('format')}"
            )
        if head[:1] == b"[":
            return "stream"
        if re.match(rb"\{\s*'", head):
            return "python"
        line = next((line for line in self.plain.lines() if line.strip()), b"")
        try:
            json.loads(line)
        except ValueError:
            return "stream"
        return "lines"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kind = self.kind()
        values = self._stream() if kind == "stream" else self._lines(kind)
        for value in values:
            if not isinstance(value, dict):
                what = "a list" if isinstance(value, (list, tuple)) else "a text or number"
                raise LogError(
                    f"{self.part.path} holds {what} where an object is to be: write an object a row"
                )
            yield value

    def _lines(self, kind: str) -> Iterator[Any]:
        for number, line in enumerate(self.plain.lines(), start=1):
            text = line.decode("utf-8", "replace").strip()
            if not text:
                continue
            try:
                yield ast.literal_eval(text) if kind == "python" else json.loads(text, strict=False)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise self.fault(f"line {number}") from error

    def _stream(self) -> Iterator[Any]:
        decoder, bytes_decoder = (
            json.JSONDecoder(strict=False),
            codecs.getincrementaldecoder("utf-8")("replace"),
        )
        blocks = self.plain.blocks()
        text, number = bytes_decoder.decode(next(blocks, b"")).lstrip(), 0
        in_array = text[:1] == "["
        place = 1 if in_array else 0
        while True:
            between = _BETWEEN.match(text, place)
            assert between is not None  # it matches anywhere
            place = between.end()
            if in_array and text[place : place + 1] == "]":
                return
            try:
                value, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                more = next(blocks, None) if len(text) - place < _LONGEST else None
                if more is None:
                    if place == len(text) and not in_array:
                        return
                    raise self.fault(f"object {number + 1}") from error
                text, place = text[place:] + bytes_decoder.decode(more), 0
                continue
            number += 1
            yield value


def json_lines(
    parts: Sequence[Part], layout: Layout, work: Path | None, asked: Asked, mapped: Sequence[str] = ()
) -> list[Section]:
    """Sections of JSON, a part each.

    Args:
        mapped: names of columns that are there, though the first objects may lack them.

    Raises:
        LogError: a part is no JSON, or holds something else than objects.
    """
    return [_section(part, layout, work, asked, mapped).with_keys(part.keys) for part in parts]


def _section(part: Part, layout: Layout, work: Path | None, asked: Asked, mapped: Sequence[str]) -> Section:
    oddities = _Oddities()
    plain, notes, seen = plain_text(part, layout, work, asked, oddities.add)
    if not seen:
        oddities = _Oddities()
        for block in plain.blocks():
            oddities.add(block)
    objects = _Objects(part, plain, asked)
    types: dict[str, pl.DataType] = {}
    for each in islice(objects, LOOKED_AT if asked.noun == "log" else None):
        for name, value in each.items():
            known = types.setdefault(name, pl.String())
            if isinstance(value, dict):
                types[name] = pl.Struct([])
            elif isinstance(value, (list, tuple)) and known == pl.String():
                types[name] = pl.List(pl.String())
    if types and all(dtype.is_nested() for dtype in types.values()):
        raise LogError(
            f"{part.path} holds objects within an object: write one object for each {_row(asked)}, a line each"
        )

    for name in mapped:
        if name not in types and any(name in each for each in objects):
            types[name] = pl.String()
    copies: list[Plain] = [plain]

    def scan(asked_for: Sequence[str], optional: Collection[str] = ()) -> pl.LazyFrame:
        wanted = {name: types.get(name, pl.String()) for name in asked_for}
        source = plain
        if _needs_python(objects, wanted, oddities):
            source = make_copy(_rewritten(objects, wanted, optional, asked), work)
            copies.append(source)
        return pl.scan_ndjson([source.path], schema=wanted)

    found = Found(f"{asked.noun} {part.shown}", list(types), asked)

    def look_again() -> None:
        for _ in objects:  # which says what line is none
            pass

    return Section(found, types, scan, None, tuple(notes), copies, look_again)


def _row(asked: Asked) -> str:
    return "event" if asked.noun == "log" else "item"


class _Oddities:
    """What of a file of JSON lines polars does not read as Python does, found block by block."""

    def __init__(self) -> None:
        self.odd = False  # numbers that are none, or have more digits than it reads; halves of letters
        self.nested: set[bytes] = set()  # names of columns, at any depth, that hold objects or lists
        self._tail = b""

    def add(self, block: bytes) -> None:
        """Looks at the next block."""
        both = self._tail + block
        few = both.translate(None, _PASSED_OVER)
        if not self.odd:
            words = [word for begin, word in _ODD if begin in few]
            self.odd = any(word in both for word in words) or _has_long_numbers(both)
        if b"[" in few or b"{{" in few:
            self.nested.update(_NESTED_KEY.findall(both))
        self._tail = both[-256:]


def _has_long_numbers(text: bytes) -> bool:
    """Whether there is a run of 19 digits; of text with 16 or more, also those that there seem to be."""
    digits = np.frombuffer(text, dtype=np.uint8)[::3] - np.uint8(48) < 10
    runs = digits[:-5].copy()
    for place in range(1, 6):
        runs &= digits[place : len(digits) - 5 + place]
    return bool(runs.any()) and _LONG_NUMBER.search(text) is not None


def _needs_python(objects: _Objects, wanted: Mapping[str, pl.DataType], oddities: _Oddities) -> bool:
    if objects.kind() != "lines" or oddities.odd or any(each.is_nested() for each in wanted.values()):
        return True
    names = {json.dumps(name, ensure_ascii=False)[1:-1].encode() for name in wanted}
    return not names.isdisjoint(oddities.nested)


def _rewritten(
    objects: _Objects, wanted: Mapping[str, pl.DataType], optional: Collection[str], asked: Asked
) -> Iterator[bytes]:
    for each in objects:
        row: dict[str, Any] = {}
        for name, dtype in wanted.items():
            value = each.get(name)
            if isinstance(dtype, pl.List):
                row[name] = None if value is None else list(_leaves(value))
            elif isinstance(value, (dict, list, tuple)):
                if name not in optional:
                    what = "an object" if isinstance(value, dict) else "a list"
                    raise LogError(
                        f"{asked.noun} {objects.part.shown}: column {name!r} holds {what} in some rows, where a row is "
                        f"to have one: write one of its fields as a column of its own, or a row for each"
                    )
                row[name] = None
            else:
                row[name] = _text(value)
        yield json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _leaves(each)
    else:
        text = _text(value)
        if text is not None:
            yield text


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value == int(value) and abs(value) < 2**53:
        return f"{int(value)}.0"
    # Half of a pair of code units is no letter: lost, and never taken for another.
    return str(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
