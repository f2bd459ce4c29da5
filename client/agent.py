"""`fedtide site up`: a site at work in the foreground, until it is told to end.

Four processes under supervision, each in its own process group: the resident worker, the SuperNode that talks to the
server, the executor that asks for one guarded ClientApp a message, and the starter that forks it. The executor shows
the SuperNode a secret, so that no other program of this machine can take its tasks. All that the site says stands in
logs/site.log, and is shown.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from client.authority import authority_warning
from client.bundle_guard import allowed_bundles, write_commands
from client.connection import Connection, own_network
from client.private_files import FOLDER_MODE, check_private, write_private
from client.site_folder import Site
from client.worker import SOCKET
from common.logs import set_up_logs
from common.supervision import Supervised

_log = logging.getLogger("fedtide.site")

LOGS, COMMANDS, SITE_LOG, SECRET = "logs", "bin", "site.log", "superexec.secret"
_TICK = 0.25
_HINT_SECONDS, _ASK_SECONDS = 30.0, 60.0
_CONNECTED, _TAKEN = "SuperNode ID:", "address already in use"
_FAILED, _SUCCEEDED = "Connection attempt failed, retrying", "Connection successful after"
_LONGEST_TAIL = 200_000

_HINTS = {
    "[code: 2004]": "the server does not know this node's key: hand it enrolment.json (`fedtide server enroll`)",
    "No SuperNode found": "the server does not know this node's key: hand it enrolment.json (`fedtide server enroll`)",
    "Invalid timestamp": "this machine's clock and the server's are minutes apart: set them by NTP",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate does not fit ca.crt or its name, or has expired",
    _TAKEN: "a port of this machine was taken: another one is tried",
}
_SIGNS = {"wrong time": "Invalid timestamp", "unknown": "[code: 2004]"}
"""Word of `client.probe` -> sign of the same in a SuperNode's log."""

_OTHER_HINT = "the server does not answer yet"


class AgentError(RuntimeError):
    """The site cannot be brought up; the message says what to do."""


class _Said:
    """Follows a file that others write to, and shows what is added."""

    def __init__(self, file: Path, stream: TextIO, as_json: bool) -> None:
        self._file, self._stream, self._as_json = file, stream, as_json
        self._place = file.stat().st_size if file.exists() else 0

    def show(self) -> None:
        """Shows the whole lines that are new."""
        with self._file.open("rb") as file:
            file.seek(self._place)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            print(line if self._as_json else _plain(line), file=self._stream, flush=True)


