"""The control chart of `fedtide audit noise`, as a file beside its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INK, _SEA, _STONE = "#1b2a41", "#1f7a8c", "#8d99ae"
_SAND = "#d98e04"
_SITES_SHOWN = 12


def draw(path: Path, sites: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes the chart: each site's noise by round over the claimed, and over all rounds so far.

    Args:
        path: its ending says the format (.svg, .png).
        sites: of the evidence's series; the furthest from 1 are shown where there are many, and those that leave their
            band are named.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def outside(site: str) -> bool:
        return any(
            not point["so_far_low"] <= point["so_far"] <= point["so_far_high"] for point in sites[site]
        )

    furthest = sorted(sites, key=lambda site: -max(abs(point["ratio"] - 1) for point in sites[site]))
    shown = [site for site in sites if site in furthest[:_SITES_SHOWN]]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes.set_title("Noise in each release, over what is claimed", loc="left", fontsize=11, color=_INK)
    for place, site in enumerate(shown):
        points, colour = sites[site], _SAND if outside(site) else _SEA
        rounds, last = [point["round"] for point in points], points[-1]
        releases, so_far = ("one release", "a site, all rounds so far") if not place else (None, None)
        axes.plot(
            rounds, [point["ratio"] for point in points], ".", color=_STONE, markersize=4, label=releases
        )
        axes.plot(rounds, [point["so_far"] for point in points], color=colour, linewidth=1.2, label=so_far)
        if outside(site) or len(shown) == 1:
            axes.annotate(
                site[:20],
                (rounds[-1], last["so_far"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
                parse_math=False,
            )
    widest = max(shown, key=lambda site: len(sites[site]))
    rounds = [point["round"] for point in sites[widest]]
    for low, high, style, label in (
        ("low", "high", "--", "three standard deviations of one release"),
        ("so_far_low", "so_far_high", ":", "and of all rounds so far"),
    ):
        axes.plot(rounds, [p[low] for p in sites[widest]], style, color=_INK, linewidth=0.9, label=label)
        axes.plot(rounds, [p[high] for p in sites[widest]], style, color=_INK, linewidth=0.9)
    axes.axhline(1.0, color=_INK, linewidth=0.6)
    axes.set_xlabel("round")
    axes.set_ylabel("noise / claimed noise")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)
