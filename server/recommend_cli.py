"""`fedtide recommend`: ten titles for a history, with a run's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def recommend(
    run: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    history: Annotated[str, typer.Option(help='Titles, oldest first: "title; title; ..."')],
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    offline: Annotated[bool, typer.Option(help="Fetch nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recommend items for a history, with a run's model."""
    from rich.console import Console
    from rich.table import Table

    from server.recommending import load_recommender

    recommender = load_recommender(run, offline=offline)
    events = recommender.read(history.split(";"))
    found = recommender.top(events, top)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "history": [
                        {"given": e.given, "read_as": recommender.catalog.texts[e.row], "exact": e.exact}
                        for e in events
                    ],
                    "items": [
                        {"rank": r.rank, "item": r.item, "text": r.text, "score": round(r.score, 6)}
                        for r in found
                    ],
                }
            )
        )
        return
    console = Console()
    for event in events:
        if not event.exact:
            text = recommender.catalog.texts[event.row]
            console.print(
                f"{event.given!r} is not in the catalog; read by its text, as the nearest: {text}",
                highlight=False,
            )
    table = Table(title="recommended")
    table.add_column("", justify="right")
    table.add_column("title")
    table.add_column("score", justify="right")
    for item in found:
        table.add_row(str(item.rank), item.text, f"{item.score:.3f}")
    console.print(table)
