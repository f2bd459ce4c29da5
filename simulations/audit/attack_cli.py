"""`fedtide audit attack`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.audit.terminal import conclude, plan_of, say
from simulations.bars import progress

if TYPE_CHECKING:
    from simulations.audit.evidence import Evidence


def attack(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run's folder, for its model and mechanism.")
    ] = None,
    shadows: Annotated[
        int, typer.Option(help="Models trained for membership, by each variant; more see more.")
    ] = 12,
    users: Annotated[int, typer.Option(help="Made-up users; half of them are in each model.")] = 300,
    items: Annotated[int, typer.Option(help="Made-up items.")] = 300,
    sites: Annotated[int, typer.Option(help="Updates read, by each variant.")] = 30,
    out: Annotated[Path | None, typer.Option(help="Where to write, where there is no run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an attacker learns from updates and models, without privacy and with the run's.

    Two attacks on made-up users: reading a user's items off one update, and telling who was in the training. No
    figure is a bound on epsilon. Exit code 1 if an attack gets further than the mechanism allows any attack, or
    fails where nothing protects.
    """
    from simulations.audit.attack_plan import plan_attacks
    from simulations.audit.attacks import run_attacks

    plan = plan_attacks(plan_of(run), models=shadows, users=users, items=items, sites=sites)
    place = run or out
    command = " ".join(["fedtide audit attack", *([run.name] if run else []), f"--shadows {shadows}"])
    with progress("attacks", hidden=as_json) as on_progress:
        found = run_attacks(plan, command=command, on_progress=on_progress)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    file = found.write(place) if place else None
    conclude(found, as_json=as_json, show=lambda: _show(found, file))


def _show(found: Evidence, file: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()

    read = Table(
        title="items read off one update of one user (no bound on epsilon)", box=None, pad_edge=False
    )
    for column in ("trained with", "sigma", "right guesses", "by chance", "DP allows"):
        read.add_column(column, justify="left" if column == "trained with" else "right")
    for row in found.series["recovery"]:
        figures = [f"{row[name]:.2f}" for name in ("precision", "chance", "ceiling")]
        read.add_row(row["variant"], f"{row['sigma']:g}", *figures)
    console.print(read)
    members = Table(title="who was in the training (no bound on epsilon)", box=None, pad_edge=False)
    members.add_column("trained with", no_wrap=True)
    members.add_column("attack", no_wrap=True)
    for column in ("AUC", "TPR at FPR 1 %", "at 0.1 %"):
        members.add_column(column, justify="right", no_wrap=True)
    for row in found.series["membership"]:
        told = [
            f"{row[f'tpr_{at}']:.3f} ({row[f'low_{at}']:.3f}-{row[f'high_{at}']:.3f})" for at in ("1", "01")
        ]
        members.add_row(row["variant"], row["attack"], f"{row['auc']:.2f}", *told)
    console.print(members)
    for check in found.checks:
        if not check.holds:
            say(console, f"DOES NOT HOLD: {check.name}, {check.subject}: {check.says}; {check.bound}.")
    if found.holds:
        say(
            console,
            "No attack got further than the mechanism allows, and both succeed where nothing protects.",
        )
    say(console, "TPR, FPR: members told, others taken for members; 95 % intervals in brackets.")
    for limit in found.limits[:2]:
        say(console, limit)
    if file is not None:
        say(console, f"Everything is in {file}")
