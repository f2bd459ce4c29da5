"""`site up` starts again what stands still, and nothing else; a site that has withdrawn says so.

The site is real, its server a Fleet API on loopback that answers as told.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from typer.testing import CliRunner

from client import agent
from client.ledger import Ledger
from client.link import is_connected
from common.cli import app
from simulations.faults.place import below, command_of
from tests.client.fleet import Fleet, fleet_at, until
from tests.client.test_connection import init

QUICK = """
import sys
from pathlib import Path
from client import agent
agent._SILENT = agent._SILENT_WORKER = 10.0
agent.Agent(Path(sys.argv[1])).run(sys.stderr)
"""
"""`fedtide site up` that loses patience soon."""


@contextmanager
def up(folder: Path, notify: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    if notify is not None:
        environment["NOTIFY_SOCKET"] = str(notify)
    with (folder.parent / "up.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", QUICK, folder], env=environment, stderr=log, stdout=log
        )
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Path]]:
    root = tmp_path_factory.mktemp("watched")
    with fleet_at(root) as (fleet, _), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(root / "home"))
        made = init(root / "site", root / "data", "--invitation", root / "invitation.json")
        assert made.exit_code == 0, made.output
        yield fleet, root / "site"


def part(site: subprocess.Popen[bytes], words: str) -> int:
    found = [pid for pid in below(site.pid) if words in command_of(pid)]
    return min(found) if found else 0


def answered(fleet: Fleet, log: Path) -> None:
    message = fleet.give()
    until(lambda: fleet.reply_to(message) is not None, what=f"{message} got no answer: {log}")
    reply = fleet.reply_to(message)
    assert reply is not None
    assert not reply.has_error()  # a word of the worker: such a request is refused


def test_what_stands_still_is_started_again_and_a_message_is_answered(place: tuple[Fleet, Path]) -> None:
    fleet, folder = place
    log = folder.parent / "up.log"
    notify = folder.parent / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, up(folder, notify) as site:
        manager.bind(str(notify))
        until(lambda: "connected to" in log.read_text() and "is ready" in log.read_text())
        answered(fleet, log)
        assert manager.recv(100) == b"WATCHDOG=1"  # systemd hears that `site up` works
        assert is_connected(folder)
        for name in ("worker", "starter", "supernode"):
            before = part(site, f"client.{name}")
            os.kill(before, signal.SIGSTOP)
            until(lambda name=name: f"{name} is started again" in log.read_text())  # type: ignore[misc]
            assert f"{name} ended with code -9 (killed, as it gave no sign of life" in log.read_text()
            assert part(site, f"client.{name}") != before
            answered(fleet, log)
        # all at once, as a machine that sleeps: nobody is taken for silent
        everything = {site.pid} | below(site.pid)
        said = log.read_text().count("no sign of life")
        for sent in (signal.SIGSTOP, signal.SIGCONT):
            for pid in everything:
                os.kill(pid, sent)
            time.sleep(16 if sent is signal.SIGSTOP else 0)
        answered(fleet, log)
        assert log.read_text().count("no sign of life") == said
        for file in ("supernode.log", "worker.log", "site.log"):
            (folder / "logs" / file).unlink()
        fleet.ends_with("PullMessages", grpc.StatusCode.INTERNAL, times=2)
        answered(fleet, log)
        assert site.poll() is None
    assert not is_connected(folder)


@pytest.mark.parametrize(
    ("lived", "unanswered", "deaf"),
    [
        (1000.0, 1.0, False),
        (1000.0, 100.0, True),
        (50.0, 100.0, False),  # it has just begun
        (1000.0, None, False),  # its executor has
        (None, 100.0, False),  # it is down
    ],
)
def test_a_supernode_that_answers_its_executor_no_more_is_noticed(
    lived: float | None, unanswered: float | None, deaf: bool
) -> None:
    supernode = SimpleNamespace(pid=None if lived is None else 1, lived=lived)
    starter = SimpleNamespace(pid=2, lived=100.0, unanswered=unanswered)
    assert agent._is_deaf(supernode, starter) == deaf  # type: ignore[arg-type]


def test_a_site_that_has_withdrawn_says_so_and_does_not_come_up(place: tuple[Fleet, Path]) -> None:
    _, folder = place
    with Ledger.open(folder / "ledger") as ledger:
        ledger.withdraw()
    refused = CliRunner().invoke(app, ["site", "up", str(folder)])
    assert "has withdrawn" in str(refused.exception)
    assert "fedtide site report" in str(refused.exception)
