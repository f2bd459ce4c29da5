"""`fedtide site backup` and `renew-mark`: a copy of the site's folder, and what to do when a copy was put back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder.")]


@app.command()
def backup(
    folder: Folder,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The copy: a folder that is not there yet.")
    ],
) -> None:
    """Copy the site's folder so that the copy is right at its moment, while the site is up; verify the copy.

    Put back after the site released more it is an old copy, which is refused: so make one after each run. It holds
    users' data and the site's keys.
    """
    from client.backup import back_up_site

    newest = back_up_site(folder, target)
    print(f"{target} is a copy of the site in {folder}; its ledger verifies and ends at entry {newest}.")
    print("Keep it where the logs are kept: users' histories and the site's keys are in it.")


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
