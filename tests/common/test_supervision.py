"""Supervised processes: started again when they die, ended with all that they started, their logs kept short."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import supervision
from common.supervision import Supervised, wait_until

LOG = logging.getLogger("fedtide.server")


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def until(so: Callable[[], bool]) -> None:
    assert wait_until(so, 60)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    made = []

    def make(script: str) -> Supervised:
        one = Supervised(
            "worker", ["sh", "-c", script], environment={**os.environ, "PLACE": str(tmp_path)}, folder=tmp_path,
            log=tmp_path / "log", logger=LOG,
        )  # fmt: skip
        made.append(one)
        return one

    yield make
    for one in made:
        one.stop()


def test_what_dies_is_started_again_after_a_wait_that_grows(process: Callable[..., Supervised]) -> None:
    one = process("exit 3")
    one.start()
    waits = []
    for _ in range(2):
        until(lambda: one.pid is None)
        assert one.code == 3
        began = time.monotonic()
        until(one.tend)
        waits.append(time.monotonic() - began)
    assert one.restarts == 2
    assert 1.0 <= waits[0] < waits[1]


def test_a_process_that_lives_is_let_be(process: Callable[..., Supervised]) -> None:
    one = process("sleep 60")
    one.start()
    pid = one.pid
    assert not one.tend()
    assert one.pid == pid


@pytest.mark.parametrize(
    "script", ["sleep 60 & echo $! > child; wait", "trap '' TERM; sleep 60 & echo $! > child; wait"]
)
def test_the_end_takes_all_that_was_started(
    process: Callable[..., Supervised], tmp_path: Path, script: str
) -> None:
    one = process(script)
    one.start()
    until(lambda: (tmp_path / "child").is_file() and bool((tmp_path / "child").read_text().strip()))
    child, pid = int((tmp_path / "child").read_text()), one.pid
    assert pid is not None
    assert alive(child)
    one.stop(patience=1.0)
    until(lambda: not alive(child) and not alive(pid))


def test_what_a_dead_process_had_started_does_not_outlive_it(
    process: Callable[..., Supervised], tmp_path: Path
) -> None:
    one = process("sleep 60 & echo $! > child; wait")
    one.start()
    until(lambda: (tmp_path / "child").is_file() and bool((tmp_path / "child").read_text().strip()))
    child, pid = int((tmp_path / "child").read_text()), one.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(one.tend)
    until(lambda: not alive(child))


def test_a_log_that_grew_long_is_emptied_and_kept_once(
    process: Callable[..., Supervised], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_LOG_KEPT", 1000)
    one = process("while :; do echo a line of some length; sleep 0.01; done")
    one.start()
    until(lambda: (tmp_path / "log").stat().st_size > 1000)
    one.tend()
    assert (tmp_path / "log.1").stat().st_size >= 1000
    assert (tmp_path / "log").stat().st_size < 1000
    until(lambda: (tmp_path / "log").stat().st_size > 0)  # the process goes on writing to it


def test_a_killed_supervisor_takes_its_processes_along(tmp_path: Path) -> None:
    script = (
        "import logging, os, pathlib, sys, time\n"
        "from common.supervision import Supervised\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "one = Supervised('worker', ['sleep', '60'], environment=os.environ, folder=place, log=place / 'log',\n"
        "                 logger=logging.getLogger())\n"
        "one.start()\n"
        "print(one.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    until(lambda: not alive(child))
