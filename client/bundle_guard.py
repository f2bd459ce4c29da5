"""What stands at a site in the place of Flower's `flwr-clientapp`: lets a bundle in by its hash, and runs none of it.

A SuperNode's executor starts one process a message, by name, from PATH. `fedtide site up` puts a folder of its own
first there, whose `flwr-clientapp` is this module and whose other commands refuse: a server could ask for those too.
A bundle on the site's list is answered by the ClientApp that is installed here; nothing of any bundle is ever
unpacked or imported, since Flower would look for unpacked code under names and hashes that the server says.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

GUARDED = "flwr-clientapp"
REFUSED = ("flwr-serverapp", "flwr-simulation", "flwr-agentapp", "flwr-model", "flwr-connector")
"""What else Flower's executor starts when a server asks for it (its TASK_TYPE_TO_COMMAND): refused at a site."""

FIRST_WAIT = 0.1
"""Seconds until a part of a message is asked for again, where it is on its way still; twice as long each time."""

_SCRIPT = """#!{python}
import sys

from {module} import {function}

sys.exit({function}({arguments}))
"""

_log = logging.getLogger("fedtide.site")


class BundleRefusedError(RuntimeError):
    """The bundle is not on this site's list."""


def write_commands(folder: Path, site: Path, log: Path) -> None:
    """Writes the commands that stand first on the PATH of a site's executor.

    Args:
        folder: gets them.
        site: whose list counts.
        log: gets a line of JSON for each refusal.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    commands = {GUARDED: ("client.starter", "quick_clientapp", f"{str(site)!r}, {str(log)!r}")}
    commands |= {name: (__name__, "refused_command", f"{name!r}, {str(log)!r}") for name in REFUSED}
    for name, (module, function, arguments) in commands.items():
        file = folder / name
        file.write_text(
            _SCRIPT.format(python=sys.executable, module=module, function=function, arguments=arguments)
        )
        file.chmod(0o700)


def allowed_bundles(site: Path) -> tuple[str, ...]:
    """sha256 of the bundles that may run at a site: its policy's, or that of the installed version."""
    from client.policy import POLICY, read_policy
    from common.bundle import bundle_hash

    listed = read_policy(site / POLICY).bundles if (site / POLICY).exists() else ()
    return listed or (bundle_hash(),)


def check_bundle(content: bytes, allowed: tuple[str, ...], policy: str) -> None:
    """Raises `BundleRefusedError` for a bundle that is not listed, and says so in the site's own log."""
    found = hashlib.sha256(content).hexdigest()
    if found not in allowed:
        _log.error(
            "a bundle is refused: its sha256 is %s, and this site allows %s. Where the server runs another version, "
            "install that version here, or have the server install this one; to allow a bundle that you have read, "
            "put its sha256 into bundles in %s",
            found,
            ", ".join(allowed),
            policy,
        )
        raise BundleRefusedError("the bundle is not on this site's list")


def guarded_clientapp(site: str, log: str) -> int:
    """`flwr-clientapp` of a site."""
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as flower

    from client.policy import POLICY
    from client.replies import keep_replies_timeless

    _log_to(log)
    keep_replies_timeless()

    def let_in(fab_file: bytes, *_: Any, **__: Any) -> None:
        if not isinstance(fab_file, bytes):
            raise BundleRefusedError("the bundle is not on this site's list")
        check_bundle(fab_file, allowed_bundles(Path(site)), str(Path(site) / POLICY))

    def installed(*_: Any, **__: Any) -> Any:
        def load(*_: Any) -> Any:
            from client.app import app

            return app

        return load

    # The first is called with the bundle's bytes, before the second; Flower turns what it raises into an error reply.
    for name, own in (("install_from_fab", let_in), ("get_load_client_app_fn", installed)):
        if not hasattr(flower, name):
            raise RuntimeError(f"this version of Flower has no {name}: install flwr 1.39")
        setattr(flower, name, own)
    whole = flower.pull_and_inflate_object_from_tree
    flower.pull_and_inflate_object_from_tree = partial(whole, initial_backoff=FIRST_WAIT)
    flwr_clientapp()
    return 0


def refused_command(name: str, log: str) -> int:
    """Stands for a command that a site never runs."""
    _log_to(log)
    _log.error("the server asked this site to run %s: refused, as a site runs the ClientApp alone", name)
    return 1


def _log_to(file: str) -> None:
    from common.logs import set_up_logs

    set_up_logs(Path(file).open("a", encoding="utf-8"), json=True)  # noqa: SIM115  # open for good
