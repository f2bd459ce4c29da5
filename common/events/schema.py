"""The one schema of a behaviour log. Readers write it; cleaning reads it."""

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


class LogError(ValueError):
    """A log or catalog cannot be read as asked: one line, with the way out, and nothing about a user."""
