"""The Flower ServerApp: reads where its run is, and hands everything to `rounds.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

if TYPE_CHECKING:
    from common.wire import State
    from server.rounds import Pretrain
    from server.runs import RunFolder

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
        pretrain=_pretraining(run),
    )


def _pretraining(run: RunFolder) -> Pretrain | None:
    """What the plan asks the server to do between statistics and fine-tuning, if anything."""
    plan = run.plan()
    if not plan.pretraining.histories:
        return None

    def start(released: State) -> State:
        from common.assets import home, language_model
        from common.models.build import build_model, item_texts
        from common.models.priors import make_priors
        from server.pretraining import pretrain

        catalog = run.catalog()
        texts = item_texts(catalog.texts, catalog.categories)
        folder = language_model(plan.model.encoder)
        built = build_model(
            plan.model, texts, folder, cache=home() / "item-vectors", categories=catalog.categories
        )
        built.model.load_trainable(run.round_state(0))
        priors = make_priors(released, plan.statistics, len(catalog))
        events = min(plan.pretraining.events, plan.model.max_events)
        return pretrain(built.model, built.vectors, priors, plan.pretraining, events, plan.model.seed)

    return start
