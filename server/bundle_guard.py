"""What stands at the server in the place of Flower's `flwr-serverapp`: runs this server's own bundle, and no other.

Flower's Control API asks nobody who they are, so whoever has an account on the server's machine can hand it an app,
whose code would run as the server's user, or name a run that its owner has stopped. So the ServerApp, which signs what
sites are asked, begins once for each `fedtide server run`, which leaves a file in the run's folder for it.

`superexec.py` starts this module for each run, and refuses all else.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from common.bundle import REGISTRY_DIR, RUN_DIR
from server.deployment import Deployment

GUARDED = "flwr-serverapp"
"""What Flower calls the program, and what a process list shows of it."""

WANTED = ".wanted"
"""In a run's folder: `fedtide server run` wants the ServerApp to begin, or go on with it, once."""


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
    run, registry = Path(str(config.get(RUN_DIR))), str(config.get(REGISTRY_DIR))
    if run.parent != server.runs or ".." in run.parts or registry != str(server.registry):
        raise RunRefusedError(
            f"a run in {run} with the registry {registry} was asked for: this server's are in {server.folder}; start "
            "runs with `fedtide server run`"
        )


def want(run: Path) -> None:
    """Lets the ServerApp begin in a run's folder, once."""
    (run / WANTED).touch(mode=0o600)


def check_wanted(config: dict[str, Any]) -> None:
    """Raises `RunRefusedError` for a run that no `fedtide server run` wants; its wish is fulfilled by this."""
    run = Path(str(config.get(RUN_DIR)))
    try:
        (run / WANTED).unlink()
    except OSError as error:
        raise RunRefusedError(
            f"the run in {run} was asked for, but not by `fedtide server run`: if it was not you, somebody with an "
            "account on this machine did it"
        ) from error


def guarded_serverapp(server: Deployment) -> int:
    """`flwr-serverapp` of a server; Flower reads its arguments from `sys.argv`."""
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
        check_wanted(config)
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
