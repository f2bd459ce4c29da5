"""What stands between a site's tasks and its code: lets a bundle in by its hash, and runs none of it.

A bundle on the site's list is answered by the ClientApp that is installed here; nothing of any bundle is ever unpacked
or imported, since Flower would look for unpacked code under names and hashes that the server says.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

FIRST_WAIT = 0.1
"""Seconds until a part of a message is asked for again, where it is on its way still; twice as long each time."""

_log = logging.getLogger("fedtide.site")


class BundleRefusedError(RuntimeError):
    """The bundle is not on this site's list."""


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


def guarded_clientapp(site: Path, address: str, token: str) -> int:
    """Runs the ClientApp of a task that the SuperNode gave; its exit code.

    Args:
        address: of the SuperNode's Runtime API, on loopback.
        token: of the task.
    """
    from flwr.supernode.runtime import run_clientapp as flower

    from client.policy import POLICY
    from client.replies import keep_replies_timeless

    keep_replies_timeless()

    def let_in(fab_file: bytes, *_: Any, **__: Any) -> None:
        if not isinstance(fab_file, bytes):
            raise BundleRefusedError("the bundle is not on this site's list")
        check_bundle(fab_file, allowed_bundles(site), str(site / POLICY))

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
    try:
        flower.run_clientapp(runtime_api_address=address, token=token, insecure=True)  # on loopback
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
