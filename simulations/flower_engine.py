"""Flower's own simulation engine (Ray), in a process of its own: `python -m simulations.flower_engine`.

Its truth is in the run's folder, not in an exit code. Run it as a leader of its own process group, so that
whoever started it can end it and every Ray process below it at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings


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
    from server.app import app as server_app
    from server.runs import RunError

    try:
        run_simulation(
            server_app=server_app,
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
