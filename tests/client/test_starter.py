"""ClientApps are forked from a process that has imported all that they need; each ends with what asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.bundle_guard import GUARDED, write_commands
from client.starter import SOCKET, start_one
from client.worker import listen


def wait_for(true: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def children(pid: int) -> set[int]:
    return {int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@contextmanager
def starter(folder: Path, *started: str) -> Iterator[subprocess.Popen[bytes]]:
    write_commands(folder / "bin", folder, folder / "site.log")
    with (folder / "starter.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *(started or ("-m", "client.starter")), folder, folder / "site.log"],
            stdout=log,
            stderr=log,
        )
    try:
        wait_for((folder / SOCKET).exists)
        yield process
    finally:
        process.kill()
        process.wait()


def called(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [folder / "bin" / GUARDED, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


NOWHERE = ("--insecure", "--runtime-api-address", "127.0.0.1:9", "--token", "x")
"""A SuperNode that does not answer: the ClientApp tries on and on."""


def test_a_client_app_is_forked_and_gives_its_exit_code(tmp_path: Path) -> None:
    with starter(tmp_path) as process:
        before = children(process.pid)
        assert called(tmp_path, "--help").wait(60) == 0
        assert called(tmp_path, "--no-such-option").wait(60) == 2
        assert children(process.pid) == before
    assert "Run a Flower ClientApp" in (tmp_path / "starter.log").read_text()  # where it ran


@pytest.mark.parametrize("killed", ["caller", "forked", "starter"])
def test_a_client_app_ends_with_its_caller_and_its_caller_with_it(tmp_path: Path, killed: str) -> None:
    with starter(tmp_path) as process:
        caller = called(tmp_path, *NOWHERE)
        wait_for(lambda: children(process.pid))
        (forked,) = children(process.pid)
        os.kill({"caller": caller.pid, "forked": forked, "starter": process.pid}[killed], signal.SIGKILL)
        assert caller.wait(60) == (-signal.SIGKILL if killed == "caller" else 1)
        wait_for(lambda: not Path(f"/proc/{forked}").exists())
        said = (tmp_path / "site.log").read_text()
        assert ("a ClientApp was killed before its answer" in said) == (killed != "caller")


def test_without_a_starter_the_client_app_runs_where_it_was_called(tmp_path: Path) -> None:
    write_commands(tmp_path / "bin", tmp_path, tmp_path / "site.log")
    said, _ = called(tmp_path, "--help").communicate(timeout=60)
    assert b"Run a Flower ClientApp" in said


def test_another_users_call_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forked() -> int:
        raise AssertionError("it forked")

    monkeypatch.setattr(os, "fork", forked)
    with listen(tmp_path / SOCKET) as listening:
        assert (tmp_path / SOCKET).stat().st_mode & 0o777 == 0o600
        caller = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from client.starter import quick_clientapp as q; q({str(tmp_path)!r}, 'log')",
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            with monkeypatch.context() as patch:
                patch.setattr("client.starter.peer", lambda _: os.getuid() + 1)
                start_one(listening, str(tmp_path), "log", lambda: True)
        finally:
            caller.kill()
            caller.wait()


UPDATED = """
import sys
from common.bundle import installed_code
versions = iter(["old", "old", "old", "old", "new", "new"])
installed_code.__wrapped__ = lambda: next(versions)
from client.starter import main
main(sys.argv[1:])
"""
"""A starter under which another version is installed after its first ClientApp was forked."""


def test_code_that_was_installed_since_is_never_run_by_what_was_imported_before(tmp_path: Path) -> None:
    with starter(tmp_path, "-c", UPDATED) as process:
        first = called(tmp_path, *NOWHERE)
        wait_for(lambda: children(process.pid))
        second = called(tmp_path, "--help")
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 0
        assert b"Run a Flower ClientApp" in said  # where it was called, with the new code
        wait_for(lambda: "another version was installed" in (tmp_path / "site.log").read_text())
        time.sleep(0.5)
        assert children(process.pid)  # what had begun goes on,
        assert first.poll() is None
        assert process.poll() is None
        first.kill()
        first.wait()
        assert process.wait(60) == 0  # and when all of it has ended, so does the starter
    assert "was not started" not in (tmp_path / "site.log").read_text()
    assert b"Run a Flower ClientApp" not in (tmp_path / "starter.log").read_bytes()  # not by the old
