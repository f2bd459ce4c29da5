"""A real run before a stranger: docs/verify_receipt.py, alone in a process, on its folder, its registry, its sites."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app as site_app
from server.runs import RunFolder
from simulations.audit.receipts import audit_receipts, registry_of
from tests.common.privacy.strangers_items import VERIFIER, fault, judged
from tests.simulations.audit.test_receipts import LIES
from tests.tiny import tiny_run

UNSEEN = {
    "missing_receipt": "rounds.jsonl tells of it, which is not signed",
    "wrong_model": "model_hash takes Fedtide to recompute",
    "wrong_catalog": "a catalog's digest stands in the plan, which takes Fedtide to read",
    "wrong_aggregate": "sums of updates take the plan",
    "wrong_plan": "plan_hash takes Fedtide to recompute",
    "wrong_epsilon": "privacy.json is not signed; the events are, and the verifier charges them",
    "wrong_events": "privacy.json is not signed",
    "missing_site": "privacy.json is not signed",
    "wrong_promise": "privacy.json is not signed",
    "missing": "privacy.json is not signed",
    "wrong_rounds": "rounds.jsonl is not signed",
    "wrong_bar": "whether a server bars a site is its own mark",
}
"""Lies in a run's folder that no signed statement contradicts, and why."""

UNREADABLE = {"malformed_line", "missing_update"}
"""Lies at which a verifier may as well end because there is nothing to read."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics, updates and metrics of four sites: every kind of mechanism and content."""
    plan = {
        "privacy": {"noise_multiplier": 3.0, "epsilon": 30.0, "sampling_rate": 0.5},
        "statistics": {"popularity_share": 0.2, "transition_share": 0.3},
        "metrics": {"share": 0.1},
    }
    return tiny_run(tmp_path_factory.mktemp("run"), plan=plan).run.path


def stranger(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The verifier as the page says to run it."""
    command = [sys.executable, "-I", str(VERIFIER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_receipt_and_chain_of_a_real_run_is_believed(run: Path) -> None:
    told = stranger(run, registry_of(RunFolder(run)) / "registry.sqlite")
    assert told.returncode == 0, told.stderr
    server = audit_receipts(run).server_key
    assert told.stdout == f"4 chains and 20 receipts hold, countersigned by {server}\n"


def test_the_certificate_of_a_real_site_is_believed_and_a_changed_one_is_not(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "sites" / "00001", tmp_path / "site")
    assert CliRunner().invoke(site_app, ["withdraw", str(tmp_path / "site"), "--yes"]).exit_code == 0
    file = tmp_path / "site" / "closing.json"
    told = stranger(file)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("the certificate holds: closed on 2")
    spent = told.stdout.split(" of ")[0].split()[-1]
    file.write_text(file.read_text().replace(f'"spent": "{spent}"', f'"spent": "{int(spent) - 1}"'))
    told = stranger(file)
    assert told.returncode == 1
    assert told.stderr == "REFUSED: bad_signature\n"
    file.write_text("no certificate")
    assert stranger(file).stderr == "REFUSED: not_canonical\n"
    assert "cannot be read" in stranger(tmp_path / "nothing").stderr


def test_each_lie_in_a_run_is_refused_but_those_that_no_signature_contradicts(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    plain = tiny_run(tmp_path_factory.mktemp("plain")).run.path
    place = registry_of(RunFolder(plain)).relative_to(plain)
    items, reasons = {}, {}
    for number, (name, reason, _, change) in enumerate(LIES):
        folder = tmp_path / str(number) / plain.name
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("histories"))
        change(folder)
        items[name] = {"kind": "run", "run": str(folder), "registry": str(folder / place / "registry.sqlite")}
        reasons[name] = fault(reason)
    told = judged(tmp_path, items)
    believed = {name for name, said in told.items() if not said}
    assert {reasons[name] for name in believed} == set(UNSEEN)
    for name in set(told) - believed:
        may_say = (reasons[name], *(["unreadable"] if reasons[name] in UNREADABLE else []))
        assert told[name].startswith(may_say), (name, told[name])
