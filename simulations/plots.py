"""A run's plots, as PNG files in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.metrics import Metric
from server.plots import INK, SAND, SEA, STONE, save
from server.plots import figure as new_figure
from simulations.baselines import Epoch
from simulations.quality import Quality

if TYPE_CHECKING:
    from simulations.sweep import Spread

_LINES = {"popularity": (STONE, ":"), "content only": (INK, "--"), "no privacy": (SAND, "-.")}


def _baseline_lines(axes: Any, baselines: dict[str, Quality]) -> None:
    for name, quality in baselines.items():
        colour, style = _LINES.get(name, (STONE, "-"))
        axes.axhline(
            quality.metrics[quality.headline].value, color=colour, linestyle=style, linewidth=1.3, label=name
        )


def _private_curve(axes: Any, xs: list[float], qualities: list[Quality]) -> None:
    metric = [quality.metrics[quality.headline] for quality in qualities]
    values = [each.value for each in metric]
    axes.plot(xs, values, color=SEA, marker="o", markersize=3.5, linewidth=1.8, label="Fedtide")
    axes.fill_between(
        xs,
        [each.value - each.standard_error for each in metric],
        [each.value + each.standard_error for each in metric],
        color=SEA,
        alpha=0.15,
        linewidth=0,
    )


def quality_by_round(path: Path, validation: list[Quality], baselines: dict[str, Quality]) -> None:
    """The headline metric on the validation split after each round; the band is one standard error over users."""
    figure, axes = new_figure("Quality by round (validation)", "round", validation[0].headline)
    _private_curve(axes, [float(number) for number in range(len(validation))], validation)
    _baseline_lines(axes, baselines)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def epsilon_by_round(path: Path, epsilons: list[float], promise: float, budget: float) -> None:
    """What the rounds cost: PLD epsilon after each, beside the plan's promise and the ledger's cap."""
    figure, axes = new_figure("Privacy cost by round", "round", "epsilon (PLD)")
    axes.plot(
        range(len(epsilons)),
        epsilons,
        color=SEA,
        marker="o",
        markersize=3.5,
        linewidth=1.8,
        label="this run: what was released, and at the end all charges",
    )
    axes.axhline(
        promise, color=INK, linestyle="--", linewidth=1.2, label=f"promised for the run: {promise:g}"
    )
    axes.axhline(budget, color=SAND, linestyle="-.", linewidth=1.2, label=f"site's lifetime cap: {budget:g}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def privacy_utility(
    path: Path, epsilons: list[float], validation: list[Quality], baselines: dict[str, Quality]
) -> None:
    """What each further unit of epsilon bought, on the validation split."""
    figure, axes = new_figure(
        "Quality against privacy cost (validation)", "epsilon spent (PLD)", validation[0].headline
    )
    _private_curve(axes, epsilons, validation)
    _baseline_lines(axes, baselines)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def training_curves(path: Path, epochs: Sequence[Epoch]) -> None:
    """The model without privacy, epoch by epoch: loss on training events, and the validation metric."""
    figure, axes = new_figure("Training without privacy", "epoch", "training loss")
    places = range(1, len(epochs) + 1)
    axes.plot(
        places,
        [epoch.loss for epoch in epochs],
        color=SAND,
        marker="o",
        markersize=3.5,
        label="training loss",
    )
    other = axes.twinx()
    headline = epochs[0].validation.headline
    values = [epoch.validation.metrics[headline].value for epoch in epochs]
    other.plot(places, values, color=SEA, marker="s", markersize=3.5, label=f"validation {headline}")
    other.set_ylabel(f"validation {headline}")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    save(figure, path)


def runs_side_by_side(path: Path, metric: str, part: str, runs: Sequence[tuple[str, Metric]]) -> None:
    """One metric of some runs, each with its 95 % interval over users."""
    made, axes = new_figure(f"{metric}, {part} split, with 95 % intervals over users", metric, "")
    places = list(range(len(runs), 0, -1))
    values = [each.value for _, each in runs]
    errors = [1.96 * each.standard_error if math.isfinite(each.standard_error) else 0.0 for _, each in runs]
    axes.errorbar(values, places, xerr=errors, fmt="o", color=SEA, ecolor=SEA, capsize=3, markersize=5)
    axes.axvline(values[0], color=STONE, linestyle=":", linewidth=1.2)
    axes.set_yticks(places, [name for name, _ in runs], fontsize=7)
    axes.set_ylim(0.5, len(runs) + 0.5)
    save(made, path)


def sweep_curve(
    path: Path,
    metric: str,
    parts: Mapping[str, Sequence[tuple[float, Spread]]],
    baselines: Mapping[str, float],
    baselines_of: str,
) -> None:
    """A metric over epsilon, for each part of the held-out events: mean and standard deviation over seeds."""
    made, axes = new_figure(f"{metric} by epsilon", "epsilon of the run", metric)
    for (part, points), (colour, marker) in zip(parts.items(), ((STONE, "s"), (SEA, "o")), strict=False):
        axes.errorbar(
            [epsilon for epsilon, _ in points],
            [spread.mean for _, spread in points],
            yerr=[spread.deviation if math.isfinite(spread.deviation) else 0.0 for _, spread in points],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            capsize=3,
            label=f"Fedtide, {part}",
        )
    for name, value in baselines.items():
        colour, style = _LINES.get(name, (STONE, "-"))
        axes.axhline(value, color=colour, linestyle=style, linewidth=1.3, label=f"{name}, {baselines_of}")
    axes.set_xscale("log")
    epsilons = sorted({epsilon for points in parts.values() for epsilon, _ in points})
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    save(made, path)
