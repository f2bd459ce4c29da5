"""`python -m simulations.grid`: fills the table's cells, as many as time allows, and writes the page.

Run it again to go on: cells that are done stay. `--only page` writes docs/results.md of what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.console import Console

from simulations.grid.cells import BENCHES, Cell, cells, run_cell

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulations.grid")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the cells' results")
    parser.add_argument("--online-retail", type=Path, help="its folder or file; else the cache")
    parser.add_argument(
        "--bench", type=int, choices=range(len(BENCHES)), action="append", help="some of them only"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["cells", "page"])
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error("--seeds must be at least 1")
    began = time.monotonic()
    benches = [BENCHES[place] for place in given.bench] if given.bench else list(BENCHES)
    if given.only != "page":
        import torch

        torch.set_num_threads(given.threads)
        todo = [cell for bench in benches for cell in cells(bench, given.seeds)]
        fill(given.folder, todo, given.online_retail, Console())
    if given.only != "cells":
        from simulations.grid.page import write_page

        write_page(given.folder, given.output, time.monotonic() - began)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
