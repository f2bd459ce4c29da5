"""The page of benchmarks: rows of a table, the machine that they were measured on, sections by their headings."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from client.ledger import utc_day

DOCUMENT = Path("docs/benchmarks.md")


@dataclass(frozen=True)
class Row:
    """One line of the table. `target` None: for information."""

    what: str
    value: str
    target: str | None = None
    met: bool | None = None


def machine() -> str:
    """Cores, architecture, system and day."""
    return f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, {utc_day()}"


def as_table(rows: list[Row]) -> list[str]:
    """The lines of a table."""
    words = {True: "met", False: "**missed**", None: ""}
    lines = [f"| {row.what} | {row.value} | {row.target or ''} | {words[row.met]} |" for row in rows]
    return ["| what | measured | target | |", "|---|---|---|---|", *lines]


def add_to_document(section: str, document: Path = DOCUMENT) -> None:
    """Puts a section on the page, in the place of the one that has its heading, or at the end."""
    document.parent.mkdir(exist_ok=True)
    before = document.read_text(encoding="utf-8") if document.is_file() else "# Benchmarks\n"
    begin, *others = before.rstrip().split("\n## ")
    heading, body = section.splitlines()[0].removeprefix("## "), section.rstrip().removeprefix("## ")
    headings = [each.splitlines()[0] for each in others]
    if heading in headings:
        others[headings.index(heading)] = body + "\n"
    else:
        others = [*(f"{each.rstrip()}\n" for each in others), body]
    document.write_text("\n## ".join([begin, *others]).rstrip() + "\n", encoding="utf-8")
