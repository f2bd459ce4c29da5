"""A run's plots, as PNG files in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulations.baselines import Epoch
from simulations.quality import Quality

_INK, _SEA, _SAND, _STONE = "#1b2a41", "#1f7a8c", "#d98e04", "#8d99ae"
_LINES = {"popularity": (_STONE, ":"), "content only": (_INK, "--"), "no privacy": (_SAND, "-.")}


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _baseline_lines(axes: Any, baselines: dict[str, Quality]) -> None:
    for name, quality in baselines.items():
        colour, style = _LINES.get(name, (_STONE, "-"))
        axes.axhline(
            quality.metrics[quality.headline].value, color=colour, linestyle=style, linewidth=1.3, label=name
        )


def _private_curve(axes: Any, xs: list[float], qualities: list[Quality]) -> None:
    metric = [quality.metrics[quality.headline] for quality in qualities]
    values = [each.value for each in metric]
    axes.plot(xs, values, color=_SEA, marker="o", markersize=3.5, linewidth=1.8, label="Fedtide")
    axes.fill_between(
        xs,
        [each.value - each.standard_error for each in metric],
        [each.value + each.standard_error for each in metric],
        color=_SEA,
        alpha=0.15,
        linewidth=0,
    )


def quality_by_round(path: Path, validation: list[Quality], baselines: dict[str, Quality]) -> None:
    """The headline metric on the validation split after each round; the band is one standard error over users."""
    figure, axes = _figure("Quality by round (validation)", "round", validation[0].headline)
    _private_curve(axes, [float(number) for number in range(len(validation))], validation)
    _baseline_lines(axes, baselines)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def epsilon_by_round(path: Path, epsilons: list[float], promise: float, budget: float) -> None:
    """What the rounds cost: PLD epsilon after each, beside the plan's promise and the ledger's cap."""
    figure, axes = _figure("Privacy cost by round", "round", "epsilon (PLD)")
    axes.plot(
        range(len(epsilons)),
        epsilons,
        color=_SEA,
        marker="o",
        markersize=3.5,
        linewidth=1.8,
        label="this run: what was released, and at the end all charges",
    )
    axes.axhline(
        promise, color=_INK, linestyle="--", linewidth=1.2, label=f"promised for the run: {promise:g}"
    )
    axes.axhline(budget, color=_SAND, linestyle="-.", linewidth=1.2, label=f"site's lifetime cap: {budget:g}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def privacy_utility(
    path: Path, epsilons: list[float], validation: list[Quality], baselines: dict[str, Quality]
) -> None:
    """What each further unit of epsilon bought, on the validation split."""
    figure, axes = _figure(
        "Quality against privacy cost (validation)", "epsilon spent (PLD)", validation[0].headline
    )
    _private_curve(axes, epsilons, validation)
    _baseline_lines(axes, baselines)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def training_curves(path: Path, epochs: Sequence[Epoch]) -> None:
    """The model without privacy, epoch by epoch: loss on training events, and the validation metric."""
    figure, axes = _figure("Training without privacy", "epoch", "training loss")
    places = range(1, len(epochs) + 1)
    axes.plot(
        places,
        [epoch.loss for epoch in epochs],
        color=_SAND,
        marker="o",
        markersize=3.5,
        label="training loss",
    )
    other = axes.twinx()
    headline = epochs[0].validation.headline
    values = [epoch.validation.metrics[headline].value for epoch in epochs]
    other.plot(places, values, color=_SEA, marker="s", markersize=3.5, label=f"validation {headline}")
    other.set_ylabel(f"validation {headline}")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, path)
