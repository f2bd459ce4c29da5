"""docs/results.md from the cells: tables, paired comparisons, and what was tried before."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.metrics import paired_difference
from server.runs import RunError, write_whole
from simulations.grid.cells import (
    ALONE,
    BASELINES,
    BENCHES,
    CENTRAL,
    DELTA,
    FAMILIES,
    NONE,
    PRETRAINED,
    STATISTICS,
    TEN,
    WHOLE,
    Bench,
)
from simulations.grid.tried import SPREAD, TRIED

SIGNIFICANT_Z = 1.96
_BUDGETS = (NONE, "20", "8", "2")
Key = tuple[str, str, str, str]
"""Model, layout, epsilon, recipe."""


@dataclass
class Row:
    """Seeds of one key: [seeds] lists of [users] NDCG and hits."""

    ndcg: list[npt.NDArray[np.float64]]
    hits: list[npt.NDArray[np.float64]]

    @property
    def cell(self) -> str:
        """For a table."""
        means = [each.mean() for each in self.ndcg]
        spread = f" ± {np.std(means, ddof=1):.4f}" if len(means) > 1 else ""
        return f"{np.mean(means):.4f}{spread}"

    @property
    def per_user(self) -> npt.NDArray[np.float64]:
        """[users] NDCG averaged over the seeds."""
        found: npt.NDArray[np.float64] = np.mean(self.ndcg, axis=0)
        return found


def rows_of(folder: Path, bench: Bench, split: str = "test") -> dict[Key, Row]:
    """All that is done of a bench."""
    rows: dict[Key, Row] = {}
    for file in sorted(folder.glob(f"{bench.data}_{bench.protocol}_*.json")):
        found: dict[str, Any] = json.loads(file.read_text())
        cell = found["cell"]
        row = rows.setdefault((cell["model"], cell["layout"], cell["epsilon"], cell["recipe"]), Row([], []))
        row.ndcg.append(np.array(found[split]["ndcg"]))
        row.hits.append(np.array(found[split]["hits"]))
    return rows


def _table(rows: dict[Key, Row]) -> list[str]:
    lines = [
        "| model | sites | no privacy | epsilon 20 | epsilon 8 | epsilon 2 |",
        "|---|---|---|---|---|---|",
    ]
    for name in BASELINES:
        if (row := rows.get((name, "", "", ""))) is not None:
            lines.append(f"| {name} | all users pooled | {row.cell} | | | |")
    for layout in (CENTRAL, TEN):
        sites = "one" if layout == CENTRAL else "ten"
        for model, recipe in (("recommend", STATISTICS), *((family, WHOLE) for family in FAMILIES)):
            cells = [rows.get((model, layout, epsilon, recipe)) for epsilon in _BUDGETS]
            if any(cells):
                name = "statistics alone" if recipe == STATISTICS else model
                lines.append(
                    f"| {name} | {sites} | " + " | ".join(row.cell if row else "–" for row in cells) + " |"
                )
    return lines


def _recipes(rows: dict[Key, Row]) -> list[str]:
    lines = [
        "| epsilon 8, ten sites | all phases | with pre-training | DP-SGD alone | z: pre-training against alone |"
    ]
    lines.append("|---|---|---|---|---|")
    for family in FAMILIES:
        whole, pre, alone = (rows.get((family, TEN, "8", recipe)) for recipe in (WHOLE, PRETRAINED, ALONE))
        if whole and pre and alone:
            z = paired_difference(pre.per_user, alone.per_user).z
            lines.append(f"| {family} | {whole.cell} | {pre.cell} | {alone.cell} | {z:.1f} |")
    return lines


def _against(own: Row, other: Row, names: tuple[str, str]) -> str:
    paired = paired_difference(own.per_user, other.per_user)
    if abs(paired.z) < SIGNIFICANT_Z:
        verdict = "**no significant difference**"
    else:
        verdict = "better" if paired.mean > 0 else "**worse**"
    return (
        f"- {names[0]} against {names[1]}: NDCG@10 {paired.mean:+.4f} ± {paired.standard_error:.4f} over "
        f"{len(own.per_user)} users, z = {paired.z:.1f}: {verdict}."
    )


def _sentences(rows: dict[Key, Row], validation: dict[Key, Row]) -> list[str]:
    def best(among: list[Key]) -> Key | None:
        there = [key for key in among if key in validation]
        return max(there, key=lambda key: float(validation[key].per_user.mean()), default=None)

    lines = []
    content, transitions = rows.get(("content only", "", "", "")), rows.get(("item transitions", "", "", ""))
    private = best([(family, TEN, "8", WHOLE) for family in FAMILIES])
    if private and content:
        name = f"{private[0]} (the best family on validation), epsilon 8, ten sites"
        lines.append(_against(rows[private], content, (name, "content only")))
        for other, said in (
            (rows.get(("popularity", "", "", "")), "popularity"),
            (transitions, "item transitions without privacy"),
            (rows.get(("recommend", TEN, "8", STATISTICS)), "statistics alone"),
        ):
            if other:
                lines.append(_against(rows[private], other, (name, said)))
    strong = best([("gru4rec", "", "", ""), ("sasrec", "", "", "")])
    open_own = rows.get(("recommend", CENTRAL, NONE, WHOLE))
    if strong and open_own:
        ratio = open_own.per_user.mean() / rows[strong].per_user.mean()
        lines.append(
            f"- recommend without privacy reaches {ratio:.0%} of {strong[0]} (the better of the two on validation): "
            + ("within 5 %." if ratio >= 0.95 else f"**{1 - ratio:.0%} below it**, more than 5 %.")
        )
    return lines


def _about(rows: dict[Key, Row]) -> str:
    users = len(next(iter(rows.values())).ndcg[0])
    seeds = max(len(row.ndcg) for row in rows.values())
    error = next(
        (
            float(np.std(row.per_user, ddof=1) / np.sqrt(users))
            for key, row in rows.items()
            if key[0] == "recommend" and key[3] == WHOLE
        ),
        float("nan"),
    )
    return (
        f"{users} users judged; up to {seeds} seeds, ± is the standard deviation over a row's. The standard error "
        f"over users is larger: about {error:.4f}."
    )


def write_page(folder: Path, output: Path, seconds: float, *, say: Callable[[str], None] = print) -> None:
    """Writes the page of all cells that are done.

    Raises:
        RunError: there are none.
    """
    benches = [(bench, rows) for bench in BENCHES if (rows := rows_of(folder, bench))]
    if not benches:
        raise RunError(f"{folder} holds no cell: run `python -m simulations.grid` first")
    spent = sum(json.loads(file.read_text())["seconds"] for file in folder.glob("*.json"))
    count = len(list(folder.glob("*.json")))
    lines = [
        "# Results",
        "",
        f"Made by `python -m simulations.grid` ({count} trainings, {spent / 3600:.1f} h of one core's time in all) on "
        f"{time.strftime('%Y-%m-%d')} ({platform.machine()}, Python {platform.python_version()}, torch "
        f"{version('torch')}, Opacus {version('opacus')}, dp-accounting {version('dp-accounting')}).",
        "",
        "NDCG@10 on the test split, ranking against the full catalog, seen items masked, ties at mid-rank. Each user "
        f'of each site has the epsilon of the column at delta {DELTA:g} over the whole training. "one" is one site '
        'that holds everybody; "ten" are ten sites whose releases are private each by itself (MovieLens-100K by ZIP, '
        'Online Retail by a hash of the customer). "No privacy" over one site is AdamW beside exact statistics; over '
        "ten, the private recipe with exact sums and no noise, users still sampled and clipped. A – was not run.",
    ]
    for bench, rows in benches:
        lines += ["", f"## {bench}", "", _about(rows), "", *_table(rows), "", *_recipes(rows), ""]
        lines += _sentences(rows, rows_of(folder, bench, "validation"))
    lines += [
        "",
        "## How far one draw lies from another",
        "",
        SPREAD,
        "",
        "## What was tried before",
        "",
        TRIED,
        "",
    ]
    write_whole(output, "\n".join(lines).encode())
    say(f"{output} is written from {count} cells")
