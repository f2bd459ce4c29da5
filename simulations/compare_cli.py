"""`fedtide compare`: finished simulations in one table and one plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from simulations.compare import Comparison

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_SHOWN = 3
"""Metrics that fit a terminal of eighty columns."""


@app.command()
def compare(
    run: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Folders, or names under --runs.")],
    out: Annotated[Path, typer.Option(help="Folder for table, plot and JSON; made if need be.")] = Path(
        "comparison"
    ),
    part: Annotated[
        str | None, typer.Option(help="test or validation; the test split where all runs looked at it.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs lie.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare finished simulations of the same users: figures, costs, settings that differ, and a test in pairs.

    The first run is what the others are held against. Runs of other data, splits or users are refused.
    """
    from rich.console import Console

    from common.cli import UserError
    from server.run_names import run_named
    from server.runs import write_whole
    from simulations import plots
    from simulations.compare import compare as held_together
    from simulations.splits import Part

    if part not in (None, "test", "validation"):
        raise UserError(f"--part {part!r} is unknown: choose test or validation")
    found = held_together([run_named(each, runs) for each in run], cast("Part | None", part))
    out.mkdir(parents=True, exist_ok=True)
    plots.runs_side_by_side(
        out / "comparison.png",
        found.headline,
        found.part,
        [(each.name, each.metrics[found.headline]) for each in found.runs],
    )
    write_whole(out / "comparison.json", json.dumps(found.as_json(), indent=2).encode() + b"\n")
    write_whole(out / "comparison.md", in_markdown(found).encode())
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    console = Console()
    for number, each in enumerate(found.runs, 1):
        console.print(f"{number}: {each.name}", highlight=False, soft_wrap=True)
    header, rows = figures(found)
    shown = header[: 4 + _SHOWN]
    console.print(_table(f"{_TITLE[found.part]}; ± is half a 95 % interval", shown, rows))
    differing = [(name, *values) for name, values in found.differing.items()]
    if differing:
        numbers = [str(number) for number in range(1, len(found.runs) + 1)]
        console.print(_table("settings that differ", ("setting", *numbers), differing))
    for line in sentences(found):
        console.print(line, highlight=False, markup=False)
    console.print(f"[bold]Table, plot and JSON are in {out}[/bold]", highlight=False, soft_wrap=True)


_TITLE = {"test": "test split", "validation": "validation split"}


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    from rich.table import Table

    made = Table(title=title)
    for place, name in enumerate(header):
        made.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row[: len(header)])
    return made


def figures(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: number, epsilon, costs, then each metric, the headline first."""
    from simulations.compare import interval

    names = [found.headline, *(name for name in found.runs[0].metrics if name != found.headline)]
    header = ("", "epsilon", "MB", "s", *names)
    rows = [
        (
            str(number),
            f"{each.epsilon:.3f}",
            f"{each.megabytes:,.1f}",
            f"{each.seconds:,.0f}",
            *(interval(each.metrics[name]) if name in each.metrics else "-" for name in names),
        )
        for number, each in enumerate(found.runs, 1)
    ]
    return header, rows


def sentences(found: Comparison) -> list[str]:
    """What the tests in pairs say, and what they do not."""
    said = []
    for number, pair in enumerate(found.pairs, 2):
        low, high = pair.interval
        said.append(
            f"{number} against 1: {pair.metric} {pair.mean:+.4f} (95 %: {low:+.4f} to {high:+.4f}; paired over "
            f"{pair.users:,} users, p = {pair.p:.2g}"
            + (f", of {len(found.pairs)} tests by Holm {pair.p_holm:.2g}" if len(found.pairs) > 1 else "")
            + f"): {pair.verdict}."
        )
        if pair.other_event:
            said.append(
                f"Of {number}'s users {pair.other_event:.0%} are judged by another event than in 1, as the seed orders "
                "events of one time."
            )
    said.append(
        "Intervals and tests are over users: what the noise of another run of the same plan would bring is not in "
        "them. `fedtide sweep --seeds` shows that."
    )
    if not found.public:
        said.append(
            "These figures are exact, and of the events of your own log: they are private, and no epsilon covers them."
        )
    return said


def in_markdown(found: Comparison) -> str:
    """The comparison as a page."""
    from server.summary import table

    header, rows = figures(found)
    numbers = [str(number) for number in range(1, len(found.runs) + 1)]
    differing: list[Any] = [(name, *values) for name, values in found.differing.items()]
    parts = [
        f"# {len(found.runs)} runs compared, on the {_TITLE[found.part]}",
        "\n".join(f"{number}. {each.name}" for number, each in enumerate(found.runs, 1)),
        "± is half a 95 % interval, over users.",
        table(header, rows),
        "![runs side by side](comparison.png)",
        "\n".join(f"- {line}" for line in sentences(found)),
        *(["## Settings that differ", table(("setting", *numbers), differing)] if differing else []),
    ]
    return "\n\n".join(parts) + "\n"
