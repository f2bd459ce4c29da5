"""An engine that cannot run ends the command with its last line; what made it fail most is kept from it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

from server.runs import RunError
from simulations import engines
from tests.tiny import tiny_run


def _long(folder: Path) -> Path:
    long = folder / ("x" * 50) / ("y" * 40)
    long.mkdir(parents=True)
    return long


def test_a_long_temporary_folder_and_anothers_cluster_do_not_stop_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = _long(tmp_path)
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.setenv(name, str(long))
    monkeypatch.setattr(engines.tempfile, "tempdir", None)  # read TMPDIR anew
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    outcome = tiny_run(tmp_path / "run", engine="flower")
    assert len(list(outcome.run.records())) == 2
    assert not any(name.startswith("ft-") for name in os.listdir(long))


def test_an_engine_that_cannot_start_ends_the_run_with_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = _long(tmp_path)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(engines.tempfile, "tempdir", None)
    monkeypatch.setattr(engines, "_LONGEST_PLACE", 1000)  # as it was: the folder that was given
    with pytest.raises(RunError, match=r"Flower's engine cannot run: .*AF_UNIX path length.*engine\.log"):
        tiny_run(tmp_path / "run", engine="flower")


def test_no_place_for_sockets_is_said_before_the_engine_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_LONGEST_PLACE", 2)
    with (
        pytest.raises(RunError, match="set TMPDIR to a short one, or use --engine inline"),
        engines._short_folder(),
    ):
        pass


DEAD = "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            [DEAD, "error: no round was aggregated"],
            "a worker of Ray's died while sites computed (ray.exceptions.ActorDied",
        ),
        (["  " + DEAD, "error: it failed"], "it failed"),  # quoted within another's line
        (
            ["ray.exceptions.OutOfMemoryError: Task was killed, as memory ran low."],
            "OutOfMemoryError",
        ),
        (["ray.exceptions.WorkerCrashedError: The worker died."], "choose fewer with --cpus"),
        (["error: first", "error: last"], "last"),
        (["Traceback", "ValueError: x"], "Flower's engine ended with code 7"),
        ([], "Flower's engine ended with code 7"),
    ],
)
def test_the_cause_is_said_and_not_what_it_led_to(log: list[str], said: str) -> None:
    why = engines._why(log, 7)
    assert said in why
    assert "\n" not in why


def test_a_fault_of_the_servers_part_is_not_called_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine's own process, whose server app breaks as it begins: `sitecustomize` is read by every Python."""
    place = tmp_path / "broken"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('flower_engine' in each for each in sys.orig_argv):\n"
        "    import server.app\n"
        "    def broken(grid, context):\n"
        "        raise KeyError('nothing of that name')\n"
        "    server.app.app = broken\n"
    )
    paths = [str(place), str(Path(engines.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(each for each in paths if each))
    with pytest.raises(
        RunError, match=r"the server's part of the run failed: KeyError: 'nothing of that name'"
    ):
        tiny_run(tmp_path / "run", engine="flower")


def _workers(mark: str) -> list[int]:
    """Ray's workers that began with a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                named = b"ray::" in (entry / "cmdline").read_bytes()
                if named and mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.mark.skipif(not os.environ.get("FEDTIDE_FAULTS"), reason="some 20 s: set FEDTIDE_FAULTS=1")
def test_a_worker_that_is_killed_as_for_want_of_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"FEDTIDE_KILLED_WORKER={tmp_path.name}-{os.getpid()}"
    monkeypatch.setenv(*mark.split("="))
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.2):
            for pid in _workers(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(RunError, match=r"a worker of Ray's died while sites computed .* --cpus"):
            tiny_run(tmp_path / "run", engine="flower")
    finally:
        over.set()
        killer.join()
