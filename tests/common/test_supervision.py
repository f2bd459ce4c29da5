"""Supervised processes: started again when they die, ended with all that they started, their logs kept short."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import kept_log, supervision
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

    def make(script: str, silence: float | None = None) -> Supervised:
        one = Supervised(
            "worker", ["sh", "-c", script], environment={**os.environ, "PLACE": str(tmp_path)}, folder=tmp_path,
            log=tmp_path / "log", logger=LOG, silence=silence,
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
    monkeypatch.setattr(kept_log, "_LOG_KEPT", 1000)
    one = process("while :; do echo a line of some length; sleep 0.01; done")
    one.start()
    until(lambda: (tmp_path / "log").stat().st_size > 1000)
    one.tend()
    assert (tmp_path / "log.1").stat().st_size >= 1000
    assert (tmp_path / "log").stat().st_size < 1000
    until(lambda: (tmp_path / "log").stat().st_size > 0)  # the process goes on writing to it


LINES = "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.01; done"


@pytest.mark.parametrize("how", ["deleted", "moved", "its folder deleted"])
def test_a_log_that_is_gone_is_made_anew_and_nothing_ends(
    process: Callable[..., Supervised], tmp_path: Path, how: str
) -> None:
    one = process(LINES)
    one.log = tmp_path / "logs" / "log"
    one._kept = kept_log.KeptLog(one.log, "worker", LOG)
    one.log.parent.mkdir()
    one.start()
    until(lambda: one.log.stat().st_size > 100)
    pid = one.pid
    one.tend()
    if how == "moved":
        one.log.rename(tmp_path / "log.of.yesterday")
    else:
        one.log.unlink()
    if how == "its folder deleted":
        one.log.parent.rmdir()
        assert not one.tend()
        one.log.parent.mkdir()
    until(lambda: bool(one.tend() or one.log.exists()) and len(one.log.read_text().splitlines()) > 20)
    numbers = [int(line.split()[1]) for line in one.log.read_text().splitlines()[:20]]
    assert numbers == list(range(numbers[0], numbers[0] + 20))  # what is printed stands there, line by line
    assert one.pid == pid


def test_a_log_that_cannot_be_kept_is_said_once_and_ends_nothing(
    process: Callable[..., Supervised],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kept_log, "_LOG_KEPT", 100)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept_log.shutil, "copy", full)
    one = process("while :; do echo a line of some length; sleep 0.001; done")
    one.start()
    pid = one.pid
    LOG.propagate = True
    with caplog.at_level(logging.WARNING, LOG.name):
        until(lambda: (tmp_path / "log").stat().st_size > 100)
        one.tend()
        assert (tmp_path / "log").stat().st_size < 1000  # cut all the same
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    one.tend()  # it goes well again
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    caplog.clear()
    with caplog.at_level(logging.WARNING, LOG.name):
        for _ in range(3):
            one.tend()
    assert len(caplog.records) == 1
    assert one.pid == pid
    one.stop()
    one.start()  # without a log, but it starts
    assert one.pid is not None


def test_a_process_that_falls_silent_is_killed_and_started_again(
    process: Callable[..., Supervised], caplog: pytest.LogCaptureFixture
) -> None:
    shows = "while :; do printf . >/proc/self/fd/$FEDTIDE_PULSE; sleep 0.05; done"
    one = process(shows, silence=1.0)
    one.start()
    LOG.propagate = True

    def tended() -> bool:
        one.tend()
        return one._shown

    until(tended)
    assert one.unanswered is None  # alive, but what it asks has not answered it
    pid = one.pid
    assert pid is not None
    with caplog.at_level(logging.WARNING, LOG.name):
        os.kill(pid, signal.SIGSTOP)
        until(one.tend)
    assert "gave no sign of life" in caplog.text
    assert not alive(pid)
    until(tended)


def test_a_watcher_that_stood_still_itself_takes_nobody_for_silent(
    process: Callable[..., Supervised], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = process("printf . >/proc/self/fd/$FEDTIDE_PULSE; sleep 60", silence=50.0)
    one.start()
    until(lambda: bool(one.tend() or one._shown))
    pid, clock = one.pid, time.monotonic
    for later in (100.0, 140.0):
        monkeypatch.setattr(supervision.time, "monotonic", lambda later=later: clock() + later)
        one.tend()
        assert one._killed == ""
    for later in range(140, 200, 5):  # but a silence that it saw itself counts
        monkeypatch.setattr(supervision.time, "monotonic", lambda later=later: clock() + later)
        one.tend()
    monkeypatch.undo()
    until(lambda: one.pid != pid)


def test_signs_of_life_are_not_inherited_by_what_a_process_starts(process: Callable[..., Supervised]) -> None:
    script = (
        "import os, subprocess, time; from common.supervision import ANSWERED, Pulse; Pulse().show(ANSWERED); "
        "assert 'FEDTIDE_PULSE' not in os.environ; "
        "done = subprocess.run(['ls', '-l', '/proc/self/fd'], capture_output=True, text=True); "
        "print(done.stdout.count('pipe'), flush=True); time.sleep(60)"
    )
    one = process(f'exec {sys.executable} -c "{script}"', silence=60.0)
    one.start()
    until(lambda: bool(one.tend() or one.unanswered is not None))
    until(lambda: one.log.read_text().strip() == "2")  # its own two


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
