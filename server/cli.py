"""`fedtide server`: enrol sites, and see what is known of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The coordinator: which sites are enrolled.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RegistryFolder = Annotated[
    Path, typer.Option("--registry", help="Folder of the registry; made where it is absent.")
]


@app.command()
def enroll(
    enrolment: Annotated[Path, typer.Argument(metavar="ENROLMENT_FILE", help="From `fedtide site init`.")],
    name: Annotated[str, typer.Option(help="What the site is to be called here.")],
    registry: RegistryFolder,
) -> None:
    """Take a site's key and ledger in, so that its updates may be admitted.

    Compare the fingerprint with the site's administrator before: whoever's key this is will be that site.
    """
    from common.cli import UserError
    from common.privacy.enrolment import enrolment_from_bytes, fingerprint
    from common.privacy.entries import Genesis
    from server.registry import Registry

    try:
        data = enrolment.read_bytes()
    except OSError as error:
        raise UserError(
            f"the enrolment file {enrolment} cannot be read ({error.strerror}): the site's `site init` wrote it"
        ) from error
    genesis = enrolment_from_bytes(data)
    site = Registry(registry.expanduser().resolve()).enroll(name, genesis)
    print(f"Site {site.name} is enrolled.")
    print(f"Key fingerprint: {fingerprint(site.key_id)}")
    if isinstance(body := genesis.body, Genesis):
        print(
            f"Its guarantee to each of its users: (epsilon {body.epsilon:g}, delta {body.delta:g}) for good."
        )


@app.command()
def sites(
    registry: RegistryFolder, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List the enrolled sites: their keys, what their verified ledgers come to, and who is barred."""
    from server.registry import RegistryReader

    reader = RegistryReader(registry.expanduser().resolve())
    found = []
    for site in reader.sites():
        report = reader.chain(site.key_id).report()
        found.append(
            {
                "name": site.name,
                "key_id": site.key_id,
                "epsilon": report.genesis.epsilon,
                "delta": report.genesis.delta,
                "renyi_order": report.genesis.order,
                "share_spent": report.spent / report.cap,
                "entries": report.seq + 1,
                "anchors": len(reader.anchors(site.key_id)),
                "withdrawn": report.closed,
                "barred": site.barred,
                "proofs": len(reader.proofs(site.key_id)),
            }
        )
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="enrolled sites, as their verified ledgers say")
    for column in ("site", "key", "guarantee", "spent", "entries", "anchors", "state"):
        table.add_column(column, justify="right" if column in ("spent", "entries", "anchors") else "left")
    for each in found:
        table.add_row(
            str(each["name"]),
            f"{str(each['key_id'])[:16]}…",
            f"(epsilon {each['epsilon']:g}, delta {each['delta']:g})",
            f"{each['share_spent']:.1%}",
            str(each["entries"]),
            str(each["anchors"]),
            "barred" if each["barred"] else "withdrawn" if each["withdrawn"] else "",
        )
    Console().print(table)
