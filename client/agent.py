"""`fedtide site up`: a site at work in the foreground, until it is told to end.

Three processes under supervision, each in its own process group: the resident worker, the SuperNode that talks to the
server, and the starter that asks the SuperNode for tasks and forks a guarded ClientApp for each. The starter shows the
SuperNode a secret, so that no other program of this machine can take its tasks. What dies is started again, and what
gives no sign of life is killed first. All that the site says stands in logs/site.log, and is shown.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from client.authority import authority_warning
from client.connection import Connection, own_network
from client.link import NODE, TAKEN, Asked, Link
from client.private_files import FOLDER_MODE, check_private, write_private
from client.site_folder import SECRET as SITE_SECRET
from client.site_folder import Site
from client.site_log import SITE_LOG, Shown, keep_short
from client.worker import SOCKET
from common.daily import Daily
from common.logs import set_up_logs
from common.supervision import Supervised
from common.watchdog import Watchdog

_log = logging.getLogger("fedtide.site")

LOGS, SECRET = "logs", "superexec.secret"
_TICK = 0.25
_SILENT, _SILENT_WORKER = 60.0, 120.0
"""Seconds without a sign of life after which a process is started again; the worker's costs a round that it is in."""
_UNANSWERED = 90.0
"""Seconds without an answer of the SuperNode to its executor, both of them up, after which it is started again."""


