"""The server's executor runs the server's own bundle in the server's own folders, and no other command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from common.bundle import bundle_files, bundle_hash
from server.bundle_guard import (
    GUARDED,
    REFUSED,
    RunRefusedError,
    check_bundle,
    check_folders,
    check_wanted,
    want,
    write_commands,
)
from server.deployment import Deployment


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
        {"registry-dir": ""},
        {"registry-dir": "/elsewhere/registry"},
    ):
        with pytest.raises(RunRefusedError, match="this server's are in"):
            check_folders({**good, **change}, server)


def test_a_run_is_begun_once_for_each_time_that_it_is_wanted(server: Deployment) -> None:
    run = server.runs / "a.incomplete"
    config = {"run-dir": str(run)}
    for _ in range(2):  # nor where there is no such run
        with pytest.raises(RunRefusedError, match="but not by `fedtide server run`"):
            check_wanted(config)
        run.mkdir(parents=True, exist_ok=True)
    want(run)
    check_wanted(config)
    with pytest.raises(RunRefusedError, match="but not by `fedtide server run`"):
        check_wanted(config)


def test_other_commands_refuse_and_all_of_flowers_are_covered(server: Deployment) -> None:
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    folder = write_commands(server)
    assert (
        {file.name for file in folder.iterdir()} == {GUARDED, *REFUSED} == set(TASK_TYPE_TO_COMMAND.values())
    )
    done = subprocess.run([str(folder / "flwr-simulation")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "asked to run flwr-simulation: refused" in done.stderr
