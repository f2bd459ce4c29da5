"""Ids of users and items: one rule for what an id is, in every format, log and catalog alike.

An id is text. Characters that nobody sees (controls, marks of direction, of joining, of byte order, soft hyphens) are
taken off wherever they stand, and blanks at the ends; letters are composed (Unicode's NFC); and a whole number that a
program wrote as a float, 101.0, is the id 101. Nothing else is changed: 007, A-1 and a1 are ids of their own, and
`near.py` counts those that differ by no more than that. Splitting a user in two is what must not happen: each half
would have a row, and a noise, of its own.
"""

from __future__ import annotations

import polars as pl

from common.events.fields import Found
from common.events.schema import LogError

_UNSEEN = r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\x{115F}\x{1160}\x{3164}\x{FFA0}\x{FE00}-\x{FE0F}]"
_FLOAT_PART = r"^([+-]?\d+)\.0+$"
_POWER = r"^[+-]?\d\.\d+[eE]\+?\d+$"
_EXACT: dict[pl.DataType, int] = {pl.Float32(): 2**24, pl.Float64(): 2**53}
_ROWS = 100_000


def id_expression(name: str, dtype: pl.DataType) -> pl.Expr:
    """Column `name` as id text: see the module. Empty ids are null.

    Ids in another encoding than UTF-8 are null, too: read approximately, two users could become one.
    """
    column = pl.col(name)
    if dtype.is_float():
        # What is no whole number, or too large to be exact, was refused by `check_ids`.
        whole = column.cast(pl.Int64, strict=False).cast(pl.String)
        return pl.when(column.is_finite()).then(whole).otherwise(None)
    if dtype.is_integer():
        return column.cast(pl.String)
    text = column.cast(pl.String).str.replace_all(_UNSEEN, "").str.strip_chars().str.normalize("NFC")
    text = text.str.replace(_FLOAT_PART, "$1")
    known = (text.str.len_bytes() > 0) & ~text.str.contains("\ufffd", literal=True)
    return pl.when(known).then(text).otherwise(None)


def check_ids(found: Found, field: str, name: str, dtype: pl.DataType, table: pl.LazyFrame) -> None:
    """Refuses a column whose ids are not what they were: numbers beyond a float's exactness, or no numbers of things.

    Floats are looked at whole; of texts the first 100,000, and each distinct user's once more (`numbering.py`).

    Raises:
        LogError: names the column and its type.
    """
    where = f"{found.shown}: column {name!r} (for {field})"
    if dtype == pl.Boolean or dtype.is_temporal():
        raise LogError(
            f"{where} is of type {dtype}, which is no id: name the column that holds the {field}'s"
        )
    column = pl.col(name)
    if dtype.is_float():
        bound = _EXACT.get(dtype, 2**11)
        known = pl.when(column.is_finite()).then(column)
        odd, large = (
            table.select(odd=(known != known.floor()).any(), large=(known.abs() > bound).any())
            .collect()
            .row(0)
        )
        if odd:
            raise LogError(
                f"{where} is of type {dtype} and has fractions, which ids have not: name the column that holds the "
                f"{field}'s ids, or write them as text"
            )
        if large:
            raise LogError(
                f"{where} is of type {dtype}, which tells whole numbers apart up to {bound:,} only, and has larger "
                "ones: write ids as text or whole numbers, from where they still are"
            )
    elif dtype == pl.String:
        check_digits(table.select(column).head(_ROWS).collect().to_series(), where)


def check_digits(texts: pl.Series, where: str) -> None:
    """Refuses ids whose last digits a program lost that took them for floats: two of them may be one text.

    Args:
        where: they stand, for the message.

    Raises:
        LogError: powers of ten, or whole numbers with a float's point beyond what 64 bits tell apart.
    """
    text = pl.col("text")
    whole = text.str.strip_chars().str.extract(_FLOAT_PART).str.strip_prefix("+")
    number = whole.cast(pl.Int64, strict=False)
    powers, large = (
        pl.DataFrame({"text": texts})
        .select(
            powers=text.str.contains(_POWER).any(),
            large=(whole.is_not_null() & (number.is_null() | (number.abs() > 2**53))).any(),
        )
        .row(0)
    )
    if powers or large:
        example = "1.2e+09, powers of ten" if powers else "9007199254740994.0, floats beyond 2^53"
        raise LogError(
            f"{where} has ids such as {example}, whose last digits are lost: write ids as text or whole numbers, from "
            "where they still are"
        )
