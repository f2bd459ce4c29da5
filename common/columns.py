"""Options of commands that read a log or catalog: its format, its columns, and how its text is laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from common.events.catalog import CatalogFile
    from common.events.layout import Layout

_FORMATS = "auto (by its name), csv, tsv, parquet, jsonl, movielens or recbole."
_SEPARATOR = "Between fields, where the name does not say: ';', '|', '::', tab, space, ..."
_QUOTES = "Around fields: auto, double, or none (they are text). Auto: CSV has them, TSV does not."
_ENCODING = "Of text: auto (UTF-8, else Windows-1252), or a name such as gb18030."

LogFormat = Annotated[str, typer.Option("--format", help=f"Of the log: {_FORMATS}")]
LogColumns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="Of the log: user=NAME,item=NAME,time=NAME; without a line of names, user=1,item=2,...",
    ),
]
LogSeparator = Annotated[str | None, typer.Option("--separator", help=_SEPARATOR)]
LogQuotes = Annotated[str, typer.Option("--quotes", help=_QUOTES)]
LogEncoding = Annotated[str, typer.Option("--encoding", help=_ENCODING)]
LogTimes = Annotated[
    str | None,
    typer.Option(
        "--time-format",
        help="Of its times: epoch-s, epoch-ms, epoch-us, epoch-ns, compact, excel, or a pattern: '%d.%m.%Y %H:%M'.",
    ),
]
Sure = Annotated[bool, typer.Option("--yes", help="Take times as they are read, however odd.")]
CatalogFormat = Annotated[str, typer.Option("--catalog-format", help=f"Of the catalog: {_FORMATS}")]
CatalogColumns = Annotated[
    str | None,
    typer.Option(
        "--catalog-columns",
        help="Of the catalog: item=NAME,text=NAME,categories=NAME; or places, item=1,text=2",
    ),
]
CatalogSeparator = Annotated[str | None, typer.Option("--catalog-separator", help=_SEPARATOR)]
CatalogQuotes = Annotated[str, typer.Option("--catalog-quotes", help=_QUOTES)]
CatalogEncoding = Annotated[str, typer.Option("--catalog-encoding", help=_ENCODING)]


def column_mapping(text: str | None, option: str) -> dict[str, str]:
    """Field -> column, of `field=column,...`.

    Raises:
        UserError: the text reads otherwise, or names a field twice.
    """
    example = "item=Sku,text=Title" if "catalog" in option else "user=CustomerID,item=Sku"
    found: dict[str, str] = {}
    for each in text.split(",") if text else ():
        field, equals, column = (part.strip() for part in each.partition("="))
        if not equals or not column:
            raise UserError(f"{option} {each!r} must read field=column, such as {example}")
        if field in found:
            raise UserError(f"{option} names {field} twice: give each field one column")
        found[field] = column
    return found


def text_layout(separator: str | None, quotes: str, encoding: str, prefix: str = "") -> Layout:
    """How a text file is laid out, of the options whose names begin with the prefix.

    Raises:
        UserError: one of them is unknown.
    """
    from common.events.layout import Layout
    from common.events.schema import LogError

    try:
        return Layout(separator, quotes, encoding)
    except LogError as error:
        raise UserError(f"--{prefix}{error}") from error


def catalog_file(
    path: Path | None, format: str, columns: str | None, separator: str | None, quotes: str, encoding: str
) -> CatalogFile | None:
    """The catalog's file, of the options for it; None where there is none.

    Raises:
        UserError: one of them reads otherwise, or is unknown.
    """
    from common.events.catalog import CatalogFile

    if path is None:
        return None
    layout = text_layout(separator, quotes, encoding, "catalog-")
    return CatalogFile(path, format, column_mapping(columns, "--catalog-columns"), layout)
