"""A simulation's line for each round fits in 80 columns with every figure whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from simulations.console import round_table

LARGE: dict[str, Any] = {
    "round": 100,
    "phase": "transitions",
    "admitted": [f"site-{number}" for number in range(4096)],
    "left_out": [],
    "bytes_up": 9_876_543_210,
    "bytes_down": 9_876_543_210,
    "seconds": 9876.5,
}


def shown(width: int = 80, headline: str = "NDCG@10", **changed: Any) -> str:
    metric = SimpleNamespace(value=0.0712, standard_error=0.002)
    quality: Any = SimpleNamespace(metrics={headline: metric}, headline=headline)
    console = Console(width=width, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(round_table(LARGE | changed, quality, 499.999))
    return console.export_text()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"round": 1},
        {"round": 1, "headline": "NDCG@10"},
        {"phase": "popularity"},
        {"admitted": []},
        {"seconds": 0.1},
        {"headline": "AUC"},
        {"headline": "category NDCG@10"},
        {"round": 1, "headline": "category NDCG@10"},
        {"left_out": [{"site": "site-12", "reason": "node_error", "node": "1"}]},
        {"left_out": [{"site": f"site-{n}", "reason": "bad_signature"} for n in range(900)]},
    ],
)
def test_no_figure_is_cut_at_80_columns(changed: dict[str, Any]) -> None:
    text = shown(**changed)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "0.0712 ±0.002" in text
    assert "499.999" in text
    assert str(len(changed.get("admitted", LARGE["admitted"]))) in text


def test_sites_that_are_left_out_are_named_not_their_nodes() -> None:
    node = "17446744073709551615"
    text = " ".join(shown(left_out=[{"site": "west", "node": node, "reason": "missing"}]).split())
    assert "west: missing" in text
    assert node not in text


def test_many_are_counted_by_reason() -> None:
    text = shown(left_out=[{"site": f"s{n}", "reason": "stale"} for n in range(4)])
    assert "stale 4" in text
    assert "s0" not in text
