"""Parquet: parts whose columns or types differ are sections of their own, so that what is not asked for may differ."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import polars as pl

from common.events.fields import Found
from common.events.layout import Asked
from common.events.parts import Part
from common.events.schema import LogError
from common.events.table import Section


def parquet(parts: Sequence[Part], asked: Asked) -> list[Section]:
    """Sections of Parquet, parts of one schema and one partition together.

    Raises:
        LogError: a part is no Parquet file, or is cut off.
    """
    groups: dict[tuple[object, ...], list[Part]] = {}
    rows: dict[tuple[object, ...], int] = {}
    for part in parts:
        try:
            scanned = _scan([part])
            schema = scanned.collect_schema()
            count = int(scanned.select(pl.len()).collect().item())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise LogError(
                f"{part.path} cannot be read as parquet: it is of another format ({asked.option('format')} names "
                "one), damaged or cut off"
            ) from error
        key = (tuple(schema.items()), tuple(part.keys.items()))
        groups.setdefault(key, []).append(part)
        rows[key] = rows.get(key, 0) + count
    return [_section(group, asked, rows[key]).with_keys(group[0].keys) for key, group in groups.items()]


def _scan(parts: Sequence[Part]) -> pl.LazyFrame:
    return pl.scan_parquet([part.path for part in parts], hive_partitioning=False, glob=False)


def _section(parts: Sequence[Part], asked: Asked, rows: int) -> Section:
    frame = _scan(parts)
    schema = frame.collect_schema()

    def scan(asked_for: Sequence[str], optional: Collection[str] = ()) -> pl.LazyFrame:
        return frame.select(asked_for)

    return Section(Found(f"{asked.noun} {parts[0].shown}", schema.names(), asked), dict(schema), scan, rows)
