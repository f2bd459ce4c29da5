"""Several ids in one field (a basket, a list of impressions): found by its first rows, and refused."""

from __future__ import annotations

import polars as pl

from common.events.fields import Found
from common.events.schema import LogError

_ROWS = 1_000
_LISTED = r"^\s*(\[.*\]|\{.*[:,].*\}|\(.*,.*\))\s*$"
_ID = r"[\w.-]*\d[\w.-]*"
_SEVERAL = rf"^\s*{_ID}(?:(?:\s+|\s*[,;|]\s*){_ID})+\s*$"


def refuse_several_ids(found: Found, name: str, table: pl.LazyFrame) -> None:
    """Refuses a column of items that holds lists as text, or several ids that stand apart.

    A column does where most of its first 1,000 texts read as a list; or as words with digits in them, of which there
    are more in some rows than in others.

    Raises:
        LogError: it does.
    """
    texts = table.select(pl.col(name)).head(_ROWS).collect().to_series().drop_nulls()
    if texts.dtype != pl.String or not len(texts):
        return
    listed = texts.str.contains(_LISTED)
    several = texts.str.contains(_SEVERAL)
    counts = texts.filter(several).str.extract_all(_ID).list.len()
    if 2 * listed.sum() > len(texts):
        what = "lists, as text"
    elif 2 * several.sum() > len(texts) and counts.n_unique() > 1:
        what = "several ids, as text"
    else:
        return
    raise LogError(
        f"{found.shown}: column {name!r} (for item) holds {what}, where a row is to be one event: write a row for "
        "each, as polars' str.split and explode do"
    )