def _plain(line: str) -> str:
    try:
        fields = json.loads(line)
        return f"{str(fields['time'])[11:19]} {fields['level']} {fields['message']}"
    except (ValueError, KeyError, TypeError):
        return line


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
            for left in (folder / SOCKET).parent.glob("*"):  # or a copy of the folder would meet them
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
            AgentError: a port is taken, or the folder's name cannot be handed to Flower.
        """
        from client.ledger import Ledger
        from client.making import SECRET as SITE_SECRET
        from common.events.deidentify import load_secret

        self.folder = folder.expanduser().resolve()
        if any(sign in str(self.folder) for sign in "'\"\\\n"):
            raise AgentError(f"{self.folder} has a quote or backslash in its name: rename the folder")
        self.site, self.connection = Site.load(self.folder), Connection.load(self.folder)
        self.connection.private_key()
        if (self.folder / SITE_SECRET).exists():
            load_secret(self.folder / SITE_SECRET)
        with Ledger.open(self.site.ledger_folder):
            pass
        self.bundles = allowed_bundles(self.folder)
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
            write_commands(self.folder / COMMANDS, self.folder, self.logs / SITE_LOG)
            end = threading.Event()
            signals = (signal.SIGINT, signal.SIGTERM)
            before = {each: signal.signal(each, lambda *_: end.set()) for each in signals}
            with (self.logs / SITE_LOG).open("a", encoding="utf-8") as log:
                said = _Said(self.logs / SITE_LOG, stream, as_json)
                set_up_logs(log, json=True)
                try:
                    self._run(end, said, on_connected)
                finally:
                    said.show()
                    set_up_logs(sys.stderr, json=as_json)
                    for each, handler in before.items():
                        signal.signal(each, handler)

    def _run(self, end: threading.Event, said: _Said, on_connected: Callable[[], None]) -> None:
        _log.info("site %s: bundles allowed here: %s", self.site.name, ", ".join(self.bundles))
        _log.info("metrics for Prometheus: http://127.0.0.1:%d/metrics", self.metrics_port)
        if warning := authority_warning(self.folder):
            _log.warning("%s", warning)
        worker, starter, flower = self._worker(), self._starter(), self._flower()
        link = _Link(flower[0], self.connection.address, on_connected, self._asked)
        try:
            for each in (worker, starter, *flower):
                each.start()
            while not end.wait(_TICK):
                if link.look() == _TAKEN:
                    for each in flower:
                        each.stop()
                    flower = self._flower()
                    link = _Link(flower[0], self.connection.address, on_connected, self._asked)
                    for each in flower:
                        each.start()
                for each in (worker, starter, *flower):
                    if each.tend():
                        _log.info("%s is started again", each.name)
                said.show()
        finally:
            _log.info("ending")
            said.show()
            for each in (*reversed(flower), starter, worker):
                each.stop()
            _log.info("down")

    def _asked(self) -> str:
        """The sign of what the server says to this node now: where the clock is wrong, a SuperNode ends without a word.

        Asked in a process of its own, since gRPC's threads and the forks of this one do not agree.
        """
        command = [sys.executable, "-m", "client.probe", str(self.folder)]
        environment = own_network(os.environ, self.connection.host)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=_ASK_SECONDS
            )
        except subprocess.TimeoutExpired:
            return ""
        return _SIGNS.get(done.stdout.strip(), "")

    def _supervised(self, name: str, command: list[str], **environment: str) -> Supervised:
        return Supervised(
            name,
            command,
            environment={**own_network(os.environ, self.connection.host), **environment},
            folder=self.folder,
            log=self.logs / f"{name}.log",
            logger=_log,
        )

    def _worker(self) -> Supervised:
        command = [sys.executable, "-m", "client.worker", str(self.folder)]
        options = ["--metrics-port", str(self.metrics_port), "--log", str(self.logs / SITE_LOG)]
        return self._supervised("worker", [*command, *options])

    def _starter(self) -> Supervised:
        command = [sys.executable, "-m", "client.starter", str(self.folder), str(self.logs / SITE_LOG)]
        return self._supervised("starter", command, FLWR_HOME=str(self.folder / "flwr"))

    def _flower(self) -> tuple[Supervised, Supervised]:
        """SuperNode and executor, on a free port of loopback."""
        port, commands = free_port(), Path(sys.executable).parent
        flower_home = str(self.folder / "flwr")
        supernode = [
            *(sys.executable, "-m", "client.supernode"),
            *("--superlink", self.connection.address),
            *("--root-certificates", str(self.connection.authority)),
            *("--auth-supernode-private-key", str(self.connection.node_key)),
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(self.secret)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--node-config", f'site="{self.folder}" worker="{self.folder / SOCKET}"'),
        ]
        superexec = [
            str(commands / "flower-superexec"),
            "--insecure",  # on loopback, to the SuperNode beside it
            *("--runtime-api-address", f"127.0.0.1:{port}"),
            *("--superexec-auth-secret-file", str(self.secret)),
        ]
        path = os.pathsep.join([str(self.folder / COMMANDS), os.environ.get("PATH", os.defpath)])
        return (
            self._supervised("supernode", supernode, FLWR_HOME=flower_home),
            self._supervised(
                "superexec",
                superexec,
                FLWR_HOME=flower_home,
                PATH=path,
                FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.2",
            ),
        )


class _Link:
    """What a SuperNode's own log says of its way to the server."""

    def __init__(
        self,
        supernode: Supervised,
        address: str,
        on_connected: Callable[[], None],
        ask: Callable[[], str] = str,
    ) -> None:
        """Args:
        ask: what the server says, as a sign of `_HINTS`, where the log does not tell; empty where nothing is known.
        """
        self._supernode, self._address, self._on_connected, self._ask = supernode, address, on_connected, ask
        self._place = _size(supernode.log)
        self._connected = self._lost = self._cut = False
        self._hinted = time.monotonic()

    def look(self) -> str:
        """Says when a connection stands, and what keeps it from standing; returns `_TAKEN` where a port does."""
        alive = self._supernode.pid is not None
        if alive and self._lost:  # started again
            self._place = _size(self._supernode.log)
            self._connected = self._lost = self._cut = False
        text = _text(self._supernode.log, self._place)
        if alive and not self._connected and _CONNECTED in text:
            self._connected = True
            _log.info("connected to %s", self._address)
            self._on_connected()
        elif alive and self._connected and self._cut != (text.rfind(_FAILED) > text.rfind(_SUCCEEDED)):
            self._cut = not self._cut
            if self._cut:
                _log.warning(
                    "the server on %s does not answer any more: it is asked until it does, and nothing is lost; "
                    "`fedtide site check` tests the way to it",
                    self._address,
                )
            else:
                _log.info("connected to %s again", self._address)
        elif not alive and not self._lost:
            self._lost = True
            _log.warning("the supernode ended: %s", self._hint(text))
            return _TAKEN if _TAKEN in text else ""
        elif alive and not self._connected and time.monotonic() - self._hinted > _HINT_SECONDS:
            self._hinted = time.monotonic()
            _log.warning("not connected to %s: %s", self._address, self._hint(text))
        return ""

    def _hint(self, text: str) -> str:
        return hint(text if any(sign in text for sign in _HINTS) else self._ask())


def hint(text: str) -> str:
    """What a SuperNode's log most likely means, and the way out."""
    for sign, said in _HINTS.items():
        if sign in text:
            return f"{said}; `fedtide site check` tests all of it"
    return f"{_OTHER_HINT}; `fedtide site check` tests the way to it, and logs/supernode.log has Flower's own words"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _text(file: Path, start: int) -> str:
    """The last part of a log after a place; from its beginning where it was begun anew."""
    if not file.exists():
        return ""
    size = file.stat().st_size
    start = start if start <= size else 0
    with file.open("rb") as stream:
        stream.seek(max(start, size - _LONGEST_TAIL))
        return stream.read().decode("utf-8", "replace")
