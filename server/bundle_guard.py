"""What stands at the server in the place of Flower's `flwr-serverapp`: runs this server's own bundle, and no other.

Flower's Control API asks nobody who they are, so whoever has an account on the server's machine can hand it an app,
whose code would run as the server's user, or name a run that its owner has stopped. So the ServerApp, which signs what
sites are asked, begins once for each `fedtide server run`, which leaves a file in the run's folder for it.

SuperExec starts one process a run, by name, from PATH: `fedtide server up` puts a folder of its own first there, whose
`flwr-serverapp` is this module and whose other commands refuse.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from common.bundle import REGISTRY_DIR, RUN_DIR
from server.deployment import Deployment

GUARDED = "flwr-serverapp"
REFUSED = ("flwr-clientapp", "flwr-simulation", "flwr-agentapp", "flwr-model", "flwr-connector")
"""What else Flower's executor starts when it is asked for (its TASK_TYPE_TO_COMMAND): refused at a server."""

WANTED = ".wanted"
"""In a run's folder: `fedtide server run` wants the ServerApp to begin, or go on with it, once."""

_SCRIPT = """#!{python}
import sys

from server.bundle_guard import {function}

sys.exit({function}({argument!r}))
"""


class RunRefusedError(RuntimeError):
    """This server does not run that."""


def write_commands(server: Deployment) -> Path:
    """Writes the commands that stand first on the PATH of the server's executor; their folder."""
    folder = server.folder / "bin"
    folder.mkdir(mode=0o700, exist_ok=True)
    commands = {GUARDED: ("guarded_serverapp", str(server.folder))}
    commands |= {name: ("refused_command", name) for name in REFUSED}
    for name, (function, argument) in commands.items():
        file = folder / name
        file.write_text(_SCRIPT.format(python=sys.executable, function=function, argument=argument))
        file.chmod(0o700)
    return folder


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


def guarded_serverapp(folder: str) -> int:
    """`flwr-serverapp` of a server."""
    from flwr.superlink.cli import flwr_serverapp
    from flwr.superlink.runtime import run_serverapp as function

    from common.bundle import bundle_hash

    flower = sys.modules[function.__module__]
    server = Deployment.load(Path(folder))
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


def refused_command(name: str) -> int:
    """Stands for a command that a server never runs."""
    print(
        f"the server was asked to run {name}: refused, as a server runs the ServerApp alone", file=sys.stderr
    )
    return 1
