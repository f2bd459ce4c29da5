"""A run's folder: whole or plainly not, on a disk that is really full, and never two runs in one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.config import Plan
from common.events.catalog import Catalog
from server import runs
from server.runs import INCOMPLETE, RunError, RunFolder, append_line, write_whole

CATALOG = Catalog(ids=("a", "b"), texts=("red river", ""), categories=((), ("book",)))
STATE = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2)}
BIG = {"layer.weight": torch.zeros(200_000)}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, Plan(name="demo"), CATALOG)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, really mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk; the test with a file size limit covers the rest")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> None:
    """Leaves so many bytes on the disk."""
    free = os.statvfs(folder)
    (folder / "filling").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_is_one_line_and_leaves_nothing_half_written(
    small_disk: Path,
) -> None:
    run = RunFolder.create(small_disk, Plan(name="demo"), CATALOG)
    run.save_round(0, STATE)
    before = files(run.path)
    with pytest.raises(RunError, match=r"disk is full: 00001\.safetensors .* free space and start") as caught:
        run.save_round(1, BIG)
    assert "\n" not in str(caught.value)
    assert files(run.path) == before
    assert torch.equal(run.round_state(0)["layer.weight"], STATE["layer.weight"])
    with pytest.raises(RunError, match="did not end well"):
        RunFolder.finished(run.path)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_it(small_disk: Path) -> None:
    run = RunFolder.create(small_disk, Plan(name="demo"), CATALOG)
    run.save_model(STATE)
    with pytest.raises(RunError, match="disk is full"):
        run.save_model(BIG)
    assert set(run.model_state()) == set(STATE)


def test_a_record_that_does_not_fit_leaves_no_half_a_line(small_disk: Path) -> None:
    run = RunFolder.create(small_disk, Plan(name="demo"), CATALOG)
    append_line(run.rounds_file, {"round": 1})
    fill(small_disk, leave=8192)
    with pytest.raises(RunError, match="disk is full"):
        append_line(run.rounds_file, {"round": 2, "long": "x" * 100_000})
    assert run.rounds_file.read_bytes() == b'{"round": 1}\n'
    (small_disk / "filling").unlink()
    append_line(run.rounds_file, {"round": 2})
    assert list(run.records()) == [{"round": 1}, {"round": 2}]


def test_a_run_that_cannot_begin_for_want_of_space_is_one_line(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(RunError, match="disk is full"):
        RunFolder.create(small_disk, Plan(name="demo"), CATALOG)


def test_a_limit_on_file_sizes_is_one_line_too(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from server.runs import RunError, write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    write_whole(Path(sys.argv[1]) / 'model', bytes(200_000))\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "cannot be written (File too large)" in done.stdout
    assert files(tmp_path) == set()


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder.create(tmp_path / "a-file", Plan(name="demo"), CATALOG)
    with pytest.raises(RunError, match="cannot be written"):
        write_whole(tmp_path / "missing" / "model", b"")
    with pytest.raises(RunError, match="cannot be written"):
        append_line(tmp_path / "missing" / "rounds", {})


def test_a_run_is_incomplete_by_name_until_it_is_finished(run: RunFolder) -> None:
    assert run.path.name.endswith(f"-demo{INCOMPLETE}")
    assert not run.name.endswith(INCOMPLETE)
    run.save_model(STATE)
    with pytest.raises(RunError, match="did not end well"):
        RunFolder.finished(run.path)  # even with a model in it
    done = run.finish()
    assert not run.path.exists()
    assert done.path.name == done.name == run.name
    again = RunFolder.finished(done.path)
    assert again.catalog() == CATALOG
    assert again.plan() == Plan(name="demo")
    assert {name: tensor.tolist() for name, tensor in again.model_state().items()} == {
        name: tensor.tolist() for name, tensor in STATE.items()
    }


def test_a_folder_without_a_model_is_not_taken_for_a_finished_run(run: RunFolder, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (bare, run.finish().path):
        with pytest.raises(RunError, match="did not end well, so it has no model: run it again"):
            RunFolder.finished(path)
    with pytest.raises(RunError, match="there is no run folder"):
        RunFolder.finished(tmp_path / "missing")


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.time, "strftime", lambda _: "20260101-000000")
    first, second = (RunFolder.create(tmp_path, Plan(name="demo"), CATALOG) for _ in range(2))
    done = first.finish()
    third = RunFolder.create(tmp_path, Plan(name="demo"), CATALOG)  # the first has lost its ending
    names = [done.name, second.name, third.name]
    assert len(set(names)) == 3
    assert sorted(names) == [
        "20260101-000000-demo",
        "20260101-000000-demo-2",
        "20260101-000000-demo-3",
    ]
    for each in (second, third):
        each.finish()


def test_a_last_line_that_is_not_whole_is_left_out(run: RunFolder) -> None:
    assert list(run.records()) == []
    append_line(run.rounds_file, {"round": 1})
    append_line(run.rounds_file, {"round": 2})
    with run.rounds_file.open("ab") as file:
        file.write(json.dumps({"round": 3}).encode()[:-3])
    assert [record["round"] for record in run.records()] == [1, 2]


def test_checkpoints_come_back_as_they_were(run: RunFolder) -> None:
    run.save_round(0, STATE)
    run.save_round(1, {name: tensor + 1 for name, tensor in STATE.items()})
    assert run.round_state(0)["layer.bias"].tolist() == [1, 1]
    assert run.round_state(1)["layer.bias"].tolist() == [2, 2]
    assert not [name for name in files(run.path) if "partial" in name]
