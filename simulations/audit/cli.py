"""`fedtide audit`: checks that anyone with a run's folder can make."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.audit import report_cli
from simulations.audit.attack_cli import attack
from simulations.audit.canary_cli import canary
from simulations.audit.certificate_cli import certificate
from simulations.audit.conformance.cli import conformance
from simulations.audit.noise_cli import noise
from simulations.audit.pack_cli import pack
from simulations.bars import progress

if TYPE_CHECKING:
    from simulations.audit.findings import Findings, SiteFinding

app = typer.Typer(
    help="Check what a run says about privacy.",
    no_args_is_help=True,
    suggest_commands=False,  # click does, and once is enough
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Check what a run says about privacy."""


app.command()(canary)
app.command()(attack)
app.command()(conformance)
app.command()(noise)
app.command()(pack)
app.command()(certificate)
app.command()(report_cli.report)
app.command()(report_cli.full)


@app.command()
def receipts(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    registry: Annotated[
        Path | None, typer.Option(help="The server's registry, where it is not in the run's folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify every chain, signature, anchor, charge and digest of a run, and recompute its epsilon.

    Epsilon by every accountant: the PLD that was published, Opacus' PRV and RDP, Google's RDP, and the closed
    form where nobody is sampled. Exit code 1 if anything does not hold, naming it.
    """
    from simulations.audit.receipts import audit_receipts

    # Google's accountant warns of orders below 2 that it leaves out, which only loosens its figure.
    logging.getLogger("absl").setLevel(logging.ERROR)
    with progress("receipts", hidden=as_json) as on_receipts:
        found = audit_receipts(run, registry, on_receipts)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _show(found)
    if found.lies:
        raise typer.Exit(1)


def _show(found: Findings) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from simulations.audit.findings import TOLERANCE

    console = Console()
    table = Table(
        title=f"receipts of {escape(found.run)}: {found.rounds} rounds",
        box=None,  # so that it fits eighty columns
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    columns = ("charges", "receipts", "printed", "PLD", "PRV", "RDP", "Google", "closed", "spent")
    table.add_column("site", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for site in found.sites:
        table.add_row(*_row(site))
    console.print(table)
    console.print(
        "charges: of this run, from the verified chain (burnt or open in brackets); receipts: that verify. "
        "printed: epsilon in privacy.json; the next five are recomputed from the charges, by dp-accounting's "
        "PLD, Opacus' PRV and RDP, Google's RDP, and the closed form. spent: of the Renyi budget, by all runs.",
        highlight=False,
    )
    for note in found.notes:
        console.print(f"Note: {note}", markup=False, highlight=False)
    for lie in found.lies:
        line = f"LIE {lie.reason} in {lie.place}: {lie.explanation}"
        console.print("".join(c if c.isprintable() else "?" for c in line), markup=False, highlight=False)
    if not found.lies:
        epsilon = "nothing was charged" if found.epsilon is None else f"epsilon {found.epsilon:.4f}"
        console.print(
            f"Everything holds: {epsilon} for the users of any one site in this run, within {TOLERANCE:g} of "
            "what was printed. Receipts prove what was signed, not what ran.",
            highlight=False,
        )


def _row(site: SiteFinding) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    figures = site.figures
    wasted = site.burnt + site.open
    state = "LIE" if site.lies else "barred" if site.barred else "holds"
    return [
        site.site,
        f"{site.charges} ({wasted})" if wasted else str(site.charges),
        str(site.receipts),
        number(site.printed),
        *(
            ["", "", "", "", ""]
            if figures is None
            else [
                number(figures.pld),
                number(figures.prv),
                number(figures.rdp),
                number(figures.rdp_google),
                number(figures.closed_form),
            ]
        ),
        f"{site.share:.1%}",
        state,
    ]
