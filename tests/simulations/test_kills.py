"""SIGKILL at random instants during real rounds: server and sites die together, and nothing is left uncharged.

FEDTIDE_KILLS (default 6) sets the number of kills; 200 is the figure in the docs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from client.ledger import Ledger
from common.privacy.entries import Release
from common.privacy.receipts import Receipt, check_receipt_alone, check_update
from common.privacy.renyi import charge_at
from server.registry import RegistryReader
from simulations.sites import registry_folder
from tests.simulations.killed_federation import NODES
from tests.tiny import tiny_run

KILLS = int(os.environ.get("FEDTIDE_KILLS", "6"))
PLAN = {
    "training": {"rounds": 50, "steps_per_round": 2},
    "privacy": {"noise_multiplier": 60.0, "sampling_rate": 1.0, "epsilon": 90.0},
}
ONCE = {**PLAN, "training": {"rounds": 1, "steps_per_round": 2}}


class Nursery:
    """The process that forks federations; see `killed_federation.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.simulations.killed_federation", str(folder)],
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

    def run_for(self, seconds: float, *, cold: bool) -> int:
        """Forks a federation, kills it after so long, and gives its exit code.

        Args:
            cold: count from the fork on; else from the first update that leaves on.
        """
        assert self._process.stdin is not None
        sign = self._folder / "at-work"
        sign.unlink(missing_ok=True)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        pid, end = int(self._read()), time.monotonic() + 30
        while not cold and not sign.exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return int(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


def answers(wire: Path) -> dict[str, list[tuple[str, bytes]]]:
    """node-nonce -> what was answered to it, in kind and bytes."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    for path in wire.iterdir():
        name, *_, kind = path.name.split(".")
        if kind in ("update", "refusal", "error"):
            found.setdefault(name, []).append((kind, path.read_bytes()))
    return found


@pytest.mark.timeout(120 + 10 * KILLS)
def test_kills_during_real_rounds_leave_no_update_uncharged(tmp_path: Path) -> None:
    first = tiny_run(tmp_path, plan=ONCE, sites=tmp_path / "sites", site_budget=90.0, n_sites=NODES)
    (tmp_path / "wire").mkdir()
    plan = first.plan.model_copy(update={"training": first.plan.training.model_copy(update={"rounds": 50})})
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "start.safetensors").write_bytes(
        (first.run.path / "rounds" / "00000.safetensors").read_bytes()
    )
    nursery, chance = Nursery(tmp_path), random.Random(11)
    codes = Counter(nursery.run_for(chance.random(), cold=kill % 5 == 0) for kill in range(KILLS))
    nursery.close()
    log = (tmp_path / "log.txt").read_text()
    assert codes == {-signal.SIGKILL: KILLS}, log[-2000:]  # none had ended by itself, by an error say

    reader = RegistryReader(registry_folder(tmp_path / "sites"))
    found = answers(tmp_path / "wire")
    totals: Counter[str] = Counter()
    for number in range(NODES):
        with Ledger.open(tmp_path / "sites" / f"{number:05d}" / "ledger") as ledger:
            ledger.recover()
            held = reader.chain(ledger.key_id)
            anchors = {anchor.seq: anchor.head for anchor in reader.anchors(ledger.key_id)}
            report = ledger.verify(anchored_heads=anchors)
            assert not any(site.barred for site in reader.sites()), "the site signed two histories"
            assert held.entries[-1].hash == ledger.entries()[held.head.seq].hash
            assert report.open == 0
            charge = charge_at(plan.round_event(), ledger.genesis.order, ledger.genesis.cap)
            assert report.spent == charge * report.reserved
            assert report.reserved == report.released + report.burnt
            totals.update(reserved=report.reserved, burnt=report.burnt, released=report.released)
            releases = {
                entry.hash: entry.body for entry in ledger.entries() if isinstance(entry.body, Release)
            }
            for name, sent in found.items():
                if name.startswith(f"{number + 2}-"):
                    totals.update(_check_answers(sent, releases))
    assert totals["error"] == 0
    assert totals["updates"] <= totals["released"]
    assert totals["resent"] > 0, "no update was sent twice: the test has lost its bite"
    if KILLS >= 30:  # a few kills may all miss
        assert totals["burnt"] > 0, "no kill hit a reservation: the test has lost its bite"
    print(f"{KILLS} kills: {dict(totals)}")


def _check_answers(sent: list[tuple[str, bytes]], releases: dict[str, Release]) -> Counter[str]:
    """All answers to one request: at most one update, the same bytes each time, signed and charged."""
    updates = [data for kind, data in sent if kind == "update"]
    assert len(set(updates)) <= 1, "a retry sent other bytes"
    for data in updates[:1]:
        length = int.from_bytes(data[:4], "big")
        receipt = Receipt.from_bytes(data[4 : 4 + length])
        check_receipt_alone(receipt)
        assert releases[receipt.entries[-1].hash] == receipt.release, "an update left uncharged"
        check_update(receipt.release, data[4 + length :])
    refusals = Counter(data.decode() for kind, data in sent if kind == "refusal")
    assert not set(refusals) - {"policy"}, refusals  # a burnt attempt is not trained on again
    return Counter(
        updates=bool(updates),
        resent=max(0, len(updates) - 1),
        refused=refusals.total(),
        error=sum(kind == "error" for kind, _ in sent),
    )
