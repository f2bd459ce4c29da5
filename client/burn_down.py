"""How a site's budget burnt down, run by run: in words, as JSON, as a plot.

For the site's own administrator, as all that the site's command line prints.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.ledger_reading import LedgerStatus

_BAR = 40
_BARS = 24


def _runs(status: LedgerStatus) -> list[dict[str, Any]]:
    """What each run took, in the order of their first charges."""
    runs: dict[str, dict[str, Any]] = {}
    for charge in status.charges:
        it = runs.setdefault(
            charge.reserve.run,
            {"run": charge.reserve.run, "released": 0, "burnt": 0, "open": 0, "share": 0.0},
        )
        it[charge.outcome] += 1
        it["share"] += charge.reserve.charge / status.cap
        it["left_after"] = 1 - charge.reserve.spent / status.cap
    return list(runs.values())


def facts(name: str, status: LedgerStatus) -> dict[str, Any]:
    """What `fedtide site status --json` says."""
    genesis = status.genesis
    return {
        "site": name,
        "key_id": status.key_id,
        "epsilon": genesis.epsilon,
        "delta": genesis.delta,
        "renyi_order": genesis.order,
        "share_spent": status.share,
        "spent": status.spending().as_json(),
        "spent_nano": status.spent,
        "cap_nano": status.cap,
        "charges": len(status.charges),
        "burnt": status.burnt,
        "open": status.open,
        "withdrawn": status.closed,
        "head": {"seq": status.seq, "hash": status.head},
        "runs": _runs(status),
    }


def show(name: str, status: LedgerStatus) -> None:
    """Prints what was spent, and a bar for what each run left."""
    from rich.console import Console
    from rich.table import Table

    console, genesis = Console(), status.genesis
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(
        f"Site {name}: {status.share:.1%} of the Renyi budget at order {genesis.order} spent; total guarantee "
        f"(epsilon {genesis.epsilon:g}, delta {genesis.delta:g}) for each user, whatever happens next."
    )
    for sentence in status.spending().sentences():
        say(sentence)
    if status.closed:
        say("The site has withdrawn: nothing more may be reserved or released.")
    say(
        f"{len(status.charges)} charges, {status.burnt} of them burnt (charged, never released), "
        f"{status.open} open; the ledger ends at entry {status.seq}."
    )
    if not status.charges:
        return
    table = Table(title="burn-down: what is left of the budget after each run")
    table.add_column("run", overflow="fold")
    for column in ("released", "burnt", "spent", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    runs = _runs(status)
    if len(runs) > _BARS:
        say(f"The last {_BARS} of {len(runs)} runs:")
    for run in runs[-_BARS:]:
        full = round(_BAR * run["left_after"])
        table.add_row(
            run["run"],
            str(run["released"]),
            str(run["burnt"] + run["open"]),
            f"{run['share']:.1%}",
            f"{run['left_after']:.1%}",
            "█" * full + "░" * (_BAR - full),
        )
    console.print(table)


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 480, 300, 44, 44, 8


def svg(status: LedgerStatus) -> str:
    """The burn-down as an `svg` element for a page, of the page's colours; needs no library."""
    left = [1.0] + [1 - charge.reserve.spent / status.cap for charge in status.charges]
    wide, high = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - _TOP

    def at(number: float, share: float) -> str:
        return f"{_LEFT + wide * number / len(left):.1f} {_TOP + high * (1 - share):.1f}"

    line = f"M{at(0, 1)}" + "".join(
        f"L{at(place, before)}L{at(place, after)}" for place, (before, after) in enumerate(pairwise(left), 1)
    )
    lost = [place for place, charge in enumerate(status.charges, 1) if charge.outcome != "released"]
    crosses = "".join(f"M{at(place, left[place])}m-4 -4l8 8m0 -8l-8 8" for place in lost)
    grid = "".join(
        f'<path d="M{at(0, share)}L{at(len(left), share)}" stroke="var(--rule)"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + high * (1 - share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    ends = "".join(
        f'<text x="{_LEFT + wide * place / len(left):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{place}</text>'
        for place in sorted({0, len(left) // 2, len(left) - 1})
    )
    said = (
        f"{left[-1]:.1%} is left after {len(status.charges)} charges, {len(lost)} of which released nothing."
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="burn-down-title burn-down-desc" '
        'class="chart" xmlns="http://www.w3.org/2000/svg" font-size="12" fill="var(--ink)">'
        f'<title id="burn-down-title">Budget left, charge by charge</title><desc id="burn-down-desc">{said}</desc>'
        f'{grid}{ends}<path d="{line}L{at(len(left), left[-1])}" fill="none" stroke="#0072b2" stroke-width="2"/>'
        f'<path d="{crosses or "M0 0"}" fill="none" stroke="#d55e00" stroke-width="2"/>'
        f'<text x="{_LEFT + wide / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">charge, over all runs</text></svg>'
    )


def draw(status: LedgerStatus, name: str, file: Path) -> None:
    """Draws what is left after each charge as a PNG.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    from common.cli import UserError

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "--plot needs matplotlib: install fedtide[simulation], or leave --plot out"
        ) from error
    left = [1.0] + [1 - charge.reserve.spent / status.cap for charge in status.charges]
    burnt = [place + 1 for place, charge in enumerate(status.charges) if charge.outcome != "released"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.step(range(len(left)), left, where="post", label="budget left")
    axes.plot(burnt, [left[place] for place in burnt], "x", color="tab:red", label="burnt or open")
    axes.set(xlabel="charges", ylabel="share of the Renyi budget", ylim=(0, 1.02), title=f"{name}: burn-down")
    axes.legend()
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"the plot {file} cannot be written ({error}): choose another path") from error
