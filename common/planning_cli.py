"""`fedtide plan`: a plan from public numbers, with what each of its parts is expected to buy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from common.planning import Proposal

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def plan(
    users_per_site: Annotated[int, typer.Option(help="Public lower bound of users at each site.")],
    sites: Annotated[int, typer.Option(help="How many sites.")],
    epsilon: Annotated[float, typer.Option(help="Promise for the whole run, to each user.")] = 8.0,
    delta: Annotated[float, typer.Option(help="Below 1/users of a site.")] = 1e-5,
    rounds: Annotated[int | None, typer.Option(help="Of fine-tuning; 0: statistics alone.")] = None,
    items: Annotated[int, typer.Option(help="Size of the catalog.")] = 2000,
    events_per_user: Annotated[int, typer.Option(help="Assumed; for expectations only.")] = 50,
    coordinates: Annotated[int, typer.Option(help="Assumed trainable coordinates; likewise.")] = 20_000,
    metrics: Annotated[bool, typer.Option(help="Whether sites release quality too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this TOML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Turn public numbers into a plan: the split of the budget, noise, steps, and what to expect of each part.

    Looks at no data. `fedtide simulate PLAN` reads the file that --out writes.
    """
    from common.cli import UserError
    from common.planning import Federation, plan_toml, propose

    federation = Federation(
        users_per_site=users_per_site,
        sites=sites,
        epsilon=epsilon,
        delta=delta,
        rounds=rounds,
        items=items,
        events_per_user=events_per_user,
        coordinates=coordinates,
        metrics=metrics,
    )
    try:
        proposal = propose(federation)
    except ValueError as error:
        if type(error) is ValueError:  # a checked argument of a plain function: its message is for the person
            raise UserError(str(error)) from error
        raise
    if out is not None:
        _write(out, plan_toml(proposal.plan))
    if as_json:
        said = {
            "plan": proposal.plan.model_dump(mode="json"),
            "epsilon": proposal.epsilon,
            "ledger_epsilon": proposal.budget,
            "renyi_order": proposal.order,
            "expectations": [asdict(each) for each in proposal.expectations],
        }
        print(json.dumps(said, indent=2))
        return
    _show(proposal)
    if out is not None:
        print(f"written to {out}: run it with `fedtide simulate {out}`")


def _write(path: Path, text: str) -> None:
    from common.config import PlanError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be written ({error.strerror}): choose another --out") from error


def _show(proposal: Proposal) -> None:
    from rich.console import Console
    from rich.table import Table

    plan = proposal.plan
    shares = {
        "popularity": plan.statistics.popularity_share,
        "transitions": plan.statistics.transition_share,
        "metrics": plan.metrics.share,
    }
    shares["update"] = 1 - sum(shares.values()) if plan.training.rounds else 0.0
    table = Table(title="what each part costs, and is expected to buy")
    for name in ("phase", "share", "noise", "signal/noise"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    table.add_column("expected")
    for each in proposal.expectations:
        table.add_row(
            each.phase,
            f"{shares[each.phase]:.0%}",
            f"{each.noise:g}",
            f"{each.signal_to_noise:.2g}",
            each.says,
        )
    console = Console()
    console.print(table)
    rounds = plan.training.rounds
    told = (
        f"{rounds} rounds of {plan.training.steps_per_round} steps, each with a user's chance of "
        f"{plan.privacy.sampling_rate:g}"
        if rounds
        else "no private fine-tuning"
    )
    console.print(
        f"epsilon {proposal.epsilon:.3f} of {plan.privacy.epsilon:g} at delta {plan.privacy.delta:g}; {told}.\n"
        f"A ledger that admits this run once: epsilon {proposal.budget:g}, Renyi order {proposal.order}.\n"
        "Signal to noise is by formulae over the assumptions named; it promises no quality.",
        highlight=False,
    )
