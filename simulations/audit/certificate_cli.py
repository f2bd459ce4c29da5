"""`fedtide audit certificate`: its options, and what it says on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def certificate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="As `fedtide site withdraw` wrote it.")],
    registry: Annotated[
        Path | None,
        typer.Option(
            help="A server's registry, or a copy: is the key enrolled there, and is this the chain's end?"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify the certificate of a site's withdrawal, and say what it says.

    Signatures, charges and totals of every entry in it, and its words against what was signed. Exit code 1 if anything
    does not hold, naming it. Needs no key and no network.
    """
    from simulations.audit.certificate import audit_certificate

    found = audit_certificate(file, registry)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    elif found.reason is not None or found.certificate is None:
        print(f"FAULT {found.reason} in {found.file}: {found.explanation}")
    else:
        print(f"The certificate {found.file} holds.")
        for sentence in found.certificate.in_words()[:-1]:
            print(f"  {sentence}")
        if found.site is None:
            print(
                "It proves what the site signed. Whether this is the whole of it takes a server's copy of the chain: "
                "--registry DIR."
            )
        else:
            print(
                f"The registry enrolled this key as {found.site}, holds its chain up to entry {found.held}, and the "
                f"certificate agrees with it up to its closing entry {found.certificate.entries[-1].seq}."
            )
    if found.reason is not None:
        raise typer.Exit(1)
