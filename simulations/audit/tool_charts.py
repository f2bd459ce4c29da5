"""The report's charts of what the tools found, each from the series of a tool's evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import isfinite
from typing import Any

from simulations.audit.charts import LOOKS, Chart, NothingToDrawError, chart, rounds_axis
from simulations.audit.svg import BLUE, INK, RED, SKY, plain

_SMALLEST_RATE = 1e-3


def control_chart(series: Mapping[str, Any]) -> Chart:
    """The noise in each release against what its receipt says, by round and site, with control limits."""

    def draw(axes: Any) -> None:
        sites = list(series["sites"].values())
        points = [
            {**point, "x": int(point["round"]) + 0.5 * ((place + 0.5) / len(sites) - 0.5)}
            for place, site in enumerate(sites)
            for point in site
        ]
        if not points:
            raise NothingToDrawError
        by_round = {int(point["round"]): (float(point["low"]), float(point["high"])) for point in points}
        rounds = sorted(by_round)
        edges = [rounds[0] - 0.5, *(number + 0.5 for number in rounds)]
        band = [by_round[rounds[0]], *(by_round[number] for number in rounds)]
        axes.fill_between(
            edges,
            [low for low, _ in band],
            [high for _, high in band],
            color=SKY,
            alpha=0.25,
            linewidth=0,
            label="three standard deviations",
            step="pre",
        )
        inside = [point for point in points if point["low"] <= point["ratio"] <= point["high"]]
        outside = [point for point in points if not point["low"] <= point["ratio"] <= point["high"]]
        axes.axhline(1, color=INK, linewidth=1)
        for some, colour, marker, label in (
            (inside, BLUE, "o", "one release"),
            (outside, RED, "X", "outside"),
        ):
            if some:
                axes.scatter(
                    [point["x"] for point in some],
                    [float(point["ratio"]) for point in some],
                    color=colour,
                    marker=marker,
                    s=18 if some is inside else 48,
                    alpha=0.75 if some is inside else 1,
                    label=label,
                    zorder=3,
                )
        rounds_axis(axes)
        reach = max(abs(float(point[key]) - 1) for point in points for key in ("ratio", "low", "high"))
        axes.set_ylim(1 - 1.35 * reach, 1 + 1.35 * reach)
        axes.set_ylabel("noise found / noise claimed")
        axes.figure.legend(loc="outside lower center", ncols=3)

    return chart(
        "noise",
        "Noise in every release",
        "Some places of each release carry noise alone, so anyone can measure it: 1 is exactly what the receipt "
        "says. One point is one release of one site; honest ones leave the band once in about 370. What decides are "
        "the checks below.",
        draw,
    )


def lower_bounds(series: Mapping[str, Any]) -> Chart:
    """What planted users gave away of epsilon, round by round, below what was claimed for them."""

    def draw(axes: Any) -> None:
        points = sorted(series["rounds"], key=lambda point: int(point["round"]))
        if not points:
            raise NothingToDrawError
        rounds = [int(point["round"]) for point in points]
        for key, label, (colour, dash, marker) in zip(
            ("claimed", "f_dp", "steinke"),
            ("claimed", "at least (f-DP)", "at least (Steinke)"),
            ((INK, "-", "o"), *LOOKS[:2]),
            strict=True,
        ):
            axes.plot(
                rounds,
                [float(point[key]) for point in points],
                color=colour,
                linestyle=dash,
                marker=marker,
                label=label,
            )
        rounds_axis(axes)
        axes.set_ylabel("epsilon, of the audit")
        axes.set_ylim(bottom=0)
        axes.legend()

    return chart(
        "canaries",
        "What planted users gave away",
        "Epsilon is at least what the lower lines say, each with 95 % confidence: one above the upper line would speak "
        "against the claim. The same code is audited at a small epsilon of its own, because at a large one no "
        "single run could fail.",
        draw,
    )


def roc(series: Mapping[str, Any]) -> Chart:
    """How well attacks tell who took part, on log axes, with what the claim allows."""

    def draw(axes: Any) -> None:
        curves = [
            (plain(attack, 14), plain(variant, 16), points)
            for attack, variants in series["roc"].items()
            for variant, points in variants.items()
        ]
        if not curves:
            raise NothingToDrawError
        colours = dict(zip(dict.fromkeys(v for _, v, _ in curves), cycle(LOOKS), strict=False))
        dashes = dict(zip(dict.fromkeys(a for a, _, _ in curves), cycle(("-", "--", ":")), strict=False))
        for attack, variant, points in curves:
            xs, ys = _above(points)
            axes.plot(
                xs, ys, color=colours[variant][0], linestyle=dashes[attack], label=f"{attack}, {variant}"
            )
        if series.get("dp_boundary"):
            xs, ys = _above(series["dp_boundary"])
            axes.plot(xs, ys, color=INK, linewidth=2.2, label="most that the noise allows")
        axes.plot(
            [_SMALLEST_RATE, 1], [_SMALLEST_RATE, 1], color=INK, linewidth=0.9, linestyle=":", label="chance"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(_SMALLEST_RATE, 1)
        axes.set_ylim(_SMALLEST_RATE, 1.15)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
            axis.set_minor_formatter(lambda share, _: "")
        axes.set_xlabel("outsiders wrongly named")
        axes.set_ylabel("participants recognised")
        axes.legend(fontsize=7.5)

    return chart(
        "roc",
        "Telling who took part",
        "The higher a line, the better the attack; the dotted line is chance, and the thick one the most that the "
        "noise of the attacked model allows anyone. What these attacks fail to find is no bound on what better "
        "ones would.",
        draw,
    )  # fmt: skip


def _above(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    pairs = [(float(x), float(y)) for x, y in points]
    kept = [(max(x, _SMALLEST_RATE), max(y, _SMALLEST_RATE)) for x, y in pairs if isfinite(x) and isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def recovery(series: Mapping[str, Any]) -> Chart:
    """What share of a user's items can be read off one update, by the noise in it."""

    def draw(axes: Any) -> None:
        rows = list(series["recovery"])
        if not rows:
            raise NothingToDrawError
        places = range(len(rows))
        axes.barh(places, [float(row["precision"]) for row in rows], color=BLUE, height=0.55, label="found")
        axes.scatter(
            [float(row["chance"]) for row in rows],
            places,
            color=RED,
            marker="|",
            s=260,
            zorder=3,
            label="chance",
        )
        axes.set_yticks(places, [plain(row["variant"], 22) for row in rows])
        axes.set_xlim(0, 1.02)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(max(len(rows), 3) - 0.4, -0.6)
        axes.set_xlabel("share of guessed items that were right")
        axes.figure.legend(loc="outside lower center", ncols=2)

    return chart(
        "recovery",
        "Reading a user's items off one update",
        "How many of the items that an attacker names were truly the user's. Without noise it is nearly all of "
        "them; with the noise of this run it should be near chance.",
        draw,
    )  # fmt: skip
