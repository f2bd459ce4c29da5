"""The Flower ServerApp: reads where its run is, and hands everything to `rounds.py`."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

RUN_FOLDER = "FEDTIDE_RUN"
REGISTRY_FOLDER = "FEDTIDE_REGISTRY"
NODES_EXPECTED = "FEDTIDE_NODES"


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds of the plan in the run's folder (run configuration `run-dir`, or $FEDTIDE_RUN)."""
    from server.registry import Registry
    from server.rounds import run_rounds
    from server.runs import RunError, RunFolder

    folder = str(context.run_config.get("run-dir") or os.environ.get(RUN_FOLDER, ""))
    if not folder:
        raise RunError("no run folder is given: start runs with `fedtide simulate` or `fedtide server run`")
    run = RunFolder(Path(folder))
    registry = Registry(Path(os.environ.get(REGISTRY_FOLDER) or run.path / "registry"))
    expected = os.environ.get(NODES_EXPECTED)
    run_rounds(
        grid,
        run.plan(),
        run,
        registry,
        run.round_state(0),
        nodes_expected=int(expected) if expected else None,
    )
