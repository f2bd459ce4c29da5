"""`fedtide recommend` and `fedtide predict`: lists and probabilities for a history, with a run's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from server.recommending import ReadEvent, Recommender

_QUIET: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
app = typer.Typer(**_QUIET)
predict_app = typer.Typer(**_QUIET)

Run = Annotated[Path, typer.Option(help="A trained run: its folder, or its name under runs/.")]
History = Annotated[str, typer.Option(help='Titles, oldest first: "title; title; ..."; "-title": not liked.')]
Offline = Annotated[bool, typer.Option(help="Fetch nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def recommend(
    run: Run,
    history: History,
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    by: Annotated[
        str, typer.Option(help="model, threshold (content) or neighbours (of each event).")
    ] = "model",
    threshold: Annotated[float, typer.Option(help="Of the threshold list: a cosine.")] = 0.5,
    because: Annotated[int, typer.Option(min=0, help="Events to name for each item.")] = 1,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Recommend items for a history, with a run's model."""
    from rich.console import Console
    from rich.table import Table

    from common.cli import UserError
    from server.recommending import load_recommender

    if by not in ("model", "threshold", "neighbours"):
        raise UserError(f"--by {by!r} is unknown: choose model, threshold or neighbours")
    recommender = load_recommender(_folder(run), offline=offline)
    events = recommender.read(history.split(";"))
    if by == "threshold":
        found = recommender.above(events, threshold, because=because)[:top]
    elif by == "neighbours":
        found = recommender.by_neighbours(events, top, because=because)
    else:
        found = recommender.top(events, top, because=because)
    said = [[events[place].given for place in each.because] for each in found]
    if as_json:
        items = [
            {"rank": r.rank, "item": r.item, "text": r.text, "score": round(r.score, 6), "because": names}
            for r, names in zip(found, said, strict=True)
        ]
        typer.echo(json.dumps({"history": _as_read(recommender, events), "items": items}))
        return
    console = Console()
    _say_nearest(console, recommender, events)
    table = Table(title="recommended")
    table.add_column("", justify="right")
    table.add_column("title")
    table.add_column("score", justify="right")
    if because:
        table.add_column("because of")
    for item, names in zip(found, said, strict=True):
        table.add_row(
            str(item.rank),
            item.text or item.item,
            f"{item.score:.3f}",
            *([", ".join(names)] if because else []),
        )
    console.print(table)


@predict_app.command()
def predict(
    run: Run,
    history: History,
    of: Annotated[str, typer.Option(help='What is asked about: "title; title", or categories.')],
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Say how likely some items are next (or liked, or categories next), with a run's model."""
    from rich.console import Console
    from rich.table import Table

    from common.cli import UserError
    from server.recommending import load_recommender

    asked = [each for each in of.split(";") if each.strip()]
    if not asked:
        raise UserError("--of names nothing: give titles separated by semicolons")
    recommender = load_recommender(_folder(run), offline=offline)
    events = recommender.read(history.split(";"))
    found = recommender.predict(events, asked)
    what = {"interest": "liked", "next-category": "next category"}.get(recommender.finished.plan.task, "next")
    if as_json:
        said = [
            {
                "given": p.given,
                "text": p.text,
                "exact": p.exact,
                "probability": p.probability,
                "rank": p.rank,
            }
            for p in found
        ]
        typer.echo(
            json.dumps(
                {"task": recommender.finished.plan.task, "history": _as_read(recommender, events), "of": said}
            )
        )
        return
    console = Console()
    _say_nearest(console, recommender, events)
    for each in found:
        if not each.exact:
            _say_read_as(console, each.given, each.text)
    table = Table()
    for name in ("", f"probability: {what}", "rank"):
        table.add_column(name, justify="left" if not name else "right")
    for each in found:
        table.add_row(each.text, f"{each.probability:.4f}", str(each.rank))
    console.print(table)


def _folder(run: Path) -> Path:
    """Where the run lies; says on the standard error what it lacks, where its training ended and the rest did not."""
    import sys

    from common.finished import FinishedError
    from server.run_names import run_named
    from server.shell_lines import resume_line

    if (run / "model.safetensors").is_file() and not run.name.endswith(".incomplete"):
        return run
    found = run_named(run, Path("runs"))
    way_out = f"`{resume_line(found)}`"
    if not (found.path / "model.safetensors").is_file():
        raise FinishedError(
            f"the training of {found.name} did not end, so it has no model: {way_out} goes on with it"
        )
    if not found.is_whole:
        print(
            f"Note: {found.name} is trained, but was interrupted after that: it has no figures of the finished model, "
            f"no privacy record and no summary; {way_out} makes them.",
            file=sys.stderr,
        )
    return found.path


def _as_read(recommender: Recommender, events: list[ReadEvent]) -> list[dict[str, Any]]:
    texts = recommender.finished.catalog.texts
    return [{"given": e.given, "read_as": texts[e.row], "exact": e.exact, "liked": e.liked} for e in events]


def _say_nearest(console: Console, recommender: Recommender, events: list[ReadEvent]) -> None:
    for event in events:
        if not event.exact:
            _say_read_as(console, event.given, recommender.finished.catalog.texts[event.row])


def _say_read_as(console: Console, given: str, text: str) -> None:
    console.print(
        f"{given!r} is not in the catalog; read by its text, as the nearest: {text}", highlight=False
    )
