"""What Fedtide's pages share: one look, and a document that fetches nothing. What stands on them is made elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


def style() -> str:
    """The style of every page, for light, dark, phones and paper."""
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def printable(value: Any) -> Any:
    """The same, without characters that no page may hold."""
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in value)
    if isinstance(value, dict):
        return {printable(key): printable(each) for key, each in value.items()}
    return [printable(each) for each in value] if isinstance(value, list | tuple) else value


def text(value: object) -> str:
    """Anything as text in HTML; no line begins with a percent sign."""
    return escape(printable(str(value))).replace(" %", "&nbsp;%")


def table(
    label: str, head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()
) -> str:
    """A table in a box that scrolls by itself; every cell is text.

    Args:
        label: what it is, for who cannot see it.
        numbers: places of the columns that hold numbers.
    """
    right = set(numbers)

    def row(cells: Sequence[object], tag: str) -> str:
        marks = (' class="n"' if place in right else "" for place in range(len(cells)))
        made = (f"<{tag}{mark}>{text(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join([row(head, "th"), *(row(each, "td") for each in rows)])
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}"><table>{body}</table></div>'


def document(title: str, body: str) -> str:
    """A whole page: no script, no font, no picture and no address from anywhere else.

    Args:
        title: as text.
        body: as HTML.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{style()}</style>
</head>
<body>
{body}
</body>
</html>
"""
