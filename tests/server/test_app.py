"""The ServerApp: where it is told to work, that one works at a time, and the ending that it leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from common.config import make_plan
from common.events.catalog import Catalog
from server.app import REGISTRY_FOLDER, RUN_FOLDER, app
from server.registry import RegistryReader
from server.runs import RunError, RunFolder
from simulations.inline import InlineGrid
from tests.tiny import tiny_run

CATALOG = Catalog(ids=("a", "b"), texts=("red river", ""), categories=((), ("book",)))


class NoLink(InlineGrid):
    """A grid whose link to the SuperLink is gone."""

    def get_node_ids(self) -> Any:
        raise ConnectionError("the link is gone")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    plan = make_plan({"privacy": {"noise_multiplier": 2.0}, "server": {"patience": 0.05}})
    run = RunFolder.create(tmp_path / "runs", plan, CATALOG)
    run.save_round(0, {"weight": torch.zeros(2)})
    return run


def start(grid: InlineGrid, **config: str) -> None:
    app(grid=grid, context=Context(1, 1, {}, RecordDict(), dict(config)))


def nobody() -> InlineGrid:
    return InlineGrid(ClientApp(), {})


def test_a_run_that_ends_well_says_so(tmp_path: Path) -> None:
    assert tiny_run(tmp_path).run.ending() == {"status": "completed", "reason": ""}


def test_the_run_configuration_says_where_run_and_registry_lie(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path / "another"))
    monkeypatch.setenv(REGISTRY_FOLDER, str(tmp_path / "elsewhere"))
    with pytest.raises(RunError, match="of the 1 that round 1 needs, 0 sites came"):
        start(nobody(), **{"run-dir": str(run.path), "registry-dir": str(tmp_path / "here")})
    assert RegistryReader(tmp_path / "here").sites() == []
    assert not (tmp_path / "elsewhere").exists()


def test_empty_keys_leave_it_to_the_environment(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_FOLDER, str(run.path))
    with pytest.raises(RunError, match="of the 1 that round 1 needs, 0 sites came"):
        start(nobody(), **{"run-dir": "", "registry-dir": ""})
    assert (run.path / "registry").is_dir()


def test_a_failed_run_leaves_its_reason_in_words(run: RunFolder) -> None:
    assert run.ending() is None
    with pytest.raises(RunError) as caught:
        start(nobody(), **{"run-dir": str(run.path)})
    assert run.ending() == {"status": "failed", "reason": str(caught.value)}


def test_a_fault_of_flowers_is_an_ending_too(run: RunFolder) -> None:
    with pytest.raises(ConnectionError):
        start(NoLink(ClientApp(), {}), **{"run-dir": str(run.path)})
    assert run.ending() == {"status": "failed", "reason": "ConnectionError: the link is gone"}


def test_one_process_works_in_a_run_and_another_leaves_no_ending(run: RunFolder) -> None:
    with run.at_work(), pytest.raises(RunError, match=r"another process is at work in .* wait for its end"):
        start(nobody(), **{"run-dir": str(run.path)})
    assert run.ending() is None
    with run.at_work():
        pass  # whoever comes later may


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run in"):
        start(nobody(), **{"run-dir": os.fspath(tmp_path / "none")})
