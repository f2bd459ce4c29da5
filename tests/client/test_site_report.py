"""A site's own page: over all its runs, from its ledger alone, in words, and nothing of a fault left unsaid."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client.cli import app
from client.ledger import Ledger
from client.ledger_reading import LedgerStatus
from client.site_page import page
from client.site_report import site_report
from common.pages import text
from common.privacy.accountants import ContradictionError
from common.privacy.mechanisms import PoissonSubsampledGaussian
from common.privacy.odds import percent
from common.privacy.spending import up_to
from tests.client.test_spending import CHARGES, EVERY, SERVERS, charge, countersigned, no_burnt, one_run
from tests.common.privacy.direct_accounting import by_dp_accounting

STEPS = PoissonSubsampledGaussian(0.05, 1.5, 10)


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with two runs of two servers, charges burnt and open, and all that may lie in its folder."""
    folder = tmp_path_factory.mktemp("made") / "north"
    folder.mkdir(mode=0o700)
    (folder / "site.json").write_text(json.dumps({"name": "north <b>", "catalog": "catalog.jsonl"}))
    for name in ("histories", "lower-states"):
        (folder / name).mkdir()
        (folder / name / "users").write_text("of users")
    (folder / "secret").write_text("of users")
    with Ledger.create(folder / "ledger", epsilon=8, delta=1e-6, typical_plan=[STEPS] * 20) as ledger:
        for number, (run, event, outcome) in enumerate(CHARGES):
            charge(ledger, number, run, event, outcome)
            if outcome == "released":
                countersigned(ledger, SERVERS[run == "run-b"])
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "north"))


def key(server: Ed25519PrivateKey) -> str:
    return server.public_key().public_bytes_raw().hex()


def test_what_was_spent_is_over_all_runs_burnt_charges_included(folder: Path, tmp_path: Path) -> None:
    told = report(folder, "--json", "-o", tmp_path / "page.html")
    assert told.exit_code == 0, told.output
    said, html = json.loads(told.output), (tmp_path / "page.html").read_text()
    spent = said["spent"]
    assert spent["epsilon_pld"] == pytest.approx(by_dp_accounting(EVERY, 1e-6), abs=2e-3)
    assert spent["epsilon_pld"] < spent["epsilon_filter"] < 8
    assert (spent["runs"], spent["charges"]) == (2, len(CHARGES))
    assert said["charges"] == {"all": 6, "burnt": 2, "open": 1}
    for figure in (spent["epsilon_pld"], spent["epsilon_filter"], spent["epsilon_rdp"], spent["epsilon_prv"]):
        assert up_to(figure) in html
    assert f"right at most {text(percent(spent['best_guess_right']))} of the time" in html
    for sentence in said["sentences"].values():
        assert text(sentence) in html
    assert "over all runs, models and servers" in said["sentences"]["promised"]
    assert said["left"]["share"] == pytest.approx(1 - spent["share"])


@pytest.mark.parametrize("view", [one_run, no_burnt])
def test_a_page_that_forgot_charges_would_be_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, view: Callable[[LedgerStatus], LedgerStatus]
) -> None:
    honest = Ledger.status
    monkeypatch.setattr(Ledger, "status", lambda ledger: view(honest(ledger)))
    with pytest.raises(ContradictionError, match="no epsilon is computed from a part of a ledger"):
        site_report(folder)


