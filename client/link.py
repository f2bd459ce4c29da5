"""What a site that is up knows of its way to the server: from its SuperNode's signs of life, and where that has no
connection, from its log and from the server, which is asked what it says to this node.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from common.supervision import Supervised, end_with_parent

NODE = "worker/node"
"""Under which id the server knows this node, in the site's folder, since its `site up` began."""
CONNECTED = "worker/connected"
"""`1` or `0`, in the site's folder; written anew every few seconds while the site is up."""
OLDEST_WORD = 30.0
"""Seconds after which what stands there counts no more."""

TAKEN = "address already in use"
_NOT_ACTIVATED = "[code: 2004]"
_UNANSWERED = 40.0
"""Seconds without an answer of the server after which it is missed: two heartbeats."""
_FIRST_HINT, _LONGEST_HINT = 30.0, 600.0
_ASK_SECONDS = 60.0
_TELL_SECONDS = 5.0
_LONGEST_TAIL = 200_000

_UNKNOWN = "the server does not know this node's key: hand it enrolment.json (`fedtide server enroll`)"
_CLOCK = "this machine's clock and the server's are minutes apart: set them by NTP"
_ALREADY = (
    "the server knows this node, and takes it for connected already: by a process of it that just died, which takes a "
    "minute, or by another with the same key, such as a copy of this folder: end that one, or make a new key with "
    "`fedtide site connect`"
)
HINTS = {
    "No SuperNode found": _UNKNOWN,
    "Invalid timestamp": _CLOCK,
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate does not fit ca.crt or its name, or has expired",
    TAKEN: "a port of this machine was taken: another one is tried",
}
"""Sign in a SuperNode's log -> what it means."""
_WORDS = {"unknown": _UNKNOWN, "wrong time": _CLOCK}
"""Word of `client.probe` -> what it means."""
_OTHER_HINT = "the server does not answer yet"

_log = logging.getLogger("fedtide.site")


def hint(text: str, word: str = "") -> str:
    """What keeps a SuperNode from its server, most likely, and the way out.

    Args:
        text: the SuperNode's log.
        word: what the server says to this node, as `client.probe` has it; empty where it was not asked.
    """
    said = next((each for sign, each in HINTS.items() if sign in text), _WORDS.get(word))
    if said is None and word == "known" and _NOT_ACTIVATED in text:
        said = _ALREADY
    if said is not None:
        return f"{said}; `fedtide site check` tests all of it"
    return f"{_OTHER_HINT}; `fedtide site check` tests the way to it, and logs/supernode.log has Flower's own words"


class Asked:
    """A question to the server, by a process of its own: gRPC's threads and the forks of this one do not agree."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Asks."""
        self._until = time.monotonic() + _ASK_SECONDS
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 (one call into libc, which takes no lock)
        )

    def word(self) -> str | None:
        """The server's word; empty where it has none, None while it is awaited."""
        if self._process.poll() is None:
            if time.monotonic() < self._until:
                return None
            self.end()
            return ""
        said, _ = self._process.communicate()
        return said.decode("utf-8", "replace").strip()

    def end(self) -> None:
        """Awaits nothing any more."""
        self._process.kill()
        self._process.communicate()


class Link:
    """The way of one site to its server."""

    def __init__(
        self,
        supernode: Supervised,
        address: str,
        folder: Path,
        on_connected: Callable[[], None],
        ask: Callable[[], Asked],
    ) -> None:
        """Args:
        folder: of the site, where `CONNECTED` is told.
        ask: asks the server what it says to this node.
        """
        self._supernode, self._address, self._file = supernode, address, folder / CONNECTED
        self._on_connected, self._ask = on_connected, ask
        self._place = _size(supernode.log)
        self._connected = self._ended = False
        self._first = True
        self._asked: Asked | None = None
        self._about = ""
        self._hint_wait, self._hinted = _FIRST_HINT, time.monotonic()
        self._told = -_TELL_SECONDS

    def look(self) -> str:
        """Says when a connection stands, and what keeps it from standing; returns `TAKEN` where a port does."""
        alive, heard = self._supernode.pid is not None, self._supernode.unanswered
        connected = heard is not None and heard < _UNANSWERED
        changed = connected != self._connected
        self._tell(connected, at_once=changed)  # before it is said: who reads that may look
        if changed:
            self._say(connected, alive)
        self._hear()
        if not alive and not self._ended:
            self._ended = True
            if (self._supernode.code or 0) < 0:  # it was killed, which was said
                return ""
            text = self._text()
            self._explain("the supernode ended", text)
            return TAKEN if TAKEN in text else ""
        if alive and self._ended:  # started again
            self._ended, self._place = False, _size(self._supernode.log)
        if alive and not connected and time.monotonic() - self._hinted > self._hint_wait:
            self._explain(f"not connected to {self._address}", self._text())
        return ""

    def end(self) -> None:
        """The site goes down."""
        if self._asked is not None:
            self._asked.end()
        self._asked = None
        self._tell(False, at_once=True)

    def _say(self, connected: bool, alive: bool) -> None:
        self._connected = connected
        if connected:
            _log.info("connected to %s%s", self._address, "" if self._first else " again")
            self._first, self._hint_wait = False, _FIRST_HINT
            self._on_connected()
            self._on_connected = lambda: None
        elif alive:
            self._hinted = time.monotonic()
            _log.warning(
                "the server on %s does not answer any more: it is asked until it does, and nothing is lost; "
                "`fedtide site check` tests the way to it",
                self._address,
            )

    def _explain(self, what: str, text: str) -> None:
        """Says what is wrong: at once where the log tells, else when the server was asked."""
        if any(sign in text for sign in HINTS):
            _log.warning("%s: %s", what, hint(text))
        elif self._asked is None:
            self._about = what
            self._asked = self._ask()
        self._hinted, self._hint_wait = time.monotonic(), min(2 * self._hint_wait, _LONGEST_HINT)

    def _hear(self) -> None:
        if self._asked is not None and (word := self._asked.word()) is not None:
            self._asked = None
            if not self._connected:
                _log.warning("%s: %s", self._about, hint(self._text(), word))

    def _tell(self, connected: bool, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            aside = self._file.with_name(f".{self._file.name}")
            with suppress(OSError):
                aside.write_text(str(int(connected)), encoding="ascii")
                aside.replace(self._file)  # whoever reads meanwhile reads the one or the other

    def _text(self) -> str:
        """The last part of the SuperNode's log since it was started; from its beginning where it was begun anew."""
        try:
            size = _size(self._supernode.log)
            start = self._place if self._place <= size else 0
            with self._supernode.log.open("rb") as stream:
                stream.seek(max(start, size - _LONGEST_TAIL))
                return stream.read().decode("utf-8", "replace")
        except OSError:
            return ""


def is_connected(folder: Path) -> bool:
    """Whether a site that is up has a connection, as it says itself."""
    try:
        file = folder / CONNECTED
        fresh = abs(time.time() - file.stat().st_mtime) < OLDEST_WORD
        return fresh and file.read_text(encoding="ascii") == "1"
    except OSError:
        return False


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
