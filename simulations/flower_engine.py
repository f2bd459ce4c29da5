"""Flower's own simulation engine (Ray), in a process of its own: `python -m simulations.flower_engine`.

Its truth is in the run's folder, not in an exit code. Run it as a leader of its own process group, so that
whoever started it can end it and every Ray process below it at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

_PATIENCE = 600.0
"""Seconds that Flower's engine may take to register nodes."""


def main() -> int:
    """Runs the federation that the environment describes; 0 if the ServerApp came to its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpus-per-site", type=float, default=0.0)
    given = parser.parse_args()
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")

    from flwr.simulation import run_simulation

    from client.app import app as client_app
    from server.runs import RunError

    try:
        run_simulation(
            server_app=_server_with_places(),
            client_app=client_app,
            num_supernodes=given.sites,
            backend_config={
                "init_args": {"num_cpus": given.cpus, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": given.gpus_per_site},
            },
        )
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # Ray's and Flower's own, of many types
        traceback.print_exc()
        _end_at_once(f"Flower's engine cannot run: {_last_line(error)}")
    return 0


def _last_line(error: BaseException) -> str:
    """The last line of what an error comes from: Flower says no more than that there was one."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _end_at_once(said: str) -> None:
    """Ends the process; the ServerApp's thread, which waits for nodes that never come, does not hold it."""
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(1)


def _server_with_places() -> ServerApp:
    """The ServerApp, which begins when its registry says which site answers from which node.

    Flower gives nodes their numbers as it begins, and tells them to no app: the one thing of its engine that is
    wrapped here.
    """
    from flwr.server.superlink.fleet.vce import vce_api
    from flwr.serverapp import ServerApp

    from server.app import REGISTRY_FOLDER
    from server.app import app as server_app
    from server.registry import Registry
    from server.runs import RunError
    from simulations.sites import place_sites, site_name

    placed = threading.Event()
    register = vce_api._register_nodes

    def register_and_place(*given: Any, **more: Any) -> dict[int, int]:
        partitions: dict[int, int] = register(*given, **more)
        registry = Registry(Path(os.environ[REGISTRY_FOLDER]))
        place_sites(registry, {node: site_name(number) for node, number in partitions.items()})
        placed.set()
        return partitions

    vce_api._register_nodes = register_and_place
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        if not placed.wait(_PATIENCE):
            raise RuntimeError(
                "Flower's engine registered no nodes: this Flower is another than the one tested"
            )
        try:
            server_app(grid, context)
        except RunError:
            raise
        except Exception as error:  # a fault of the server's part, which is not the engine's
            traceback.print_exc()
            _end_at_once(f"the server's part of the run failed: {_last_line(error)}")

    return app


if __name__ == "__main__":
    sys.exit(main())
