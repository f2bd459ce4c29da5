"""Table: a log or catalog that is open, in sections of parts that have the same columns, each scanned lazily."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import polars as pl

from common.events.fields import Found
from common.events.plain import Plain

_NOTES_AT_MOST = 3


class Scan(Protocol):
    """Scans the columns of these names, lazily; what an `optional` one has that is no scalar may become null."""

    def __call__(self, asked_for: Sequence[str], optional: Collection[str] = ()) -> pl.LazyFrame: ...


@dataclass(frozen=True)
class Section:
    """Parts that have the same columns.

    Attributes:
        found: their columns, for picking.
        types: of the columns, by name.
        scan: the columns that are asked for, lazily.
        rows: how many there are, where the files say.
        notes: what is to be said of the parts, a line each.
        kept: copies that live as long as they are read.
        look_again: where the library could not read the parts to their end: raises a `LogError` that says why,
            where the cause is found.
    """

    found: Found
    types: Mapping[str, pl.DataType]
    scan: Scan
    rows: int | None = None
    notes: tuple[str, ...] = ()
    kept: Sequence[Plain] = ()
    look_again: Callable[[], None] = lambda: None

    def with_keys(self, keys: Mapping[str, str | None]) -> Section:
        """The section, with columns that its folders name where its files have none of that name."""
        keys = {name: value for name, value in keys.items() if name not in self.types}
        if not keys:
            return self
        names = [*self.found.names, *keys]
        found = replace(self.found, names=names)

        def scan(asked_for: Sequence[str], optional: Collection[str] = ()) -> pl.LazyFrame:
            own = [name for name in asked_for if name not in keys]
            # A scan of no column at all would not know how many rows there are.
            frame = self.scan(own or list(self.found.names)[:1], optional)
            named = (pl.lit(keys[name], dtype=pl.String).alias(name) for name in asked_for if name in keys)
            return frame.select(*own, *named)

        types = {**self.types, **dict.fromkeys(keys, pl.String())}
        return replace(self, found=found, types=types, scan=scan)


@dataclass(frozen=True)
class Table:
    """A table in sections, read as one format."""

    sections: tuple[Section, ...]
    format: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the files, a line each; of many files the first ones, and how many more there are."""
        notes = [note for section in self.sections for note in section.notes]
        more = len(notes) - _NOTES_AT_MOST
        return (
            tuple(notes)
            if more <= 0
            else (*notes[:_NOTES_AT_MOST], f"so much was to be said of {more:,} files more")
        )

    @property
    def kept(self) -> tuple[Plain, ...]:
        """Copies that live as long as the table is read."""
        return tuple(plain for section in self.sections for plain in section.kept)

    def look_again(self) -> None:
        """Raises a `LogError` that says why the table cannot be read to its end, where the cause is found."""
        for section in self.sections:
            section.look_again()
