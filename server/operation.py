"""A server at work in the foreground: SuperLink and SuperExec under supervision, until it is told to end."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable

from common.daily import Daily
from common.supervision import Supervised, wait_until
from common.watchdog import Watchdog
from server.certificates import check_certificates, warn_of_ends
from server.deployment import Deployment, DeploymentError, open_locked
from server.monitoring import serve_metrics
from server.nodes import pending_changes, register_nodes

_log = logging.getLogger("fedtide.server")

_READY_SECONDS = 60.0
_STEADY_SECONDS = 2.0
_TEND_SECONDS, _NODES_SECONDS = 0.5, 2.0
_NODES_AGAIN_SECONDS = 60.0
_SILENT = 60.0
"""Seconds without a sign of life after which SuperLink, or SuperExec, is started again."""


def check_startable(server: Deployment) -> None:
    """Keys, certificates and ports, before anything is started.

    Raises:
        DeploymentError: something is wrong; the message says what to do.
    """
    server.check_private()
    for warning in check_certificates(server):
        _log.warning("%s", warning)
    for name, port in server.ports().items():
        _check_free(server, name, port)


def _check_free(server: Deployment, name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0" if name == "fleet" else "127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EACCES:
                raise DeploymentError(f"this user may not open port {port}: choose one above 1023") from error
            raise DeploymentError(
                f"port {port} ({name}) is in use by another process: `ss -ltnp` shows which; end it, or change "
                f"{name} in {server.folder}/server.toml"
            ) from error


def operate(server: Deployment, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Runs the server until SIGINT or SIGTERM; to be called in the main thread.

    Raises:
        DeploymentError: it cannot be started.
    """
    # `status` holds the lock for a moment, to see whether it is free.
    with open_locked(server.folder / "up.lock", patience=1.0) as mine:
        if not mine:
            raise DeploymentError(f"{server.folder} is up already: `fedtide server status` shows it")
        check_startable(server)
        end = threading.Event()
        before = {each: signal.signal(each, lambda *_: end.set()) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            _operate(server, end, on_ready)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _operate(server: Deployment, end: threading.Event, on_ready: Callable[[], None]) -> None:
    watchdog = Watchdog()  # first: what is started inherits nothing of it
    environment = server.environment()
    superlink, superexec = (
        Supervised(
            name, command, environment=environment, folder=server.folder,
            log=server.logs / f"{name}.log", logger=_log, silence=_SILENT,
        )
        for name, command in (
            ("superlink", server.superlink_command()),
            ("superexec", server.superexec_command()),
        )
    )  # fmt: skip
    metrics = serve_metrics(server)
    try:
        superlink.start()
        _wait(superlink, server.answers, end)
        if not end.is_set():
            superexec.start()
            began = time.monotonic()
            _wait(superexec, lambda: time.monotonic() - began > _STEADY_SECONDS, end)
        if not end.is_set():
            _log.info("up: sites reach %s:%d", server.host, server.fleet_port)
            on_ready()
        _tend(server, superlink, superexec, watchdog, end)
    finally:
        _log.info("ending")
        for each in (superexec, superlink):
            each.stop()
        metrics.close()
        _log.info("down")


def _wait(process: Supervised, ready: Callable[[], bool], end: threading.Event) -> None:
    """Waits until a process works, or the server is to end."""

    def done() -> bool:
        return end.is_set() or (process.pid is not None and ready())

    if wait_until(done, _READY_SECONDS, unless=lambda: process.pid is None):
        return
    how = f"did not answer within {_READY_SECONDS:g} s" if process.pid else f"ended with code {process.code}"
    raise DeploymentError(f"{process.name} {how}: read {process.log}")


def _tend(
    server: Deployment, superlink: Supervised, superexec: Supervised, watchdog: Watchdog, end: threading.Event
) -> None:
    """Restarts what dies, registers what was enrolled and says what certificates end soon, until the end."""
    look, certificates = 0.0, Daily(lambda: warn_of_ends(server))
    while not end.wait(_TEND_SECONDS):
        watchdog.show()
        certificates.look()
        for each in (superlink, superexec):
            if each.tend():
                _log.info("%s is started again", each.name)
        if time.monotonic() > look:
            look = time.monotonic() + _NODES_SECONDS
            try:
                if any(pending_changes(server)) and server.answers():
                    register_nodes(server)
            except (DeploymentError, OSError) as error:
                _log.warning("a node could not be registered: %s", error)
                look = time.monotonic() + _NODES_AGAIN_SECONDS
