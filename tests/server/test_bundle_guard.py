"""The server's executor runs the server's own bundle in the server's own folders, and no other command."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

from common.bundle import bundle_files, bundle_hash
from common.supervision import Pulse
from server import bundle_guard
from server.bundle_guard import (
    RunRefusedError,
    check_bundle,
    check_folders,
    check_wanted,
    want,
    want_no_more,
)
from server.deployment import Deployment
from server.superexec import ServerApps


@pytest.fixture
def server(tmp_path: Path) -> Deployment:
    return Deployment(tmp_path, "127.0.0.1")


def test_another_app_than_the_bundle_is_refused() -> None:
    from flwr.cli.build import build_fab_from_files

    data, _ = build_fab_from_files(bundle_files())
    check_bundle(data, bundle_hash())
    changed = {**bundle_files(), "fedtide_server.py": b"import os\n"}
    with pytest.raises(RunRefusedError, match="is not this server's bundle"):
        check_bundle(build_fab_from_files(changed)[0], bundle_hash())


def test_folders_elsewhere_are_refused(server: Deployment) -> None:
    good = {"run-dir": str(server.runs / "a.incomplete"), "registry-dir": str(server.registry)}
    check_folders(good, server)
    for change in (
        {"run-dir": "/elsewhere/a.incomplete"},
        {"run-dir": str(server.runs / ".." / "a")},
        {"run-dir": str(server.runs / "..")},
        {"run-dir": ""},
        {"run-dir": f"{server.runs}//a.incomplete"},
        {"run-dir": f"{server.runs}/./a.incomplete"},
        {"run-dir": str(server.runs / "a.discarded")},
        {"run-dir": str(server.runs / "a")},
        {"run-dir": str(server.runs / "b" / "a.incomplete")},
        {"registry-dir": ""},
        {"registry-dir": "/elsewhere/registry"},
    ):
        with pytest.raises(RunRefusedError, match="this server's unfinished ones are in"):
            check_folders({**good, **change}, server)


def test_a_run_is_begun_once_for_each_time_that_it_is_wanted(
    server: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_guard, "_PATIENCE", 0.3)
    run = server.runs / "a.incomplete"
    config = {"run-dir": str(run)}
    own, others = 2**63 + 5, 7

    def refused(number: int) -> None:
        with pytest.raises(RunRefusedError, match="but not by `fedtide server run`"):
            check_wanted(config, number)

    refused(own)  # nor where there is no such run
    run.mkdir(parents=True)
    refused(own)
    want(run, own)
    refused(others)  # who begins a run of their own over the control port gets another number
    check_wanted(config, own - 2**64)  # as SQLite has it
    refused(own)
    want(run, own)
    want_no_more(run)  # stopped before it began
    refused(own)
    (run / ".wanted").write_bytes(b"")
    refused(0)


def test_a_server_app_that_is_quicker_than_the_command_waits_for_its_number(server: Deployment) -> None:
    run = server.runs / "a.incomplete"
    run.mkdir(parents=True)
    later = threading.Timer(0.5, want, (run, 5))
    later.start()
    check_wanted({"run-dir": str(run)}, 5)
    later.join()


def test_the_executor_starts_nothing_but_server_apps(
    server: Deployment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it started something"))
    apps = ServerApps(server, Pulse())
    for kind in set(TaskType) - {TaskType.SERVER_APP}:
        spec = ExecutionSpec(kind, "127.0.0.1:9", "a token", True, None, False, None, False, 1)
        assert apps.launch(spec).status == LaunchResultStatus.FAILED
        assert f"asked to run {TASK_TYPE_TO_COMMAND[kind]}: refused" in capsys.readouterr().err


def test_the_token_of_a_server_app_stands_in_no_argument(
    server: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import ExecutionSpec

    started: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen

    def kept(command: list[str], **given: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", "server.bundle_guard"]
        echo = [
            sys.executable,
            "-c",
            "import sys, time; print(sys.stdin.readline(), flush=True); time.sleep(60)",
        ]
        started.append(begin([*echo, *command[3:]], **{**given, "stdout": subprocess.PIPE}))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", kept)
    token = "ab" * 32
    spec = ExecutionSpec(TaskType.SERVER_APP, "127.0.0.1:9", token, False, "ca.crt", False, 1, False, 1)
    ServerApps(server, Pulse()).launch(spec)
    (process,) = started
    try:
        assert process.stdout is not None
        assert process.stdout.readline().decode().strip() == token  # it came another way
        arguments = Path(f"/proc/{process.pid}/cmdline").read_text()
        assert "flwr-serverapp" in arguments
        assert "127.0.0.1:9" in arguments
        assert token not in arguments
    finally:
        process.kill()
        process.wait()