def test_it_says_to_whom_by_the_keys_that_countersigned_and_on_what_days(folder: Path) -> None:
    said = json.loads(report(folder, "--json").output)
    first, second = key(SERVERS[0]), key(SERVERS[1])
    assert {each["key"]: each["runs"] for each in said["servers"]} == {first: ["run-a"], second: ["run-b"]}
    runs = {each["run"]: each for each in said["runs"]}
    assert runs["run-a"]["servers"] == [first]
    assert (runs["run-a"]["statistics"], runs["run-a"]["updates"], runs["run-a"]["burnt"]) == (1, 1, 1)
    assert (runs["run-b"]["updates"], runs["run-b"]["burnt"], runs["run-b"]["open"]) == (1, 1, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", runs["run-b"]["last_day"])
    assert sum(each["share"] for each in said["runs"]) == pytest.approx(said["spent"]["share"])
    with Ledger.open(folder / "ledger") as ledger:
        charge(ledger, 50, "run-c", STEPS, "released")
    assert json.loads(report(folder, "--json").output)["runs"][-1]["servers"] == []
    assert "not countersigned yet" in page(site_report(folder))


def test_a_new_site_has_spent_nothing(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "ledger", epsilon=8, delta=1e-6, typical_plan=[STEPS]).disconnect()
    found = site_report(tmp_path)
    html = page(found)
    assert "Nothing so far: no run was ever charged here" in html
    assert "Nothing was released to anyone" in html
    assert found.as_json()["spent"]["epsilon_filter"] == 0
    assert "nan" not in html


def test_a_withdrawal_is_said_and_the_command_given_leaves_nothing_of_users(folder: Path) -> None:
    assert "First withdraw" in page(site_report(folder))
    assert CliRunner().invoke(app, ["status", str(folder)]).exception is not None, (
        "no policy: the page needs none"
    )
    with Ledger.open(folder / "ledger") as ledger:
        ledger.withdraw()
    said = json.loads(report(folder, "--json").output)
    assert said["withdrawn"] is not None
    assert said["charges"]["open"] == 0
    assert "The site has withdrawn" in page(site_report(folder))
    assert said["sentences"]["left"].startswith("Nothing: the site withdrew on")
    users = {each["name"] for each in said["on_disk"] if each["users"] and each["there"]}
    assert users == {"histories", "lower-states", "secret"}
    subprocess.run(["bash", "-c", said["deletion"]], check=True)
    assert not [each for each in folder.rglob("*") if each.is_file() and b"of users" in each.read_bytes()]
    after = json.loads(report(folder, "--json").output)
    assert not any(each["users"] and each["there"] for each in after["on_disk"])
    assert after["spent"] == said["spent"], "the ledger stays"


def test_what_nobody_knows_in_the_folder_is_to_be_looked_at(folder: Path) -> None:
    (folder / "export of users.csv").write_text("1")
    [odd] = [
        each for each in json.loads(report(folder, "--json").output)["on_disk"] if "export" in each["name"]
    ]
    assert (odd["users"], odd["after"]) == (True, "look at it")


def test_a_ledger_that_does_not_verify_gets_no_page(folder: Path, tmp_path: Path) -> None:
    with sqlite3.connect(folder / "ledger" / "ledger.sqlite") as db:
        (data,) = db.execute("SELECT entry FROM entries WHERE seq = 1").fetchone()
        db.execute("DROP TRIGGER entries_no_update")
        db.execute("UPDATE entries SET entry = ? WHERE seq = 1", (data.replace(b'"6"', b'"9"'),))
    told = report(folder, "-o", tmp_path / "page.html")
    assert told.exit_code == 1
    assert "FAULT bad_signature" in told.output
    assert not (tmp_path / "page.html").exists()


def test_where_there_is_no_site_it_is_said_in_one_line(tmp_path: Path) -> None:
    told = report(tmp_path)
    assert "there is no ledger in" in str(told.exception)


def test_the_page_needs_nothing_from_anywhere_and_names_are_text(folder: Path) -> None:
    html = page(site_report(folder))
    assert set(re.findall(r"""(?:https?:)?//[^\s"'<)]+""", html)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<link rel=\"(?!icon)|@import|<iframe|<img|url\((?!#)", html)
    assert "north &lt;b&gt;" in html
    assert "<b>" not in html
    [chart] = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    root = ElementTree.fromstring(chart)
    assert root.get("role") == "img"
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert html.count("<table>") == html.count("</table>")


def test_many_runs_stay_readable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.site_page._MOST", 1)
    html = page(site_report(folder))
    assert "The last 1 of 2 runs." in html
    assert "<tr><td>run-b</td>" in html
    assert "<tr><td>run-a</td>" not in html
