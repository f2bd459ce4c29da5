"""A matplotlib figure as SVG that stands in a page: no ids that clash, colours that follow the page, a name."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

INK, GRID = "#101418", "#c9ced4"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
"""Okabe and Ito's colours, which people with any kind of colour vision tell apart; markers and dashes differ too."""

WIDTH, HEIGHT = 4.8, 3.2
_PAGE_COLOURS = {INK: "var(--ink)", GRID: "var(--rule)"}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedtide",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@contextmanager
def figure() -> Iterator[tuple[Any, Any]]:
    """Figure and axes in the report's style, drawn without a screen."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        made = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        made.patch.set_visible(False)
        axes = made.subplots()
        axes.patch.set_visible(False)
        yield made, axes


def svg(made: Any, name: str, title: str, description: str) -> str:
    """The figure as an `svg` element that a page may hold beside others.

    Args:
        made: the figure, inside `figure()`.
        name: a word that is nobody else's on the page.
        title: for who cannot see it: what it is.
        description: and what it shows.
    """
    file = io.StringIO()
    made.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = (
        f'<svg {box.group()} role="img" aria-labelledby="{name}-title {name}-desc" class="chart">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return opening + text[text.index(">") + 1 :].strip()


def plain(text: object, most: int = 24) -> str:
    """A name as it may stand in a chart: printable, and not too long."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in str(text))
    return clean if len(clean) <= most else clean[: most - 1] + "…"
