"""Starts a site's ClientApps quickly: a process that has imported all that one takes, and forks one for each message.

Flower's executor starts a `flwr-clientapp` for each message, which would import for longer than all else in a round
takes. What stands in its place hands its arguments to this process, over a Unix socket that only the site's user can
open, and lives as long as the ClientApp that is forked for it: each ends with the other. The guard is asked anew for
each message, in the forked process. Where nobody listens, the ClientApp runs where it was called.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from client.worker import WorkerError, connect, listen, peer, receive, send
from common.supervision import end_with_parent

SOCKET = "worker/starter"
"""Where it listens, in the site's folder."""

_PATIENCE = 10.0
_FAILED = 1
_log = logging.getLogger("fedtide.site")


def quick_clientapp(site: str, log: str) -> int:
    """`flwr-clientapp` of a site: its exit code."""
    try:
        with connect(Path(site) / SOCKET, time.monotonic()) as connection:
            connection.settimeout(_PATIENCE)
            send(connection, json.dumps(sys.argv).encode())
            begun = bool(receive(connection))
            if begun:
                connection.settimeout(None)
                if code := connection.recv(1):
                    return code[0]
                _say_killed(log)
                return _FAILED
    except (WorkerError, OSError):
        begun = False
    from client.bundle_guard import guarded_clientapp

    return guarded_clientapp(site, log)


def _say_killed(log: str) -> None:
    from common.logs import set_up_logs

    set_up_logs(Path(log).open("a", encoding="utf-8"), json=True)  # noqa: SIM115  # open until this process ends
    _log.error(
        "a ClientApp was killed before its answer was sent: look whether memory ran out. What was charged stays "
        "charged; the site goes on by itself at its next round"
    )


def _run(site: str, log: str, arguments: list[str], connection: socket.socket) -> int:
    """A ClientApp in a process that was just forked; never returns to what forked it."""
    from client.bundle_guard import guarded_clientapp

    def end_with_caller() -> None:
        if not connection.recv(1):
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_caller, daemon=True).start()
    sys.argv = arguments
    try:
        return guarded_clientapp(site, log)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return _FAILED


def start_one(listening: socket.socket, site: str, log: str, fresh: Callable[[], bool]) -> None:
    """Takes one call and forks a ClientApp for it, unless other code is installed by now than was imported."""
    connection, _ = listening.accept()
    with connection:
        if peer(connection) != os.getuid():
            _log.error("another user asked for a ClientApp: refused")
            return
        connection.settimeout(_PATIENCE)
        try:
            arguments = [str(each) for each in json.loads(receive(connection))]
            mine = fresh()
            send(connection, b"begun" if mine else b"")
        except (OSError, WorkerError, ValueError) as error:
            _log.warning("a ClientApp was not started: %s", type(error).__name__)
            return
        if not mine or os.fork():
            return
        code = _FAILED
        try:
            listening.close()
            connection.settimeout(None)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end_with_parent()
            code = _run(site, log, arguments, connection)
            connection.send(bytes([code & 255]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code & 255)


def main(arguments: list[str] | None = None) -> None:
    """Serves a site until it is ended, or until another version is installed."""
    parser = argparse.ArgumentParser(description="Starts a site's ClientApps; started by `fedtide site up`.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    given = parser.parse_args(arguments)

    # All that a ClientApp needs, imported before the first.
    import flwr.cli.build
    import flwr.supernode.cli
    import flwr.supernode.runtime.run_clientapp  # noqa: F401

    import client.app
    import client.bundle_guard
    import client.policy  # noqa: F401
    from common.bundle import installed_code
    from common.logs import set_up_logs

    set_up_logs(given.log.open("a", encoding="utf-8"), json=True)
    code = installed_code.__wrapped__()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what is forked
    listening = listen(given.folder / SOCKET)

    def fresh() -> bool:
        return bool(installed_code.__wrapped__() == code)

    while fresh():
        start_one(listening, str(given.folder), str(given.log), fresh)
    _log.warning("another version was installed: what starts ClientApps ends, to be started again with it")
    with suppress(ChildProcessError):  # there is none any more
        os.wait()


if __name__ == "__main__":
    main()
