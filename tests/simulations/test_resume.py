"""Runs that are killed and go on: SIGKILL at lines of the server's code, and at random instants.

FEDTIDE_KILLS (default 20) sets the number of kills, half of them in each test.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.ledger import Ledger
from common.events.catalog import Catalog
from server.runs import RunFolder
from simulations.audit.receipts import audit_receipts
from simulations.sites import registry_folder
from tests.simulations.killed_server import NODES
from tests.tiny import tiny_run

KILLS = int(os.environ.get("FEDTIDE_KILLS", "20"))
PLAN = {
    "training": {"rounds": 3, "steps_per_round": 1, "server_momentum": 0.5, "learning_rate": 0.1},
    "privacy": {"noise_multiplier": 60.0, "sampling_rate": 1.0, "epsilon": 90.0},
    "statistics": {
        "popularity_share": 0.1,
        "popularity_noise_multiplier": 60.0,
        "transition_share": 0.1,
        "transition_noise_multiplier": 60.0,
        "top_items": 6,
    },
    "metrics": {"share": 0.1, "noise_multiplier": 60.0},
    "pretraining": {"histories": 8, "epochs": 1, "events": 4},
}
ROUNDS = 6


class Nursery:
    """The process that forks federations; see `killed_server.py`. Runs and sites are under one folder."""

    def __init__(self, folder: Path) -> None:
        first = tiny_run(folder, plan=PLAN, sites=folder / "sites", site_budget=90.0, n_sites=NODES)
        self.plan, self.folder = first.plan, folder
        self.start = first.run.round_state(0)
        (folder / "plan.json").write_text(self.plan.to_json())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.simulations.killed_server", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "FEDTIDE_HOME": str(folder / "cache"),
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def new_run(self) -> RunFolder:
        run = RunFolder.create(
            self.folder / "killed", self.plan, Catalog.load(self.folder / "sites" / "catalog.jsonl")
        )
        run.save_round(0, self.start)
        return run

    def go_on(self, run: RunFolder, *, lines: int = 0, seconds: float = 0.0) -> int:
        """Goes on with a run until so many lines of the server's code, or so long; the exit code."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{run.path} {lines} {seconds}\n")
        self._process.stdin.flush()
        code = int(self._read())
        assert code in (0, -signal.SIGKILL), (self.folder / "log.txt").read_text()[-3000:]
        return code

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    it = Nursery(tmp_path_factory.mktemp("resume"))
    yield it
    it.close()


def check_whole(nursery: Nursery, run: RunFolder) -> None:
    """The run ended well, each round once, each release once; its receipts stand up to an audit."""
    assert run.ending() == {"status": "completed", "reason": ""}
    assert [record["round"] for record in run.records()] == list(range(1, ROUNDS + 1))
    lines = [
        (line["round"], line["key_id"]) for number in range(1, 1 + ROUNDS) for line in run.receipts(number)
    ]
    assert len(set(lines)) == len(lines) == len(run.receipts_file.read_bytes().splitlines())
    assert Counter(number for number, _ in lines) == {
        record["round"]: len(record["admitted"]) for record in run.records() if record["admitted"]
    }
    found = audit_receipts(run.path, registry_folder(nursery.folder / "sites"))
    assert not found.lies, found.lies


def charges(nursery: Nursery, run: RunFolder) -> Counter[int]:
    """Round -> reservations of it, over all sites; none twice at one site."""
    total: Counter[int] = Counter()
    for number in range(NODES):
        with Ledger.open(nursery.folder / "sites" / f"{number:05d}" / "ledger") as ledger:
            ledger.verify()
            mine = Counter(
                charge.reserve.round for charge in ledger.status().charges if charge.reserve.run == run.name
            )
        assert not mine or max(mine.values()) == 1, "a site was charged twice for a round"
        total += mine
    return total


def replayed(nursery: Nursery, run: RunFolder) -> RunFolder:
    """The same run without a crash: same name and start; sites answer from their outboxes, or refuse again."""
    again = RunFolder(nursery.folder / "replayed" / run.path.name)
    (again.path / "rounds").mkdir(parents=True)
    for name in ("plan.json", "version.json", "catalog.jsonl", "rounds/00000.safetensors"):
        shutil.copy(run.path / name, again.path / name)
    assert nursery.go_on(again) == 0
    return again


def check_same(run: RunFolder, again: RunFolder) -> None:
    """Every checkpoint, statistic, momentum and the final model, byte for byte, and the same receipts."""

    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*.safetensors"))
            if file.parent.name != "updates"
        }

    assert files(run.path) == files(again.path)
    assert sorted(run.receipts_file.read_bytes().splitlines()) == sorted(
        again.receipts_file.read_bytes().splitlines()
    )
    assert run.metrics_file.read_bytes() == again.metrics_file.read_bytes()


@pytest.mark.timeout(240 + 20 * KILLS)
def test_a_server_killed_at_any_line_comes_to_the_same_end(nursery: Nursery) -> None:
    chance, kills, runs, hit = random.Random(5), 0, 0, set[int]()
    while kills < KILLS // 2:
        run, before = nursery.new_run(), kills
        while nursery.go_on(run, lines=chance.randrange(1, 2500)):
            kills += 1
            hit.add(len(list(run.records())))
        runs += 1
        check_whole(nursery, run)
        assert charges(nursery, run) == dict.fromkeys(range(1, ROUNDS + 1), NODES)
        assert all(len(record["admitted"]) == NODES for record in run.records())
        if kills > before and runs <= 3:
            check_same(run, replayed(nursery, run))
            charged = charges(nursery, run)
            assert charged == dict.fromkeys(range(1, ROUNDS + 1), NODES)
    assert len(hit) > 2, "the kills all fell into the same rounds: the test has lost its bite"
    print(f"{kills} kills in {runs} runs, after rounds {sorted(hit)}")


@pytest.mark.timeout(240 + 20 * KILLS)
def test_server_and_sites_killed_at_any_instant_charge_no_round_twice(nursery: Nursery) -> None:
    chance, kills, runs, burnt = random.Random(7), 0, 0, 0
    while kills < KILLS // 2:
        run, patience = nursery.new_run(), 1.0  # which grows, so that the slowest machine comes to an end
        while nursery.go_on(run, seconds=chance.uniform(0.05, patience)):
            kills, patience = kills + 1, 1.3 * patience
        runs += 1
        check_whole(nursery, run)
        asked = charges(nursery, run)
        burnt += sum(asked[record["round"]] - len(record["admitted"]) for record in run.records())
        if runs == 1:
            check_same(run, replayed(nursery, run))
    print(f"{kills} kills in {runs} runs, {burnt} reservations burnt")
