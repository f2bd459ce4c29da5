"""The page says what the cells hold: means over seeds, who is better, and what was not run."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from server.runs import RunError
from simulations.grid.cells import (
    ALONE,
    BENCHES,
    CENTRAL,
    NONE,
    PRETRAINED,
    TEN,
    WHOLE,
    Cell,
    cells,
)
from simulations.grid.page import write_page

BENCH = BENCHES[1]


def put(folder: Path, cell: Cell, mean: float, validation: float | None = None) -> None:
    """A cell whose forty users have about this NDCG."""
    chance = np.random.default_rng(list(cell.file_name.encode()))
    users = (mean + 0.01 * chance.normal(size=40)).tolist()
    judged = {"ndcg": users, "hits": [0.0] * 40}
    of_validation = {"ndcg": [validation if validation is not None else mean] * 40, "hits": [0.0] * 40}
    found = {"cell": asdict(cell), "seconds": 2.0, "validation": of_validation, "test": judged}
    (folder / cell.file_name).write_text(json.dumps(found))


def test_the_page_says_what_the_cells_hold(tmp_path: Path) -> None:
    put(tmp_path, Cell(BENCH, "content only"), 0.3)
    put(tmp_path, Cell(BENCH, "gru4rec"), 0.8)
    for seed in (0, 1):
        put(tmp_path, Cell(BENCH, "recommend", TEN, "8", WHOLE, seed), 0.5)
        put(tmp_path, Cell(BENCH, "dual", TEN, "8", WHOLE, seed), 0.6, validation=0.1)
        put(tmp_path, Cell(BENCH, "recommend", TEN, "8", PRETRAINED, seed), 0.5)
        put(tmp_path, Cell(BENCH, "recommend", TEN, "8", ALONE, seed), 0.2)
    put(tmp_path, Cell(BENCH, "recommend", CENTRAL, NONE, WHOLE), 0.6)
    page = tmp_path / "results.md"
    write_page(tmp_path, page, 1.0, say=lambda _: None)
    text = page.read_text()
    assert "## online-retail, last-invoice" in text
    assert "## movielens-100k" not in text
    row = next(line for line in text.splitlines() if line.startswith("| recommend | ten |"))
    assert row.split(" | ")[2] == "–"
    assert row.split(" | ")[4].startswith(("0.49", "0.50"))
    assert " ± " in row
    # Chosen on validation, although the other family has the better test figure.
    assert "recommend (the best family on validation), epsilon 8, ten sites against content only" in text
    assert re.search(r"content only: NDCG@10 \+0\.(19|20)\d\d ± .*: better\.", text)
    assert re.search(r"\*\*2[456]% below it\*\*", text)
    assert "What was tried before" in text


def test_no_cells_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no cell"):
        write_page(tmp_path, tmp_path / "results.md", 1.0)


def test_every_cell_has_a_file_of_its_own() -> None:
    for bench in BENCHES:
        names = [cell.file_name for cell in cells(bench, seeds=5)]
        assert len(set(names)) == len(names)
