"""The Flower ServerApp: reads where its run is, and hands everything to `rounds.py`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
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
    """Runs, or goes on with, the rounds of the plan in the run's folder, and leaves there how it ended.

    The run configuration says where: `run-dir` (or $FEDTIDE_RUN) and `registry-dir` (or $FEDTIDE_REGISTRY, or the
    run's own `registry`), both absolute.
    """
    from server.runs import RunError, RunFolder

    folder = str(context.run_config.get("run-dir") or os.environ.get(RUN_FOLDER, ""))
    if not folder:
        raise RunError("no run folder is given: start runs with `fedtide simulate` or `fedtide server run`")
    run = RunFolder(Path(folder))
    registry = str(context.run_config.get("registry-dir") or os.environ.get(REGISTRY_FOLDER, ""))
    with run.at_work():
        run.check_version()
        run.ending_file.unlink(missing_ok=True)
        try:
            with _logged(run.path / "server.log"):
                _rounds(grid, run, Path(registry) if registry else run.path / "registry")
        except BaseException as error:
            with contextlib.suppress(RunError):
                run.save_ending("failed", _reason(error))
            raise
        run.save_ending("completed")


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """What the server says of a run stands in its folder, too: JSON lines."""
    from common.logs import JsonFormatter

    logger, handler = logging.getLogger("fedtide.server"), logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(JsonFormatter())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def _rounds(grid: Grid, run: RunFolder, registry: Path) -> None:
    from server.registry import Registry
    from server.rounds import run_rounds

    expected = os.environ.get(NODES_EXPECTED)
    run_rounds(
        grid,
        run.plan(),
        run,
        Registry(registry),
        run.round_state(0),
        nodes_expected=int(expected) if expected else None,
        pretrain=_pretraining(run),
        names=lambda: _names(registry),
    )


def _names(registry: Path) -> dict[int, str]:
    """Node -> site, as enrolled; a simulation has none."""
    from server.deployment import Deployment, DeploymentError
    from server.nodes import site_names

    try:
        return site_names(Deployment.load(registry.parent))
    except DeploymentError:
        return {}


def _reason(error: BaseException) -> str:
    """One line. What the server does not foresee is named by its type too: it knows nothing of any user."""
    from common.config import PlanError
    from server.registry import RegistryError
    from server.runs import RunError

    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "the run was stopped: start it again, and it goes on where it stopped"
    said = " ".join(str(error).split())
    known = isinstance(error, RunError | PlanError | RegistryError)
    return said if known else f"{type(error).__name__}: {said}"


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
            plan.model,
            texts,
            folder,
            cache=home() / "item-vectors",
            categories=catalog.categories,
            witness_places=plan.privacy.witness_places,
        )
        built.model.load_trainable(run.round_state(0))
        priors = make_priors(released, plan.statistics, len(catalog))
        events = min(plan.pretraining.events, plan.model.max_events)
        return pretrain(built.model, built.vectors, priors, plan.pretraining, events, plan.model.seed)

    return start
