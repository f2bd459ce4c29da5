"""A site's resident worker: keeps torch, models and histories warm, and answers one request at a time.

It listens on a Unix socket in the site's folder that only the site's user can open; the kernel says who asks. A
message is eight bytes of length, then the content. Which site it serves was said when it was started, never by a
request. Killed at any point it leaves what a killed ClientApp leaves: a reservation that counts as spent.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.supervision import Pulse

SOCKET = "worker/socket"
"""Where the worker listens, in the site's folder."""

LARGEST = 2**31 - 1
"""Bytes of one message: what Flower's own serialisation holds."""

_LENGTH = struct.Struct(">Q")
_LONGEST_ADDRESS = 100
_CHUNK = 1 << 20
_PATIENCE = 60.0
_AGAIN = b""
"""The answer of a worker that has done nothing and is about to be started again."""

_log = logging.getLogger("fedtide.site")


class WorkerError(RuntimeError):
    """The worker cannot be reached, or broke off. Says nothing of what was computed."""


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """A path's address for a Unix socket, which is short: the folder goes by its descriptor where it must."""
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def send(connection: socket.socket, data: bytes) -> None:
    """Sends one message."""
    if len(data) > LARGEST:
        raise WorkerError(f"a message of {len(data)} bytes is too long")
    connection.sendall(_LENGTH.pack(len(data)))
    if data:  # the other side may hang up as soon as it has a message of no bytes
        connection.sendall(data)


def receive(connection: socket.socket) -> bytes:
    """Receives one message. Raises `WorkerError` where the other side breaks off."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > LARGEST:
        raise WorkerError("a message is too long")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts, missing = [], length
    while missing:
        part = connection.recv(min(missing, _CHUNK))
        if not part:
            raise WorkerError("the other side broke off")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def ask(path: Path, data: bytes, *, patience: float = _PATIENCE) -> bytes:
    """The worker's answer to a message.

    Args:
        patience: seconds to wait for a worker that is being started; an answer itself may take any time.

    Raises:
        WorkerError: there is none, it is not the same user's, or it broke off: ask again with the same message.
    """
    end = time.monotonic() + patience
    while (answer := _asked(path, data, end)) == _AGAIN:
        if time.monotonic() > end:
            raise WorkerError("the worker was not started again in time")
        time.sleep(0.5)
    return answer


def connect(path: Path, end: float) -> socket.socket:
    """A connection to what listens at a path, and is the same user's.

    Args:
        end: until when it may be awaited, by the monotonic clock.

    Raises:
        WorkerError: nobody listens, or another user does.
    """
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _address(path) as address:
                connection.connect(address)
            break
        except OSError as error:
            connection.close()
            if time.monotonic() > end:
                raise WorkerError(
                    "no worker listens: `fedtide site up` starts it, and its log says why it ended"
                ) from error
            time.sleep(0.1)
    if peer(connection) != os.getuid():
        connection.close()
        raise WorkerError("the worker runs as another user")
    return connection


def _asked(path: Path, data: bytes, end: float) -> bytes:
    with connect(path, end) as connection:
        try:
            send(connection, data)
            return receive(connection)
        except OSError as error:
            raise WorkerError("the worker broke off") from error


def peer(connection: socket.socket) -> int:
    """The user id of who is at the other end, as the kernel says."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def listen(path: Path) -> socket.socket:
    """A listening socket at a path, of mode 600 in a folder of mode 700; a dead worker's is replaced."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with _address(path) as address:
            listening.bind(address)
    finally:
        os.umask(before)
    if stat.S_IMODE(path.stat().st_mode) != 0o600:
        raise WorkerError(f"{path} cannot be made private: put the site on a file system with modes")
    listening.listen(8)
    return listening


def serve_one(listening: socket.socket, answer: Callable[[bytes], bytes]) -> None:
    """Answers one connection. Of another user it reads nothing; a peer that goes away is no fault of the worker."""
    connection, _ = listening.accept()
    with connection:
        if peer(connection) != os.getuid():
            _log.error("another user asked the worker: refused")
            return
        connection.settimeout(_PATIENCE)
        try:
            send(connection, answer(receive(connection)))
        except (OSError, WorkerError) as error:
            _log.warning("a request was not answered: %s", error)
        except Exception as error:  # its text may depend on data
            _log.error("a request failed: %s", type(error).__name__)


class Busy:
    """Shows that the worker lives while it waits for a request, and while it computes: one that hangs does neither."""

    _LOOK, _IDLE, _PATIENCE = 2.0, 0.02, 300.0
    """Seconds between two looks; the share of a processor below which nothing is computed; how long that may last."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._answering = False
        self._computed = time.monotonic()

    def watch(self) -> None:
        """Begins, in a thread beside."""
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around the answer to a request."""
        self._computed, self._answering = time.monotonic(), True
        try:
            yield
        finally:
            self._answering = False

    def _watch(self) -> None:
        used = time.process_time()
        while True:
            time.sleep(self._LOOK)
            before, used, now = used, time.process_time(), time.monotonic()
            if not self._answering or used - before > self._IDLE * self._LOOK:
                self._computed = now
            if now - self._computed < self._PATIENCE:  # a disk may be slow
                self._pulse.show()


def main(arguments: list[str] | None = None) -> None:
    """Serves a site until it is ended."""
    busy = Busy(Pulse())
    busy.watch()
    parser = argparse.ArgumentParser(
        description="The resident worker of a site; started by `fedtide site up`."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metrics-port", type=int, default=0)
    parser.add_argument("--log", type=Path, help="gets lines of JSON; else standard error does")
    given = parser.parse_args(arguments)

    import torch  # noqa: F401  # warm before the first request

    from client.app import answered, content_to_bytes, question_from_bytes
    from client.metrics import SiteMetrics
    from client.site_folder import Site
    from common.bundle import installed_code
    from common.logs import set_up_logs

    site = Site.load(given.folder)
    set_up_logs(given.log or sys.stderr, json=True)
    metrics = SiteMetrics(site.folder, site.ledger_folder)
    if given.metrics_port:
        metrics.serve(given.metrics_port)

    code = installed_code()

    def stale() -> bool:  # what the guard lets in is the code that is installed now
        return installed_code.__wrapped__() != code

    def reply(data: bytes) -> bytes:
        if stale():
            return _AGAIN
        with busy.answering(), metrics.round() as note:
            content, until = question_from_bytes(data)
            return content_to_bytes(answered(lambda: given.folder, content, note, until=until))

    listening = listen(given.folder / SOCKET)
    _log.info("the worker of site %s is ready", site.name)
    while True:
        serve_one(listening, reply)
        if stale():
            _log.warning("another version was installed: the worker ends, to be started again with it")
            sys.exit(0)


if __name__ == "__main__":
    main()
