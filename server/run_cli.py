"""`fedtide server fits | run | discard`: whether a plan can be finished, a run of it, and a run that is given up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from common.columns import CatalogColumns, CatalogEncoding, CatalogFormat, CatalogQuotes, CatalogSeparator

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def fits(
    folder: Folder,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="TOML or JSON.")],
    as_json: AsJson = False,
) -> None:
    """Say what a plan costs each site and what is left there, and, if it cannot be finished, what would fit.

    At each ledger's own order, with the least charge of each request. Looks at the registry alone and begins nothing;
    ends with code 1 for a plan that cannot be finished.
    """
    from rich.console import Console

    from common.config import read_plan
    from server.deployment import Deployment
    from server.fitting import fit_of_plan
    from server.launch import prepare_plan
    from server.registry import RegistryReader
    from server.run_console import print_fit

    server, written = Deployment.load(folder), read_plan(plan)
    found = fit_of_plan(prepare_plan(server, written), written, RegistryReader(server.registry))
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print_fit(Console(), found)
        print("It can be finished." if found.fits else f"It cannot be finished: its {found.why_not()}.")
    if not found.fits:
        raise typer.Exit(1)


def run(
    folder: Folder,
    plan: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="TOML or JSON; not needed with --resume.")
    ] = None,
    catalog: Annotated[
        Path | None, typer.Option(help="The public catalog, the same as the sites have; for a new run.")
    ] = None,
    catalog_format: CatalogFormat = "auto",
    catalog_columns: CatalogColumns = None,
    catalog_separator: CatalogSeparator = None,
    catalog_quotes: CatalogQuotes = "auto",
    catalog_encoding: CatalogEncoding = "auto",
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with this unfinished run.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the plan, in place of the one that it has.")] = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the server's work on the run; it can go on later.")
    ] = False,
    offline: Annotated[bool, typer.Option(help="Fetch nothing; use what is on this machine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a plan across the enrolled sites, and follow it to its end.

    First it says what the plan costs each site and what is left there, and begins no plan that cannot be finished.
    The same command goes on with a run that was cut off, and follows one that is at work. Ctrl-C ends the
    following only.
    """
    from rich.console import Console

    from common.columns import catalog_file
    from server.deployment import Deployment
    from server.launch import DoesNotFitError, LaunchError, find_run, launch, named
    from server.launch import stop as stop_run
    from server.run_console import ConsoleWatcher, run_summary

    server = Deployment.load(folder)
    if stop:
        from common.config import read_plan

        found = find_run(server, None if plan is None else named(read_plan(plan), name), resume)
        if found is None or not stop_run(server, found):
            raise LaunchError(
                f"the server is not at work on such a run: `fedtide server status {server.folder}` lists the runs"
            )
        print(f"{found.name} is stopped; the same command without --stop goes on with it.")
        return
    console = Console(stderr=as_json)
    try:
        source = catalog_file(
            catalog, catalog_format, catalog_columns, catalog_separator, catalog_quotes, catalog_encoding
        )
        done = launch(
            server,
            plan,
            source,
            ConsoleWatcher(console),
            resume=resume,
            name=name,
            offline=offline,
            say=lambda note: console.print(f"Note: {note}.", markup=False, highlight=False),
        )
    except DoesNotFitError as error:
        if as_json:
            print(json.dumps({"status": "refused", **error.fit.as_json()}, indent=2))
        raise
    except KeyboardInterrupt:
        console.print(
            "No longer followed: what the server has begun goes on. The same command follows it again; "
            "with --stop it ends.",
            highlight=False,
        )
        raise typer.Exit(1) from None
    summary = run_summary(done)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    console.print(
        f"[bold]Completed[/bold]: {summary['aggregated']} of {summary['rounds']} rounds aggregated, "
        f"{summary['admitted']} releases admitted; epsilon {summary['epsilon']:.3f} in this run at the "
        "site that spent most. "
        f"Everything is in {done.path}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"Next: fedtide audit receipts {done.path} --registry {server.registry}",
        highlight=False,
        soft_wrap=True,
    )


def discard(
    folder: Folder,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The unfinished run's name.")],
) -> None:
    """Put an unfinished run away, for good: no command goes on with it, and its receipts stay as evidence."""
    from server.deployment import Deployment
    from server.launch import discard as put_away

    away = put_away(Deployment.load(folder), run)
    print(
        f"{run} is put away in {away}; what its sites were charged stays charged, and its receipts are kept there."
    )
