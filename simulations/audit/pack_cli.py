"""`fedtide audit pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to make; RUN-for-audit if left out.")
    ] = None,
    registry: Annotated[
        Path | None, typer.Option(help="The server's registry, where it is not in the run's folder.")
    ] = None,
) -> None:
    """Make the folder that one hands to an auditor: the record, and nothing that is private to a site or a server.

    No history, no key, no pseudonym, no log and no figure of quality is in it. `fedtide audit full` runs on it alone.
    """  # fmt: skip
    from simulations.audit.pack import pack as make_pack

    place = output or run.resolve().with_name(f"{run.resolve().name}-for-audit")
    packed = make_pack(run, place, registry)
    size = sum((place / file).stat().st_size for file in packed)
    print(f"{len(packed)} files, {size / 1e6:.1f} MB, are in {place}")
    print(f"Hand it over whole. `fedtide audit receipts {place}` checks it.")
