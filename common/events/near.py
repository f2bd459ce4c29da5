"""Ids that differ from another by next to nothing: by case, leading zeros, or separators and marks.

Nothing is put together: that two ids mean one is for the log's owner to say. What is near is counted before anything is
trained, as a user who is split in two has two rows, each under a noise of its own.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import polars as pl

_MARKS = r"[^\p{L}\p{M}\p{N}]"
_ZEROS = r"^0+([^0]|0$)"
_MOST_LOOKED_AT = 10_000
_AT_ONCE = 1 << 19
_NAMES = {
    ",": "a comma",
    ".": "a point",
    "-": "a hyphen",
    "_": "an underscore",
    " ": "a blank",
    "'": "an apostrophe",
}
_NAMES |= {'"': "a quotation mark", "/": "a slash", ":": "a colon", ";": "a semicolon", "#": "a hash sign"}


def near_ids(ids: pl.Series, others: pl.Series | None = None) -> tuple[int, tuple[str, ...]]:
    """How many ids differ from another one only by case, leading zeros, separators or marks, and by which of these.

    Args:
        ids: each once, as `ids.py` has them.
        others: what they are held against; None: one another.

    Returns:
        The count, and words such as ("case", "a comma"); the count of `ids` alone.
    """
    if others is None:
        hashes = _hashes(ids)
        near = _keyed(ids.filter(hashes.is_duplicated())).filter(pl.len().over("key") > 1)
        both = near
    else:
        held = _hashes(others)
        near = _keyed(ids.filter(_hashes(ids).is_in(held.implode())))
        against = _keyed(others.filter(held.is_in(_hashes(near["text"]).implode())))
        near = near.join(against.select("key").unique(), on="key", how="semi")
        both = pl.concat([near, against.join(near.select("key").unique(), on="key", how="semi")])
    if not len(near):
        return 0, ()
    looked = both.join(
        both.select("key").unique(maintain_order=True).head(_MOST_LOOKED_AT // 2), on="key", how="semi"
    )
    by = []
    groups = looked.group_by("key").agg(pl.col("low", "bare", "text").n_unique())
    if groups.filter(pl.col("bare") > pl.col("low")).height:
        by.append("case")
    if groups.filter(pl.col("low") > 1).height:
        by.append("leading zeros")
    marked = looked.filter(pl.col("text").n_unique().over("key", "bare") > 1)["text"]
    if len(marked):
        by.append(_marks_of(marked.to_list()))
    return len(near), tuple(by)


def _keyed(ids: pl.Series) -> pl.DataFrame:
    """Ids with what is left of them without marks (`bare`), without case (`low`), and without leading zeros (`key`)."""
    text = pl.col("text")
    bare = text.str.replace_all(_MARKS, "")
    bare = pl.when(bare.str.len_bytes() > 0).then(bare).otherwise(text)
    low = bare.str.to_lowercase()
    return pl.DataFrame({"text": ids}).with_columns(key=low.str.replace(_ZEROS, "$1"), low=low, bare=bare)


def _hashes(ids: pl.Series) -> pl.Series:
    """[ids] uint64 hashes of their keys, some ids at a time: of millions, few texts are held twice."""
    parts = [_keyed(ids.slice(start, _AT_ONCE))["key"].hash() for start in range(0, len(ids), _AT_ONCE)]
    return pl.concat(parts) if parts else pl.Series([], dtype=pl.UInt64)


def _marks_of(texts: Sequence[str]) -> str:
    marks = {sign for text in texts for sign in text if unicodedata.category(sign)[0] not in "LMN"}
    if len(marks) != 1:
        return "separators or marks"
    (mark,) = marks
    return _NAMES.get(mark, f"a mark ({unicodedata.name(mark, f'U+{ord(mark):04X}').lower()})")


def said_of_near(what: str, count: int, of: int, by: Sequence[str]) -> str:
    """A sentence for a report; empty where there is nothing to say."""
    if not count:
        return ""
    which = "whom" if what == "users" else "which"
    return f"{of:,} {what}, {count:,} of {which} differ from another only by {ways_of(by)}"


def ways_of(by: Sequence[str]) -> str:
    """The ways in which ids differ, as words."""
    return " or ".join([", ".join(by[:-1]), by[-1]] if len(by) > 1 else by)
