"""The report as one HTML page: no script, no font, no picture and no address from anywhere else."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.pages import printable, style
from common.privacy.odds import percent
from common.privacy.spending import MEANING, up_to
from simulations.audit import charts, tool_charts
from simulations.audit.findings import TOLERANCE
from simulations.audit.report import Report, grouped
from simulations.audit.report_record import Ledger
from simulations.audit.report_tools import NOT_RUN

_HERE = Path(__file__).parent
_LONGEST = 400
_MOST_LIES = 12  # on the page; all are in the JSON, and `fedtide audit receipts` tells each
_CODE = re.compile(r"`([^`]+)`")


class PageError(RuntimeError):
    """The page cannot be made here; the message says what is missing."""


def page(report: Report) -> str:
    """The page.

    Raises:
        PageError: a library that it needs is not installed.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "parameter": parameter,
        "prose": prose,
        "bound": bound,
        "percent": share,
        "printable": printable,
    }
    said, lies = report.as_json(), grouped(report.findings.lies)
    html = environment.get_template("page.html.j2").render(
        r=printable(said),
        css=style(),
        charts=figures(report),
        lies=printable(lies[:_MOST_LIES]),
        more_lies=max(0, len(lies) - _MOST_LIES),
        failing=[
            (tool["tool"], check)
            for tool in printable(said["tools"])
            if tool["evidence"] is not None
            for check in tool["evidence"]["checks"]
            if not check["holds"]
        ],
        r_ledgers=sorted(report.ledgers, key=lambda each: each.site),
        by_site={ledger.site: ledger for ledger in report.ledgers},
        alike=_alike(report.ledgers),
        units=sorted({ledger.unit for ledger in report.ledgers}),
        adjacencies=sorted({ledger.adjacency.replace("_", " ") for ledger in report.ledgers}),
        modes=sorted({ledger.mode for ledger in report.ledgers}),
        odd=_odd(report),
        tolerance=TOLERANCE,
        meaning=MEANING,
    )
    return str(html)


def figures(report: Report) -> dict[str, charts.Chart]:
    """The page's charts by name; those of a tool that was not run are not among them."""
    try:
        import matplotlib  # noqa: F401 (asked for here, so that the message is one line)
    except ImportError as error:
        raise PageError("the page's charts need matplotlib: pip install 'fedtide[audit]'") from error
    made = [
        charts.epsilon_by_round(report.ledgers, report.plan.privacy.epsilon),
        charts.burn_down(report.ledgers),
    ]
    series = {
        tool.name: tool.evidence.series
        for tool in report.tools
        if tool.state != NOT_RUN and tool.evidence is not None
    }
    if "noise" in series:
        made.append(tool_charts.control_chart(series["noise"]))
    if "canary" in series:
        made.append(tool_charts.lower_bounds(series["canary"]))
    if "attack" in series:
        made += [tool_charts.roc(series["attack"]), tool_charts.recovery(series["attack"])]
    return {chart.name: chart for chart in made}


def figure(value: object, digits: int | None = None) -> str:
    """A number as a person reads it: four significant digits, or so many decimals; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if digits is not None and 10**-digits <= abs(value) < 1e6:
        return f"{value:.{digits}f}"
    text = f"{value}" if isinstance(value, int) else f"{value:.4g}"
    mantissa, letter, exponent = text.partition("e")
    return f"{mantissa}{letter}{int(exponent)}".replace("-", "\u2011") if letter else text


def bound(value: float | None) -> str:
    """An epsilon, rounded up; a dash where there is none."""
    return "–" if value is None else up_to(value)


def share(value: float) -> str:
    """A share that is a bound, in per cent, rounded up; it does not break before the sign."""
    return percent(value).replace(" ", "\u00a0")


def prose(text: object) -> Markup:
    """A sentence as HTML: `commands` as code, and no line that begins with a percent sign."""
    safe = str(escape(str(text)))
    return Markup(_CODE.sub(r"<code>\1</code>", safe).replace(" %", "&nbsp;%"))


def parameter(value: object) -> str:
    """A setting as text, cut where it would fill the page."""
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif value is None or value == "":
        text = "–"
    elif isinstance(value, list | tuple):
        text = ", ".join(str(each) for each in value)
    elif isinstance(value, dict):
        text = ", ".join(f"{name} {each}" for name, each in value.items())
    else:
        text = figure(value) if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _alike(ledgers: Sequence[Ledger]) -> list[tuple[str, Ledger]]:
    """Ledgers that went alike, once, with the names of their sites."""
    found: dict[object, list[Ledger]] = defaultdict(list)
    for ledger in ledgers:
        if ledger.by_round:
            found[tuple(ledger.by_round), ledger.epsilon].append(ledger)
    return [(printable(", ".join(each.site for each in same)), same[0]) for same in found.values()]


def _odd(report: Report) -> list[str]:
    """What went otherwise than planned, in words."""
    said = []
    for each in report.rounds:
        place = f"Round {each['round']} ({each['phase']})"
        if not each["done"]:
            said.append(f"{place} was not done.")
        elif not each["aggregated"]:
            said.append(f"{place} was not aggregated.")
        reasons = Counter(each["left_out"])
        said += [f"{place}: {times} answers left out: {reason}." for reason, times in reasons.items()]
        if each["missing"]:
            said.append(f"{place}: {each['missing']} answers were missing.")
    for site in report.findings.sites:
        if site.burnt or site.open:
            said.append(f"{site.site}: {site.burnt} charges burnt, {site.open} still open.")
        if site.barred:
            said.append(f"{site.site} is barred: it signed two histories.")
    return [printable(line) for line in said]
