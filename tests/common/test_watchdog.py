"""What a service tells systemd's watchdog, over a real socket as systemd makes it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from common import watchdog
from common.watchdog import Watchdog


@pytest.mark.parametrize("name", ["{folder}/notify", "@fedtide-watchdog-test"])
def test_it_is_told_now_and_then_and_what_is_started_inherits_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = name.format(folder=tmp_path)
    now = 100.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if address.startswith("@") else address)
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        told = Watchdog()
        assert "NOTIFY_SOCKET" not in watchdog.os.environ
        told.show()
        assert manager.recv(100) == b"WATCHDOG=1"
        told.show()
        with pytest.raises(BlockingIOError):
            manager.recv(100)
        now += 2.0
        told.show()
        assert manager.recv(100) == b"WATCHDOG=1"


def test_where_nobody_listens_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Watchdog().show()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    Watchdog().show()
