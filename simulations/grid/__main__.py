"""`python -m simulations.grid`: fills the table's cells, as many as time allows, and writes the page.

Run it again to go on: cells that are done stay. `--only page` writes docs/results.md of what is there. Some of the
cells alone, such as one row of ten draws, are printed and the page is left as it is:

    python -m simulations.grid --bench 0 --model recommend --sites ten --epsilon 8 --recipe "all phases" --seeds 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from simulations.grid.cells import (
    ALONE,
    BASELINES,
    BENCHES,
    CENTRAL,
    DEMO,
    FAMILIES,
    NONE,
    PRETRAINED,
    PRIVATE,
    STATISTICS,
    TEN,
    WHOLE,
    Cell,
    cells,
    run_cell,
)

FOLDER = Path("runs/grid")


def fill(folder: Path, todo: list[Cell], retail: Path | None, console: Console) -> None:
    """Runs cells that have no file yet; another process may fill the same folder from the other end."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(todo, start=1):
        file = folder / cell.file_name
        claim = file.with_suffix(".begun")
        if file.exists():
            continue
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            found = run_cell(cell, retail)
            aside = file.with_suffix(".partial")
            aside.write_text(json.dumps(found))
            aside.rename(file)
        finally:
            claim.unlink(missing_ok=True)
        said = " ".join(part for part in (cell.model, cell.layout, cell.epsilon, cell.recipe) if part)
        console.print(
            f"{number}/{len(todo)} {cell.bench}: {said}, seed {cell.seed}: {found['seconds']:.0f} s",
            highlight=False,
        )


_SITES = {"one": CENTRAL, "ten": TEN}
_CHOICES = {
    "model": (*BASELINES, *FAMILIES),
    "sites": tuple(_SITES),
    "epsilon": (NONE, *PRIVATE),
    "recipe": (STATISTICS, WHOLE, PRETRAINED, ALONE, DEMO),
}


def _is_chosen(cell: Cell, given: argparse.Namespace) -> bool:
    own = {"model": cell.model, "sites": cell.layout, "epsilon": cell.epsilon, "recipe": cell.recipe}
    wanted = {name: getattr(given, name) for name in _CHOICES}
    wanted["sites"] = wanted["sites"] and [_SITES[each] for each in wanted["sites"]]
    return all(not wanted[name] or own[name] in wanted[name] for name in _CHOICES)


def rows_table(folder: Path, chosen: list[Cell]) -> Table:
    """The rows of some cells, over the seeds that are asked for."""
    found: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for cell in chosen:
        kept = json.loads((folder / cell.file_name).read_text())
        means = {
            split: sum(kept[split]["ndcg"]) / len(kept[split]["ndcg"]) for split in ("validation", "test")
        }
        key = (str(cell.bench), cell.model, cell.layout, cell.epsilon, cell.recipe)
        found.setdefault(key, []).append(means)
    table = Table(title="NDCG@10: mean ± standard deviation over seeds")
    for name in ("bench", "model", "sites", "epsilon", "recipe", "seeds", "validation", "test"):
        table.add_column(name)
    for words, draws in found.items():
        table.add_row(
            *words, str(len(draws)), *(_spread([each[s] for each in draws]) for s in ("validation", "test"))
        )
    return table


def _is_done(folder: Path, cell: Cell) -> bool:
    return (folder / cell.file_name).exists()


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.grid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the cells' results")
    parser.add_argument("--online-retail", type=Path, help="its folder or file; else the cache")
    parser.add_argument(
        "--bench", type=int, choices=range(len(BENCHES)), action="append", help="some of them only"
    )
    for name, choices in _CHOICES.items():
        parser.add_argument(f"--{name}", choices=choices, action="append", help="these cells alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["cells", "page"])
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error("--seeds must be at least 1")
    began = time.monotonic()
    benches = [BENCHES[place] for place in given.bench] if given.bench else list(BENCHES)
    some = any(getattr(given, name) for name in _CHOICES)
    console = Console()
    if given.only != "page":
        import torch

        torch.set_num_threads(given.threads)
        todo = [cell for bench in benches for cell in cells(bench, given.seeds) if _is_chosen(cell, given)]
        if not todo:
            parser.error("no cell of the table has these: choose others, or leave one of them out")
        fill(given.folder, todo, given.online_retail, console)
        if some:
            console.print(rows_table(given.folder, [cell for cell in todo if _is_done(given.folder, cell)]))
    if given.only != "cells" and not some:
        from simulations.grid.page import write_page

        write_page(given.folder, given.output, time.monotonic() - began)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
