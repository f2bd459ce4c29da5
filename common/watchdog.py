"""What systemd's watchdog wants to hear from a service that it started (`WatchdogSec` in a unit; sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

_EVERY = 1.0


class Watchdog:
    """Tells the service manager that this process works; tells nobody where none asked."""

    def __init__(self) -> None:
        """Takes the address that this process inherited, so that what it starts does not inherit it too."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._next = 0.0

    def show(self) -> None:
        """Says that this process works, once a second at most; never waits, and never fails. Call it often."""
        if not self._address or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller:
            teller.setblocking(False)
            teller.sendto(b"WATCHDOG=1", self._address)
