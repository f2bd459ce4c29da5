"""What all plots share, and those of a deployment's run: PNG files in its folder, of what the server knows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.runs import write_whole

INK, SEA, SAND, STONE = "#1b2a41", "#1f7a8c", "#d98e04", "#8d99ae"


def figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A figure and its axes, in the house's style."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    made, axes = plt.subplots(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return made, axes


def save(made: Any, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all, and lets go of it.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    from matplotlib import pyplot as plt

    image = io.BytesIO()
    made.savefig(image, format="png", metadata={"Software": None})
    plt.close(made)
    write_whole(path, image.getvalue())


_MOST_NAMED = 8
"""Sites that a legend names; of more the one that spent most is drawn, and the others are a band."""


def epsilon_by_site(path: Path, epsilons: Mapping[str, Sequence[float]], promise: float) -> None:
    """PLD epsilon at each site after each round, of what it was seen to release.

    Args:
        epsilons: site -> epsilon after each round, from the start.
    """
    made, axes = figure("Privacy cost by round and site", "round", "epsilon (PLD) of what was released")
    named = len(epsilons) <= _MOST_NAMED
    for name, values in epsilons.items():
        axes.plot(
            range(len(values)),
            values,
            color=None if named else STONE,
            marker="o",
            markersize=3,
            linewidth=1.6 if named else 0.8,
            alpha=1.0 if named else 0.5,
            label=name if named else None,
        )
    if epsilons and not named:
        worst = max(epsilons, key=lambda name: epsilons[name][-1])
        axes.plot(epsilons[worst], color=SEA, linewidth=1.8, label=f"{worst}, which released most")
    axes.axhline(
        promise, color=INK, linestyle="--", linewidth=1.2, label=f"promised for the run: {promise:g}"
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    save(made, path)


def sites_by_round(path: Path, admitted: Sequence[int], left_out: Sequence[int]) -> None:
    """How many sites were admitted and left out, round by round."""
    made, axes = figure("Sites by round", "round", "sites")
    places = range(1, len(admitted) + 1)
    axes.bar(places, admitted, color=SEA, label="admitted")
    axes.bar(places, left_out, bottom=admitted, color=SAND, label="left out, or silent")
    axes.legend(frameon=False, fontsize=8)
    save(made, path)