class AgentError(RuntimeError):
    """The site cannot be brought up; the message says what to do."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the lock of a site that is up; the kernel drops it when its holder dies. Its sockets go at the end."""
    descriptor = os.open(folder / "up.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AgentError(f"{folder} is up already: end that `fedtide site up` first") from error
        try:
            yield
        finally:
            for left in (folder / SOCKET).parent.glob("*"):
                if left.is_socket():  # or a copy of the folder would meet them
                    left.unlink()
    finally:
        os.close(descriptor)


def free_port(wanted: int = 0) -> int:
    """A free port of loopback: the wanted one, or any.

    Raises:
        AgentError: the wanted one is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            if error.errno == errno.EACCES:
                raise AgentError(f"this user may not open port {wanted}: choose one above 1023") from error
            raise AgentError(
                f"port {wanted} is in use by another process: choose another --metrics-port, or 0 for any"
            ) from error
        return int(probe.getsockname()[1])


class Agent:
    """A site and its three processes."""

    def __init__(self, folder: Path, metrics_port: int = 0) -> None:
        """Of the site in a folder; checks all that must be in order, and starts nothing.

        Raises:
            SiteError, PolicyError, ConnectionSetupError, SecretError, LedgerError: what is not in order.
            AgentError: the site has withdrawn, a port is taken, or the folder's name cannot be handed to Flower.
        """
        from client.ledger import Ledger
        from common.events.deidentify import load_secret

        self.folder = folder.expanduser().resolve()
        if any(sign in str(self.folder) for sign in "'\"\\\n"):
            raise AgentError(f"{self.folder} has a quote or backslash in its name: rename the folder")
        self.site, self.connection = Site.load(self.folder), Connection.load(self.folder)
        self.connection.private_key()
        if (self.folder / SITE_SECRET).exists():
            load_secret(self.folder / SITE_SECRET)
        with Ledger.open(self.site.ledger_folder) as ledger:
            if ledger.status().closed:
                raise AgentError(
                    f"site {self.site.name} has withdrawn: nothing more may be released from its data, so there is "
                    f"nothing to run: take its service out; what is left on disk: `fedtide site report {self.folder}`"
                )
        self.metrics_port = free_port(metrics_port)
        self.logs, self.secret = self.folder / LOGS, self.folder / SECRET

    def run(
        self, stream: TextIO, *, as_json: bool = False, on_connected: Callable[[], None] = lambda: None
    ) -> None:
        """Runs the site until SIGINT or SIGTERM; to be called in the main thread.

        Args:
            stream: shows what is logged.
            on_connected: called at the first connection.

        Raises:
            AgentError: the site is up already.
        """
        with alone(self.folder):
            self.logs.mkdir(mode=FOLDER_MODE, exist_ok=True)
            if not self.secret.exists():
                write_private(self.secret, os.urandom(32))
            check_private(self.secret)
            (self.folder / NODE).unlink(missing_ok=True)
            end = threading.Event()
            signals = (signal.SIGINT, signal.SIGTERM)
            before = {each: signal.signal(each, lambda *_: end.set()) for each in signals}
            shown = Shown(self.logs / SITE_LOG, stream, as_json)
            set_up_logs(self.logs / SITE_LOG, json=True)
            try:
                self._run(end, shown, on_connected)
            finally:
                shown.show()
                shown.close()
                set_up_logs(sys.stderr, json=as_json)
                for each, handler in before.items():
                    signal.signal(each, handler)

    def _run(self, end: threading.Event, shown: Shown, on_connected: Callable[[], None]) -> None:
        _log.info("site %s begins", self.site.name)
        _log.info("metrics for Prometheus: http://127.0.0.1:%d/metrics", self.metrics_port)
        self._warn_of_authority()
        daily, watchdog = Daily(self._warn_of_authority), Watchdog()
        worker, (supernode, starter) = self._worker(), self._flower()
        link = self._link(supernode, on_connected)
        try:
            for each in (worker, supernode, starter):
                each.start()
            while not end.wait(_TICK):
                watchdog.show()
                daily.look()
                if link.look() == TAKEN:
                    link.end()
                    for each in (starter, supernode):
                        each.stop()
                    supernode, starter = self._flower()
                    link = self._link(supernode, on_connected)
                    for each in (supernode, starter):
                        each.start()
                for each in (worker, supernode, starter):
                    if each.tend():
                        _log.info("%s is started again", each.name)
                if _is_deaf(supernode, starter):
                    supernode.kill("killed, as it did not answer its executor")
                keep_short(self.logs / SITE_LOG)
                shown.show()
        finally:
            _log.info("ending")
            shown.show()
            link.end()
            for each in (starter, supernode, worker):
                each.stop()
            _log.info("down")

    def _warn_of_authority(self) -> None:
        if warning := authority_warning(self.folder):
            _log.warning("%s", warning)

    def _link(self, supernode: Supervised, on_connected: Callable[[], None]) -> Link:
        command = [sys.executable, "-m", "client.probe", str(self.folder)]
        environment = own_network(os.environ, self.connection.host)

        def ask() -> Asked:
            return Asked(command, environment)

        return Link(supernode, self.connection.address, self.folder, on_connected, ask)

    def _supervised(self, name: str, command: list[str], silence: float, **environment: str) -> Supervised:
        return Supervised(
            name,
            [sys.executable, "-m", f"client.{name}", *command],
            environment={**own_network(os.environ, self.connection.host), **environment},
            folder=self.folder,
            log=self.logs / f"{name}.log",
            logger=_log,
            silence=silence,
        )

    def _worker(self) -> Supervised:
        options = ["--metrics-port", str(self.metrics_port), "--log", str(self.logs / SITE_LOG)]
        return self._supervised("worker", [str(self.folder), *options], _SILENT_WORKER)

    def _flower(self) -> tuple[Supervised, Supervised]:
        """SuperNode and starter, on a free port of loopback."""
        address, flower_home = f"127.0.0.1:{free_port()}", str(self.folder / "flwr")
        host, _, port = address.partition(":")
        supernode = [
            str(self.folder),
            *("--superlink", self.connection.address),
            *("--root-certificates", str(self.connection.authority)),
            *("--auth-supernode-private-key", str(self.connection.node_key)),
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(self.secret)),
            *("--host", host, "--port", port),
            *("--node-config", f'site="{self.folder}" worker="{self.folder / SOCKET}"'),
        ]
        starter = [
            str(self.folder),
            str(self.logs / SITE_LOG),
            "--address",
            address,
            "--secret",
            str(self.secret),
        ]
        often = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        return (
            self._supervised("supernode", supernode, _SILENT, FLWR_HOME=flower_home),
            self._supervised("starter", starter, _SILENT, FLWR_HOME=flower_home, **often),
        )


def _is_deaf(supernode: Supervised, starter: Supervised) -> bool:
    """Whether a SuperNode answers its executor no more, while both of them are up."""
    if supernode.pid is None or starter.pid is None:
        return False
    waited = min(supernode.lived, starter.lived if starter.unanswered is None else starter.unanswered)
    return waited > (2 * _UNANSWERED if starter.unanswered is None else _UNANSWERED)
