"""Layout: what a person says of a table file that its name does not, and how messages name the options for it."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Literal, get_args

from common.events.schema import LogError

Format = Literal["auto", "csv", "tsv", "parquet", "jsonl", "movielens", "recbole"]
Quotes = Literal["auto", "double", "none"]

SPELT = {"tab": "\t", "\\t": "\t", "space": " ", "blank": " ", "comma": ",", "semicolon": ";", "pipe": "|"}
"""Separators by word, for those that a shell makes hard to type."""

JOINER = "\x1f"
"""The unit separator: stands for a separator of several characters, or of one outside ASCII."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a text file is laid out, where that is not what its name says.

    Attributes:
        separator: of fields, one or more characters, or a word of `SPELT`; None: comma in CSV, tab in TSV.
            "space" is any run of blanks, where the file has no quotes.
        quotes: "double": a field may stand in double quotes, whatever it holds; "none": quotes are text; "auto":
            CSV has quotes, files with a tab have none, and a CSV whose quotes can be read two ways is refused.
        encoding: as Python names it; "auto": UTF-8 (or UTF-16 or 32, by their mark), else Windows-1252.

    Raises:
        LogError: a value is none of these.
    """

    separator: str | None = None
    quotes: str = "auto"
    encoding: str = "auto"

    def __post_init__(self) -> None:
        if self.quotes not in get_args(Quotes):
            raise LogError(f"quotes {self.quotes!r} is unknown: choose {', '.join(get_args(Quotes))}")
        if self.separator is not None:
            fields = self.fields_end_in(",")
            if not fields or set(fields) & {'"', "\n", "\r", JOINER}:
                raise LogError(
                    f"separator {self.separator!r} cannot stand between fields: give a character such as ';', or "
                    "tab, or space"
                )
        if self.encoding != "auto":
            try:
                "".encode(self.encoding)
                codecs.getincrementaldecoder(self.encoding)
            except (LookupError, ValueError) as error:
                raise LogError(
                    f"encoding {self.encoding!r} is unknown: give a name such as utf-8, latin-1, gb18030 or shift_jis"
                ) from error

    def fields_end_in(self, default: str) -> str:
        """The separator itself."""
        if self.separator is None:
            return default
        return SPELT.get(self.separator.lower(), self.separator)

    def has_quotes(self, separator: str) -> bool:
        """Whether fields may stand in quotes, where this stands between fields."""
        return self.quotes == "double" or (self.quotes == "auto" and separator != "\t")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is being read, for messages: its noun, and how this command's options for it begin.

    Attributes:
        noun: "log" or "catalog".
        prefix: of the options: "" or "catalog-".
    """

    noun: str = "log"
    prefix: str = ""

    def option(self, name: str) -> str:
        """The option of that name, as it is typed: "--format" or "--catalog-format"."""
        return f"--{self.prefix}{name}"


LOG, CATALOG = Asked(), Asked("catalog", "catalog-")


def format_names() -> str:
    """The formats that may be asked for, in words."""
    return "one of " + ", ".join(get_args(Format)[1:])
