"""`fedtide site renew-mark`: what an administrator types when a site's disk, or a copy of it, is not as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder.")]


@app.command("renew-mark")
def renew_mark(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """State that a ledger which lost its high-water mark is the newest copy, and make it a new mark.

    Only its administrator can know. If it is an older copy, what was spent since is given back, and the promise is
    void; a server that countersigned the newer ledger refuses it.
    """
    from client.ledger import Ledger
    from client.site_folder import Site
    from common.cli import UserError

    site = Site.load(folder)
    if not yes and not typer.confirm(
        f"Is the ledger of site {site.name} certainly the newest copy there is? If not, its promise to users is void"
    ):
        raise UserError("nothing was done: put the newest whole copy of the ledger's folder back instead")
    newest = Ledger.renew_mark(site.ledger_folder)
    print(f"Site {site.name}: the ledger verifies, and is marked at entry {newest.seq}.")
