"""The judges of a fault's run find what they are for, in a real run that is hurt by hand; one fault, for real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.wire import state_to_bytes
from server.runs import RunFolder
from simulations.faults.at_start import second_server
from simulations.faults.judging import Mark, applied_twice, charges, left_behind, lost, uncharged
from simulations.faults.place import deployed
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return tiny_run(folder, plan={"statistics": {"popularity_share": 0.2}}).run.path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(whole, tmp_path / whole.name)))


def ledgers(run: RunFolder) -> dict[str, Path]:
    names = {str(line["key_id"]): str(line["site"]) for line in run.receipts(1)}
    found = {}
    for folder in sorted(run.path.glob("**/ledger")):
        from client.ledger import Ledger

        with Ledger.open(folder) as ledger:
            found[names[ledger.key_id]] = folder
    return found


def nothing() -> Mark:
    return Mark({"rounds.jsonl": [], "receipts.jsonl": []}, {})


def all_faults(run: RunFolder, before: Mark) -> list[str]:
    sites = ledgers(run)
    return [
        *left_behind(run, list(sites), before),
        *lost(run, sites, before),
        *uncharged(run, sites, before),
        *applied_twice(run, sites),
    ]


def change_lines(file: Path, change: Callable[[list[str]], list[str]]) -> None:
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")


def test_a_sound_run_has_no_fault(run: RunFolder) -> None:
    before = nothing()
    before.lines["receipts.jsonl"] = run.receipts_file.read_text().splitlines()[:3]
    before.touched = [(site, 2) for site in ledgers(run)]
    assert all_faults(run, before) == []
    assert len(ledgers(run)) == 4


def test_each_thing_that_is_wrong_is_found(run: RunFolder) -> None:
    site = next(iter(ledgers(run)))
    before = nothing()
    before.lines["receipts.jsonl"] = ["another line"]
    assert "receipts.jsonl does not begin" in lost(run, {}, before)[0]
    before = nothing()
    before.entries[site] = ["0" * 64]
    assert f"the ledger of {site}" in lost(run, ledgers(run), before)[0]
    before = nothing()
    before.touched = [(site, 99)]
    assert uncharged(run, ledgers(run), before) == [
        f"round 99: {site} had looked at its data, and was not charged"
    ]


def test_an_update_without_a_release_in_its_ledger_is_found(run: RunFolder, tmp_path: Path) -> None:
    sites = ledgers(run)
    one, other = list(sites)[:2]
    assert charges(sites[one], run.name) == [(1, "released"), (2, "released"), (3, "released")]

    def twice(lines: list[str]) -> list[str]:
        line = next(json.loads(line) for line in lines if json.loads(line)["site"] == one)
        return [
            *lines,
            json.dumps({**line, "round": 3, "site": other}),
            json.dumps({**line, "site": "nobody"}),
        ]

    change_lines(run.receipts_file, twice)
    assert f"round 3: 2 receipts of {other}" in applied_twice(run, sites)
    assert "round 1: nobody was admitted, and its ledger has no release" in uncharged(run, sites, nothing())


def test_a_round_that_is_applied_twice_or_not_at_all_is_found(run: RunFolder) -> None:
    twice = {
        name: 2 * value - run.sent_state(1)[name] for name, value in run.round_state(2).items()
    }  # what round 2 adds, added again
    file = run.path / "rounds" / "00002.safetensors"
    file.write_bytes(state_to_bytes(twice))
    assert "round 2: the parameters are not those" in applied_twice(run, {})[0]
    change_lines(run.rounds_file, lambda lines: [*lines, lines[-1]])
    assert "round 3 is there 2 times" in applied_twice(run, {})
    assert "rounds [1, 2, 3, 3] are there of [1, 2, 3]" in lost(run, {}, nothing())


def test_a_site_that_is_left_behind_is_found(run: RunFolder) -> None:
    site = sorted(ledgers(run))[0]

    def without(lines: list[str]) -> list[str]:
        last = json.loads(lines[-1])
        return [
            *lines[:-1],
            json.dumps({**last, "admitted": [each for each in last["admitted"] if each != site]}),
        ]

    change_lines(run.rounds_file, without)
    assert left_behind(run, [site], nothing()) == [f"round 3 is without {site}"]


def test_a_second_server_on_the_same_port_says_what_to_do_and_the_first_goes_on(tmp_path: Path) -> None:
    with deployed(tmp_path, ()) as place:
        place.until(lambda: "up: sites reach" in place.up["server"].said(), "the server is up")
        assert f"port {place.ports[0]} (fleet) is in use by another process" in second_server(place)
        assert place.up["server"].process.poll() is None
    assert place.up["server"].process.returncode == 0
