"""`fedtide server sites | remove | bar | unbar`: who is in the federation, and who is not any more."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The site's, as it was enrolled.")]


def sites(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="The server's folder; or give --registry.")
    ] = None,
    registry: Annotated[
        Path | None, typer.Option("--registry", help="Folder of a registry alone, without a server.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the enrolled sites: their keys, what their verified ledgers come to, and who is barred.

    What was spent is over all runs, as far as the receipts that this server got tell: it cannot see what a site
    charged since.
    """
    from common.cli import UserError
    from server.deployment import Deployment
    from server.registry import RegistryReader

    if (folder is None) == (registry is None):
        raise UserError(
            "give the server's folder, as in `fedtide server sites DIR` (or, for a registry alone, --registry)"
        )
    place = Deployment.load(folder).registry if folder is not None else registry
    assert place is not None
    reader = RegistryReader(place.expanduser().resolve())
    found: list[dict[str, Any]] = []
    for site in reader.sites():
        chain = reader.chain(site.key_id)
        report = chain.report()
        found.append(
            {
                "name": site.name,
                "key_id": site.key_id,
                "epsilon": report.genesis.epsilon,
                "delta": report.genesis.delta,
                "renyi_order": report.genesis.order,
                "share_spent": report.spent / report.cap,
                "spent": chain.spending().as_json() | {"seen_until_entry": report.seq},
                "entries": report.seq + 1,
                "anchors": len(reader.anchors(site.key_id)),
                "withdrawn": report.closed,
                "barred": site.barred or site.out == "barred",
                "removed": site.out == "removed",
                "reason": site.reason,
                "proofs": len(reader.proofs(site.key_id)),
            }
        )
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _print_sites(found)


def _print_sites(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from common.privacy.spending import MEANING, up_to

    table = Table(title="enrolled sites, as far as their receipts tell")
    words = ("site", "key", "guarantee", "state")
    for column in ("site", "key", "guarantee", "PLD", "filter", "spent", "entries", "anchors", "state"):
        table.add_column(
            column,
            justify="left" if column in words else "right",
            no_wrap=column not in words,
            overflow="fold",
        )
    notes = []
    for each in found:
        spent = each["spent"]
        if spent["note"]:
            notes.append(f"{each['name']}: {spent['note']}.")
        if each["reason"]:
            notes.append(f"{each['name']} is {'removed' if each['removed'] else 'barred'}: {each['reason']}")
        states = ("barred", "removed", "withdrawn")
        table.add_row(
            str(each["name"]),
            f"{str(each['key_id'])[:16]}…",
            f"(epsilon {each['epsilon']:g}, delta {each['delta']:g})",
            "-" if spent["epsilon_pld"] is None else up_to(spent["epsilon_pld"]),
            up_to(spent["epsilon_filter"]),
            f"{each['share_spent']:.1%}",
            str(each["entries"]),
            str(each["anchors"]),
            next((state for state in states if each[state]), ""),
        )
    console = Console()
    console.print(table)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(
        "PLD and filter: epsilon spent over all runs and servers, burnt and open charges included, as far as the "
        f"receipts that this server got tell; a site may have charged more since. {MEANING}"
    )
    for note in notes:
        say(note)


def remove(
    folder: Folder,
    name: Name,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the list of sites later.")] = "",
) -> None:
    """Take a site out, now and in later runs: it is asked nothing, and its node may not connect.

    Its chain and its receipts stay, as evidence. `fedtide server enroll` takes it in again, with a new node key.
    """
    from server.deployment import Deployment
    from server.membership import remove as take_out

    done = take_out(Deployment.load(folder), name, reason)
    when = "its node may not connect any more" if done else "the next `fedtide server up` takes its node out"
    print(
        f"Site {name} is removed: {when}. What it released stays, and no run asks it from its next round on."
    )


def bar(
    folder: Folder,
    name: Name,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the list of sites later.")],
) -> None:
    """Ask a site nothing from now on, and admit no answer of it, until `unbar`; it stays enrolled."""
    from server.deployment import Deployment
    from server.membership import bar as shut_out

    shut_out(Deployment.load(folder), name, reason)
    print(
        f"Site {name} is barred, in runs that are at work too; `fedtide server unbar {folder} {name}` ends that."
    )


def unbar(folder: Folder, name: Name) -> None:
    """Take a bar back that `bar` made; one that follows from a proof stays."""
    from server.deployment import Deployment
    from server.membership import unbar as let_in

    let_in(Deployment.load(folder), name)
    print(f"Site {name} is not barred any more: runs ask it from their next round on.")
