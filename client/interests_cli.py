"""`fedtide segments`, `drift` and `feedback`: a site looks at its own users with a finished model. Nothing is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from common.events.histories import Histories
    from common.finished import FinishedModel
    from common.models.batches import HistoryBatch

_QUIET: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
segments_app = typer.Typer(**_QUIET)
drift_app = typer.Typer(**_QUIET)
feedback_app = typer.Typer(**_QUIET)

SiteFolder = Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder.")]
Run = Annotated[Path, typer.Option(help="Folder of a finished run.")]
Offline = Annotated[bool, typer.Option(help="Fetch nothing.")]


def _opened(site_folder: Path, run: Path, offline: bool) -> tuple[FinishedModel, Histories]:
    from client.interests import InterestsError
    from client.site_folder import Site
    from common.events.catalog import Catalog
    from common.events.histories import Histories
    from common.finished import load_finished

    site, finished = Site.load(site_folder), load_finished(run, offline=offline)
    if finished.plan.task == "next-category":
        raise InterestsError("a model of categories has no states to group users by: use one of items")
    if Catalog.load(site.catalog).digest() != finished.catalog.digest():
        raise InterestsError(
            "the run was made over another catalog than the site's: choose a run of this site's"
        )
    return finished, Histories.load(site.histories_folder)


def _batch(finished: FinishedModel, histories: Histories, rows: list[int]) -> HistoryBatch:
    from common.events.labels import padded_labels
    from common.models.batches import HistoryBatch

    most = finished.plan.max_events
    items, times = histories.padded(rows, most)
    return HistoryBatch.of(
        items, times, labels=padded_labels(histories, rows, most, finished.plan.label_rule)
    )


@segments_app.command()
def segments(
    site: SiteFolder,
    run: Run,
    groups: Annotated[int, typer.Option(min=1, max=100, help="At most.")] = 6,
    items: Annotated[int, typer.Option(min=1, help="Public items that describe a group.")] = 4,
    offline: Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Group a site's users by interest, at the site; groups are described by public items, and not counted."""
    from rich.console import Console
    from rich.table import Table

    from client.interests import nearest_items, segment, user_states

    finished, histories = _opened(site, run, offline)
    states = user_states(finished.built.model, _batch(finished, histories, list(range(len(histories)))))
    found = segment(states, groups)
    texts = finished.catalog.texts
    near = nearest_items(found.centres, finished.built.vectors, items)
    described = [[texts[row] for row in rows] for rows in near.tolist()]
    if as_json:
        typer.echo(
            json.dumps({"groups": [{"group": n + 1, "near": each} for n, each in enumerate(described)]})
        )
        return
    table = Table(
        title="groups of users by interest (counts are not shown: they leave as releases, or not at all)"
    )
    table.add_column("", justify="right")
    table.add_column("what they are near to")
    for number, each in enumerate(described):
        table.add_row(str(number + 1), "; ".join(each))
    Console().print(table)


@drift_app.command()
def drift(
    site: SiteFolder,
    run: Run,
    user: Annotated[str, typer.Option(help="Pseudonym, as in the site's histories.")],
    out: Annotated[Path, typer.Option(help="PNG file to write, for the site's own eyes.")] = Path(
        "drift.png"
    ),
    offline: Offline = False,
) -> None:
    """Plot one user's interest in each category (or group of users) over time, at the site."""
    import numpy as np
    import torch
    from torch.nn.functional import normalize

    from client.interests import InterestsError, nearest_items, plot_drift, segment, user_states
    from client.interests import drift as interest_over_time
    from common.models.build import category_membership, category_names
    from common.models.sequence import SequenceModel

    finished, histories = _opened(site, run, offline)
    rows = np.flatnonzero(histories.users == user)
    if not len(rows):
        raise InterestsError("the site has no user of that pseudonym: give one as in its histories")
    model = finished.built.model
    assert isinstance(model, SequenceModel)
    names = category_names(finished.catalog.categories)
    if len(names) > 1:
        member = category_membership(finished.catalog.categories).float()
        centres = normalize(member.T @ finished.built.vectors, dim=-1)
        directions = centres - centres.mean(dim=0)  # what sets a category apart from the others
    else:
        everyone = _batch(finished, histories, list(range(len(histories))))
        directions = segment(user_states(model, everyone), 6).centres
        near = nearest_items(directions, finished.built.vectors, 1)[:, 0]
        names = [finished.catalog.texts[row] for row in near.tolist()]
    with torch.no_grad():
        interest = interest_over_time(model, _batch(finished, histories, rows.tolist()), directions)
    plot_drift(out, interest, names)
    typer.echo(f"written: {out}")


@feedback_app.command()
def feedback(
    site: SiteFolder,
    run: Run,
    user: Annotated[str, typer.Option(help="Pseudonym, as in the site's histories.")],
    item: Annotated[str, typer.Option(help="Id of the item that the user spoke of.")],
    liked: Annotated[bool, typer.Option("--liked/--disliked", help="What the user said.")] = True,
    alpha: Annotated[float, typer.Option(help="Step size.")] = 0.1,
    offline: Offline = False,
) -> None:
    """Adapt the site's own copy of a model to what a user said of an item; the copy stays at the site."""
    import numpy as np
    import torch

    from client.feedback import OnlineModel
    from client.interests import InterestsError
    from common.models.sequence import SequenceModel

    finished, histories = _opened(site, run, offline)
    rows = np.flatnonzero(histories.users == user)
    if not len(rows):
        raise InterestsError("the site has no user of that pseudonym: give one as in its histories")
    place = torch.tensor([finished.catalog.row(item)])
    assert isinstance(finished.built.model, SequenceModel)
    online = OnlineModel(finished.built.model, finished.plan.family, alpha=alpha)
    file = site / f"adapted-{run.resolve().name}.safetensors"
    if file.is_file():
        online.load(file)
    batch = _batch(finished, histories, rows.tolist())
    before = torch.sigmoid(online.log_odds(batch, place)).item()
    online.feedback(batch, place, torch.tensor([liked]))
    after = torch.sigmoid(online.log_odds(batch, place)).item()
    online.save(file)
    typer.echo(
        f"probability of a like: {before:.4f} before, {after:.4f} after; kept in {file.name}, at the site"
    )
