"""`fedtide audit conformance`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from simulations.audit.terminal import conclude, plan_of, say
from simulations.bars import progress

if TYPE_CHECKING:
    from simulations.audit.evidence import Check, Evidence

MODELS_OWN = (
    "family",
    "mode",
    "core",
    "task",
    "time_features",
    "item_prior",
    "negatives",
    "members",
    "session_gap",
)
"""What of a run's model is tested; its language model and its sizes are replaced by tiny ones."""


def conformance(
    family: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Families to test; may be repeated. All if left out."),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="vectors, lora or lora-held; may be repeated. All if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: every one that is here.")] = "auto",
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Test this run's kind of model too, and write to its folder."),
    ] = None,
    engine: Annotated[str, typer.Option(help="Of a site's steps: fast or opacus.")] = "fast",
    controls: Annotated[
        bool, typer.Option(help="Break the code on purpose too; every fault must be seen.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Test a site's real code with made-up users: sensitivity, noise, sampling, sums, and what else leaves.

    No user's data is looked at and no budget is spent. Exit code 1 if anything does not hold, naming it.
    """
    from common.models.names import FAMILIES
    from simulations.audit.conformance.code import Code
    from simulations.audit.conformance.subjects import MODES, devices
    from simulations.audit.conformance.suite import Options
    from simulations.audit.conformance.suite import conformance as test_code

    options = Options(
        families=_known("family", family, tuple(FAMILIES)),
        modes=_known("mode", mode, MODES),
        devices=devices() if device == "auto" else _known("device", [device], devices()),
        model=None if run is None else _model_of(run),
        plan=None if run is None else plan_of(run),
        with_controls=controls,
        engine=cast(Any, _known("engine", [engine], ("fast", "opacus"))[0]),
    )
    command = " ".join(
        [
            "fedtide audit conformance",
            *(f"--family {name}" for name in family or ()),
            *(f"--mode {name}" for name in mode or ()),
            *([] if device == "auto" else [f"--device {device}"]),
            *([] if run is None else [f"--run {run.name}"]),
            *([] if engine == "fast" else [f"--engine {engine}"]),
            *([] if controls else ["--no-controls"]),
        ]
    )
    with progress("questions", hidden=as_json) as on_step:
        found = test_code(options, Code(), command=command, on_step=on_step)
    file = None if run is None else found.write(run)
    conclude(found, as_json=as_json, show=lambda: _show(found, file))


def _known(option: str, given: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(
                f"{name!r} is none of {', '.join(known)}: choose among those"
                if option != "device"
                else f"{name!r} is not here: this machine has {', '.join(known)}",
                param_hint=f"--{option}",
            )
    return tuple(dict.fromkeys(given)) if given else tuple(known)


def _model_of(run: Path) -> dict[str, Any]:
    model = plan_of(run).model
    told = {name: getattr(model, name) for name in MODELS_OWN}
    return told if model.family == "ensemble" else {n: v for n, v in told.items() if n != "members"}


def _show(found: Evidence, file: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"conformance: {len(found.checks)} checks in {found.seconds:.0f} s", box=None, pad_edge=False
    )
    table.add_column("check", no_wrap=True)
    for column in ("asked", "lowest", "highest", "faults seen"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in dict.fromkeys(check.name for check in found.checks):
        table.add_row(*_row(name, [check for check in found.checks if check.name == name]))
    console.print(table)
    for check in found.checks:
        if not check.holds:
            say(console, f"DOES NOT HOLD: {check.name} of {check.subject}: {check.says}")
    said = found.parameters
    if found.holds:
        say(
            console,
            f"Everything holds. Honest code fails any of the {said['statistical_checks']} statistical checks with "
            f"chance {said['false_alarm_of_all']:.1g} at most; the others it never fails.",
        )
    say(console, found.limits[0])
    if file is not None:
        say(console, f"Everything is in {file}")


def _row(name: str, checks: Sequence[Check]) -> tuple[str, ...]:
    asked = [check for check in checks if not check.control]
    faults = [check for check in checks if check.control]
    figures = [check.measured for check in asked if check.measured is not None]
    lowest, highest = (f"{min(figures):.4g}", f"{max(figures):.4g}") if figures else ("", "")
    seen = f"{sum(check.holds for check in faults)} of {len(faults)}" if faults else ""
    return (
        name,
        str(len(asked)),
        lowest,
        highest,
        seen,
        "holds" if all(c.holds for c in checks) else "DOES NOT HOLD",
    )
