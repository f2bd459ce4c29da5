"""An engine that cannot run ends the command with its last line; what made it fail most is kept from it."""

from __future__ import annotations

import os
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
