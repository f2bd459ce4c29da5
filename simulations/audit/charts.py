"""The report's charts of the record. One that cannot be drawn from what is there is left out, and says so.

Those of what the tools found are in `tool_charts.py`, made in the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from simulations.audit.report_record import Ledger
from simulations.audit.svg import BLUE, GREEN, INK, ORANGE, PURPLE, RED, SKY, figure, plain, svg

LOOKS = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"), (SKY, "-", "v"))


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: `svg` is None where there is nothing to draw, and `caption` then says why."""

    name: str
    title: str
    caption: str
    svg: str | None = None


class NothingToDrawError(ValueError):
    """The data for a chart are not there, or not of the shape that was agreed upon."""


def chart(name: str, title: str, caption: str, draw: Callable[[Any], None]) -> Chart:
    """The chart that `draw` puts on matplotlib's axes, or none where it finds nothing to draw."""
    with figure() as (made, axes):
        try:
            draw(axes)
        except (NothingToDrawError, KeyError, TypeError, ValueError, IndexError, AttributeError):
            return Chart(name, title, "There is nothing to draw: no figures for this chart were found.")
        return Chart(name, title, caption, svg(made, f"chart-{name}", title, caption))


def _groups(ledgers: Sequence[Ledger], key: Callable[[Ledger], object]) -> list[tuple[str, Ledger]]:
    """Ledgers whose line would be the same, once, with the name of their line."""
    alike: dict[object, list[Ledger]] = defaultdict(list)
    for ledger in ledgers:
        alike[key(ledger)].append(ledger)
    if not alike:
        raise NothingToDrawError
    return [
        (plain(same[0].site) if len(same) == 1 else f"{len(same)} sites alike", same[0])
        for same in alike.values()
    ]


def epsilon_by_round(ledgers: Sequence[Ledger], promised: float) -> Chart:
    """What each site's charges of the run, and all it ever charged, had come to by round, beside promise and cap."""

    def draw(axes: Any) -> None:
        looks = cycle(LOOKS)
        for name, ledger in _groups(ledgers, lambda each: (tuple(each.by_round), each.epsilon)):
            if not ledger.by_round:
                continue
            colour, dash, marker = next(looks)
            rounds = [point.round for point in ledger.by_round]
            axes.plot(
                rounds,
                [point.pld for point in ledger.by_round],
                color=colour,
                linestyle=dash,
                marker=marker,
                label=f"claimed for this run, {name}",
            )
            axes.plot(
                rounds,
                [point.filter for point in ledger.by_round],
                color=colour,
                linestyle=":",
                linewidth=1.1,
                label=f"all runs, by the filter, {name}",
            )
        axes.axhline(
            promised, color=INK, linestyle="--", linewidth=1.1, label=f"promised for this run: {promised:g}"
        )
        caps = sorted({ledger.epsilon for ledger in ledgers})
        for cap in caps[:3]:
            axes.axhline(cap, color=RED, linestyle="-.", linewidth=1.1, label=f"site's lifetime cap: {cap:g}")
        rounds_axis(axes)
        axes.set_ylabel("epsilon")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)

    return chart(
        "epsilon",
        "Epsilon, round by round",
        "What was claimed (PLD) for this run after each round, below what was promised for the run. The dotted line is "
        "the site's brake: it counts all its runs, and stops before the cap that the ledger keeps for its lifetime, "
        "whatever was chosen on the way.",
        draw,
    )


def rounds_axis(axes: Any) -> None:
    """Whole rounds from left to right."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def burn_down(ledgers: Sequence[Ledger]) -> Chart:
    """What was left of each site's budget after each charge in its life; charges without a release are marked."""

    def draw(axes: Any) -> None:
        looks = cycle(LOOKS)
        for name, ledger in _groups(
            ledgers, lambda each: tuple((c.spent, c.outcome, c.here) for c in each.charges)
        ):
            colour, dash, _ = next(looks)
            numbers = [0, *(charge.number for charge in ledger.charges), len(ledger.charges) + 0.5]
            left = [1.0, *(1 - charge.spent for charge in ledger.charges)]
            left.append(left[-1])
            axes.step(
                numbers, [100 * each for each in left], where="post", color=colour, linestyle=dash, label=name
            )
            for outcome, marker in (("burnt", "X"), ("open", "o")):
                lost = [charge for charge in ledger.charges if charge.outcome == outcome]
                if lost:
                    axes.scatter(
                        [charge.number for charge in lost],
                        [100 * (1 - charge.spent) for charge in lost],
                        marker=marker,
                        color=RED,
                        zorder=3,
                        label=f"{outcome}: charged, nothing released",
                    )
        rounds_axis(axes)
        axes.set_xlabel("charge, over all runs in the ledger")
        axes.set_ylabel("left of the Renyi budget, %")
        axes.set_ylim(0, 104)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(list(handles.values()), list(handles))

    return chart(
        "burn-down",
        "Each site's budget, charge by charge",
        "A site's budget is for its lifetime and never refilled. Each step is a charge, made before the data was "
        "looked at; a crossed mark is a charge that burnt: it was spent, and nothing was released for it.",
        draw,
    )
