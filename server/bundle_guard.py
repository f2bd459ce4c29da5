"""What stands at the server in the place of Flower's `flwr-serverapp`: runs this server's own bundle, and no other.

Flower's Control API asks nobody who they are, so whoever has an account on the server's machine can hand it an app,
whose code would run as the server's user, or name a run that its owner has stopped or put away. So the ServerApp, which
signs what sites are asked, begins once for each `fedtide server run`, which leaves Flower's number of that very run in
the run's folder for it; Flower gives another number to whatever somebody else begins.

`superexec.py` starts this module for each run, and refuses all else.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from common.bundle import REGISTRY_DIR, RUN_DIR
from server.deployment import Deployment
from server.overview import INCOMPLETE
from server.runs import write_whole

GUARDED = "flwr-serverapp"
"""What Flower calls the program, and what a process list shows of it."""

WANTED = ".wanted"
"""In a run's folder: Flower's number of the run in which the ServerApp shall begin, or go on with it, once."""

_PATIENCE = 20.0
"""Seconds that the ServerApp waits for its number: it may begin before `fedtide server run` knows that itself."""


class RunRefusedError(RuntimeError):
    """This server does not run that."""


def check_bundle(content: bytes, allowed: str) -> None:
    """Raises `RunRefusedError` for another bundle than that of the installed version."""
    found = hashlib.sha256(content).hexdigest()
    if found != allowed:
        raise RunRefusedError(
            f"an app that is not this server's bundle was handed in, and is not run: its sha256 is {found}, and the "
            f"bundle's is {allowed}. If it was not you, somebody with an account on this machine did it; after an "
            "upgrade, restart `fedtide server up`"
        )


def check_folders(config: dict[str, Any], server: Deployment) -> None:
    """Raises `RunRefusedError` for a run configuration that names folders outside the server's own."""
    said, registry = str(config.get(RUN_DIR)), str(config.get(REGISTRY_DIR))
    run = server.runs / Path(said).name
    if said != str(run) or registry != str(server.registry) or not said.endswith(INCOMPLETE):
        raise RunRefusedError(
            f"a run in {said} with the registry {registry} was asked for: this server's unfinished ones are in "
            f"{server.runs}; start runs with `fedtide server run`"
        )


def want(run: Path, flower_id: int) -> None:
    """Lets the ServerApp begin in a run's folder, once, as the run of this number of Flower's."""
    write_whole(run / WANTED, f"{flower_id % 2**64}\n".encode())


def want_no_more(run: Path) -> None:
    """Takes that back, where it was not made use of."""
    (run / WANTED).unlink(missing_ok=True)


def check_wanted(config: dict[str, Any], flower_id: int) -> None:
    """Raises `RunRefusedError` for a run that no `fedtide server run` wants; its wish is fulfilled by this."""
    run = Path(str(config.get(RUN_DIR)))
    end = time.monotonic() + _PATIENCE
    while not _is_wanted(run, flower_id):
        if time.monotonic() > end:
            raise RunRefusedError(
                f"the run in {run} was asked for, but not by `fedtide server run`: if it was not you, somebody with "
                "an account on this machine did it"
            )
        time.sleep(0.1)


def _is_wanted(run: Path, flower_id: int) -> bool:
    try:
        if int((run / WANTED).read_bytes()) != flower_id % 2**64:
            return False
        (run / WANTED).unlink()
    except (OSError, ValueError):
        return False
    return True


def guarded_serverapp(server: Deployment) -> int:
    """`flwr-serverapp` of a server; Flower reads its arguments from `sys.argv`."""
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.cli import flwr_serverapp
    from flwr.superlink.runtime import run_serverapp as function

    from common.bundle import bundle_hash

    flower = sys.modules[function.__module__]
    install, configure = flower.install_from_fab, flower.get_fused_config_from_dir

    def let_in(content: bytes, *more: Any, **named: Any) -> Any:
        check_bundle(content, bundle_hash())
        return install(content, *more, **named)

    def configured(*more: Any, **named: Any) -> Any:
        config = configure(*more, **named)
        check_folders(config, server)
        check_wanted(config, TaskIdentity.run_id)
        return config

    # Flower calls the first with the bundle's bytes, then the second, before it loads anything of the app.
    flower.install_from_fab, flower.get_fused_config_from_dir = let_in, configured  # type: ignore[attr-defined]
    flwr_serverapp()
    return 0


def main() -> None:
    """Runs the task whose token stands on standard input, for the server whose folder is the first argument."""
    program, folder, *given = sys.argv
    token = sys.stdin.buffer.readline().decode("ascii").strip()
    sys.argv = [program, *(each for each in given if each != GUARDED), "--token", token]
    sys.exit(guarded_serverapp(Deployment.load(Path(folder))))


if __name__ == "__main__":
    main()
