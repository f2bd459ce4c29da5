"""`fedtide audit canary`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.audit.terminal import conclude, plan_of, say
from simulations.bars import progress

if TYPE_CHECKING:
    from common.model_plan import ModelPlan
    from simulations.audit.evidence import Evidence


def canary(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run's folder, for its model and clip norm.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Model family, in place of the run's.")] = None,
    mode: Annotated[str | None, typer.Option(help="vectors or lora, in place of the run's.")] = None,
    eps_audit: Annotated[float, typer.Option(help="What the audited rounds claim; 1 to 2 sees most.")] = 2.0,
    delta: Annotated[float, typer.Option(help="Of that claim.")] = 1e-5,
    canaries: Annotated[int, typer.Option(help="Made-up users, each in by a fair coin.")] = 1000,
    guesses: Annotated[
        int | None, typer.Option(help="On each side; a tenth of the canaries if left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Of one step each.")] = 4,
    sampling_rate: Annotated[float, typer.Option(help="1: everybody in every round, which sees most.")] = 1.0,
    level: Annotated[float, typer.Option(help="How often honest code may be refused.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Where to write, where there is no run.")] = None,
    again: Annotated[bool, typer.Option("--again", help="One more, beside what is registered.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plant made-up users, train with the site's real code, and guess from the updates who was in.

    The right guesses give a lower bound of epsilon; the claim must not lie below it. No user's data is looked at
    and no budget is spent. What will be measured is registered first. Exit code 1 if the claim is refuted.
    """
    from dataclasses import replace

    from simulations.audit.canary_findings import audit_canaries, loud_clip_norm
    from simulations.audit.canary_plan import Registration, plan_canaries, register
    from simulations.audit.evidence import FOLDER

    model, clip_norm, learning_rate = _of_run(run, family, mode)
    plan = plan_canaries(
        model,
        canaries=canaries,
        guesses=max(1, canaries // 10) if guesses is None else guesses,
        epsilon=eps_audit,
        delta=delta,
        level=level,
        rounds=rounds,
        sampling_rate=sampling_rate,
        clip_norm=clip_norm,
        learning_rate=learning_rate,
        events=min(12, model.max_events),
    )
    plan = replace(plan, clip_norm=loud_clip_norm(plan))
    place, registration = run or out, Registration(plan.digest(), 1)
    if place is not None:
        registration = register(place / FOLDER, plan, again=again)
    command = " ".join(["fedtide audit canary", *([str(run.name)] if run else [])])
    command += f" --eps-audit {eps_audit:g} --canaries {canaries} --rounds {rounds} --level {level:g}"
    with progress("rounds with canaries", hidden=as_json, total=plan.rounds + 1) as on_progress:
        found = audit_canaries(
            plan, registration, command=command, on_round=lambda done: on_progress(done, None)
        )
    file = found.write(place) if place else None
    conclude(found, as_json=as_json, show=lambda: _show(found, file))


def _of_run(run: Path | None, family: str | None, mode: str | None) -> tuple[ModelPlan, float, float]:
    """Model, clip norm and learning rate: a run's, or those of a plan by default."""
    from common.config import make_plan

    plan = plan_of(run)
    asked = {name: value for name, value in (("family", family), ("mode", mode)) if value is not None}
    if asked:
        plan = make_plan(
            {"model": {**plan.model.model_dump(), **asked}, "privacy": plan.privacy.model_dump()}
        )
    return plan.model, plan.privacy.clip_norm, plan.training.learning_rate


def _show(found: Evidence, file: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console, said = Console(), found.parameters
    table = Table(title=f"canaries: {found.checks[0].subject}", box=None, pad_edge=False)
    for column in ("round", "claimed", "at least, Steinke et al.", "at least, f-DP"):
        table.add_column(column, justify="right")
    for row in found.series["rounds"]:
        table.add_row(str(row["round"]), *(f"{row[name]:.2f}" for name in ("claimed", "steinke", "f_dp")))
    console.print(table)
    ceiling = found.series["ceiling"]
    say(
        console,
        f"epsilon at delta {said['delta']:g}, lower bounds at 95 %; had every guess been right they would be "
        f"{ceiling['steinke']:.2f} and {ceiling['f_dp']:.2f}.",
    )
    for check in found.checks:
        word = "caught" if check.control and check.holds else "holds" if check.holds else "DOES NOT HOLD"
        say(console, f"{word}: {check.name}: {check.says}.")
    say(console, f"Registered as {said['registered'][:16]}, audit {said['registration']} of this folder.")
    say(console, found.limits[0])
    if file is not None:
        say(console, f"Everything is in {file}")
