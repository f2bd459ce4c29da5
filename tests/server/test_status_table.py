"""The tables of `fedtide server status` and `site status` keep every figure whole at 80 columns."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from server.overview import RunLine, SiteLine
from server.status import print_overview

LONG = "20261201-121915-quarterly-interest-model-of-the-north"


def shown(sites: list[SiteLine], runs: list[RunLine], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    found: Any = SimpleNamespace(up=True, sites=sites, runs=runs, certificates=SimpleNamespace(warnings=[]))
    print_overview(console, found)
    return console.export_text()


@pytest.mark.parametrize(
    "run",
    [
        RunLine("short", "completed", 3, 3, 9),
        RunLine(LONG, "completed", 100, 100, 1000),
        RunLine(LONG, "interrupted", 100, 87, 870, 12, 987_654_321, 987_654_321, 259_200.0),
        RunLine(LONG, "running", 10_000, 9_999, 99_999, 0, 987_654_321, 987_654_321, 2_592_000.0),
        RunLine(LONG, "failed", 3, 0, 0, 30, 0, 0, 1.0, "too few sites"),
        RunLine("x" * 200, "discarded", 100, 87, 870, 12, 1, 1, 1.0),
        RunLine(LONG, "completed", 3, 3, 9, refusals={"node_error": 123, "bad_signature": 45}),
        RunLine(
            "3", "completed", 3, 3, 9, refusals={reason * 4: 123 for reason in ("alpha_", "beta_", "gamma_")}
        ),
        RunLine(LONG, "running", 3, 1, 9, waiting="waiting for 2 more sites before round 2"),
        RunLine("a name of words " * 6, "completed", 3, 3, 9, 0, 123_456_789, 123_456_789, 86_400.0),
    ],
)
def test_no_figure_of_a_run_is_cut(run: RunLine) -> None:
    text = shown([], [run])
    table = text.partition("runs")[2]
    assert "…" not in table
    for figure in (
        run.state,
        f" {run.aggregated}/{run.rounds} ",
        f" {run.admitted} ",
        f"{run.bytes_down / 1000:,.0f}/{run.bytes_up / 1000:,.0f} ",
        f" {run.seconds:,.0f} ",
    ):
        assert figure in table
    whole = "".join(text.split())
    for name in (run.name, *run.refusals):
        assert name[:8].replace(" ", "") in whole


@pytest.mark.parametrize("name", ["north", "n" * 120, "the northern branch of the house " * 3])
def test_a_sites_state_is_never_cut(name: str) -> None:
    text = shown([SiteLine(name, "ab" * 32, True, "never seen", None)], [])
    assert "never seen" in text
    assert "barred" in text
