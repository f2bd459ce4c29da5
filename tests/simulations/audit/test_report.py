"""The auditor's report: it says what held, what did not and what nobody ran, and an auditor makes the same page."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import sqlite3
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import NormalDist
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import common.privacy.chain
from client.ledger import Ledger
from client.ledger_reading import LedgerStatus
from client.site_folder import Site
from common.cli import main
from common.privacy.entries import Genesis, Reserve
from common.privacy.mechanisms import GaussianSum, PoissonSubsampledGaussian
from common.privacy.odds import odds, percent
from common.privacy.spending import Spending, up_to
from server.registry import Registry
from simulations.audit.cli import app
from simulations.audit.evidence import TOOLS, Check
from simulations.audit.full import run_tools
from simulations.audit.pack import pack
from simulations.audit.page import page, prose
from simulations.audit.report import Report, build_report, holds
from simulations.audit.report_tools import COMMANDS
from tests.common.privacy.direct_accounting import by_dp_accounting
from tests.simulations.audit import report_cases
from tests.simulations.audit.report_cases import write_evidence
from tests.tiny import tiny_run

PLAN = {
    "privacy": {"noise_multiplier": 3.0, "epsilon": 30.0, "sampling_rate": 1.0},
    "statistics": {"popularity_share": 0.2},
    "training": {"rounds": 1, "steps_per_round": 1},
}
ROUNDS = 2
HOUSE = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run"), plan=PLAN, site_budget=15.0).run.path


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    copy = tmp_path / honest.name
    shutil.copytree(honest, copy)
    return copy


@pytest.fixture(scope="module")
def whole(honest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """Report and page of a run on which every tool was run, and found nothing."""
    copy = tmp_path_factory.mktemp("whole") / honest.name
    shutil.copytree(honest, copy)
    write_evidence(copy)
    report = build_report(copy)
    return report, page(report)


def command(run: Path, *more: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, page and JSON."""
    html, data = run.parent / "report.html", run.parent / "report.json"
    result = CliRunner().invoke(app, ["report", str(run), "-o", str(html), "--json", str(data), *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, html.read_text(encoding="utf-8"), json.loads(data.read_text())


def undated(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name != "made"}


def test_where_all_was_run_and_held_the_page_says_so(whole: tuple[Report, str]) -> None:
    report, html = whole
    assert report.verdict == "held"
    assert holds(report)
    assert "The privacy promise held" in html
    assert html.count("✓ held") == 1 + len(TOOLS)
    for place, title in enumerate(("Promise", "Epsilon and delta", "Unit of privacy", "Adjacency"), start=1):
        assert f'<section id="item-{place}">' in html
        assert f"{title}</h2>" in html
    assert len(re.findall(r'<section id="item-\d+">', html)) == 14


def test_the_page_needs_nothing_from_anywhere(whole: tuple[Report, str]) -> None:
    html = whole[1]
    addresses = set(re.findall(r"""(?:https?:)?//[^\s"'<)]+""", html))
    assert addresses <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # names, never asked for
    assert not re.search(r"<script|<link rel=\"(?!icon)|@import|<iframe|<img|url\((?!#)", html)


def test_every_chart_is_there_well_formed_and_named(whole: tuple[Report, str]) -> None:
    html = whole[1]
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawn) == 6
    for text in drawn:
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img"
        for name in str(root.get("aria-labelledby")).split():
            [label] = [each for each in root.iter() if each.get("id") == name]
            assert label.text
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "ids clash"
    for target in re.findall(r'(?:url\(|href=")#([^")]+)', html):
        assert target in ids


def test_json_says_the_same_as_the_page(whole: tuple[Report, str]) -> None:
    report, html = whole
    said = report.as_json()
    json.dumps(said, allow_nan=False)
    for ledger in said["ledgers"]:
        assert ledger["head"] in html
        assert len(ledger["by_round"]) == ROUNDS
    for digest in [*said["digests"].values(), said["plan_digest"], said["code"]]:
        assert digest in html
    for line in [*said["not_protected"], *said["unverified"], *said["sentences"].values()]:
        assert str(prose(line)) in html
    assert {f"{site['figures']['pld']:.4f}" for site in said["sites"]} <= set(re.findall(r"\d+\.\d{4}", html))


@pytest.mark.parametrize("missing", TOOLS)
def test_a_tool_that_was_not_run_is_never_a_tick(missing: str, whole: tuple[Report, str]) -> None:
    report = whole[0]
    tools = [
        replace(tool, state="not run", evidence=None) if tool.name == missing else tool
        for tool in report.tools
    ]
    html = page(replace(report, tools=tools))
    row = re.search(rf"<tr><td>{missing}</td>.*?</tr>", html, flags=re.DOTALL)
    assert row is not None
    assert "– not run" in row.group()
    assert COMMANDS[missing] in row.group()
    assert "✓" not in row.group()
    assert html.count("✓ held") == len(TOOLS)  # fmt: skip


def test_without_any_tool_nothing_is_called_held(run: Path) -> None:
    code, html, said = command(run)
    assert code == 0
    assert said["verdict"] == "not fully checked"
    assert "Not fully checked" in html
    assert "promise held" not in html
    assert "Nobody has tried to refute the claim yet" in said["sentences"]["held"]
    write_evidence(run, "conformance", "noise", "canary")
    code, _, said = command(run)
    assert (code, said["verdict"]) == (0, "not fully checked")
    assert "Still to be run: attack" in said["sentences"]["held"]


def test_an_auditor_with_the_folder_alone_makes_the_same_report(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_evidence(run)
    there = undated(command(run)[2])
    place = tmp_path / "auditor" / run.name
    pack(run, place)
    shutil.rmtree(run)

    def no_network(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("FEDTIDE_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    code, html, here = command(place)
    assert (code, undated(here)) == (0, there)
    assert "The privacy promise held" in html
    assert not (tmp_path / "nothing").exists()


Change = Callable[[Path], None]


def _edit(file: str, old: str, new: str) -> Change:
    def change(run: Path) -> None:
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new))

    return change


def _privacy(run: Path) -> None:
    said = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps({**said, "epsilon": said["epsilon"] - 0.01}))


def _registry(run: Path) -> None:
    with sqlite3.connect(run / "registry" / "registry.sqlite") as db:
        assert db.execute("DELETE FROM entries WHERE seq = 2").rowcount > 0


EDITS: dict[str, tuple[Change, str]] = {
    "a receipt": (_edit("receipts.jsonl", '\\"round\\":\\"2\\"', '\\"round\\":\\"3\\"'), "bad_signature"),
    "sigma in the receipts": (
        _edit("receipts.jsonl", '\\"noise_multiplier\\":\\"3\\"', '\\"noise_multiplier\\":\\"4\\"'),
        "bad_signature",
    ),
    "sigma in the plan": (_edit("plan.json", '"noise_multiplier": 3.0', '"noise_multiplier": 4.0'), "wrong_plan"),
    "the plan": (_edit("plan.json", '"learning_rate": 2.0', '"learning_rate": 1.0'), "wrong_plan"),
    "the registry": (_registry, "sequence_gap"),
    "privacy.json": (_privacy, "wrong_epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_the_record_did_not_hold_and_is_named(name: str, run: Path) -> None:
    write_evidence(run)
    change, reason = EDITS[name]
    change(run)
    code, html, said = command(run)
    assert code == 1
    assert said["verdict"] == "did not hold"
    assert "The privacy promise did not hold" in html
    assert "promise held" not in html
    assert f"<code>{reason}</code>" in html
    assert reason in {lie["reason"] for lie in said["lies"]}


def test_evidence_that_fails_misses_or_is_about_something_else_never_holds(
    run: Path, whole: tuple[Report, str]
) -> None:
    write_evidence(run)
    record = (run / "receipts.jsonl").read_bytes()
    report_cases.noise(0.5).write(run)
    code, html, said = command(run)
    assert (code, said["verdict"]) == (1, "did not hold")
    assert "noise: noise level" in html
    assert "succeeded (noise)" in said["sentences"]["held"]

    sound = report_cases.noise()
    missed = Check("noise level", "half noise", 1.0, "caught", False, "not seen", control=True)
    replace(sound, checks=[*sound.checks, missed]).write(run)
    code, html, said = command(run)
    assert (code, said["verdict"]) == (1, "not fully checked")
    assert "✗ not to be relied upon" in html

    sound.write(run)
    (run / "audit" / "canary.json").write_text("{}")
    (run / "receipts.jsonl").write_bytes(record[:-1])  # the same receipts, and other bytes
    states = {tool["tool"]: tool["state"] for tool in command(run)[2]["tools"]}
    assert states == {**dict.fromkeys(TOOLS, "out of date"), "canary": "unreadable"}

    (run / "receipts.jsonl").write_bytes(record)
    replace(sound, checks=[missed]).write(run)
    assert build_report(run).tools[1].state == "blind"
    replace(sound, checks=[]).write(run)
    assert build_report(run).tools[1].state == "unreadable"


def test_a_tool_that_planted_no_fault_is_not_believed(run: Path) -> None:
    write_evidence(run)
    found = report_cases.conformance()
    replace(found, checks=[check for check in found.checks if not check.control]).write(run)
    code, html, said = command(run)
    assert (code, said["verdict"]) == (0, "not fully checked")
    assert said["tools"][0]["state"] == "no fault planted"
    assert "– no fault planted" in html


def test_names_and_evidence_are_text_and_nothing_else(run: Path) -> None:
    evil = "<script>alert('x')</script>\x1b[2J$x^2$"
    with sqlite3.connect(run / "registry" / "registry.sqlite") as db:
        db.execute("UPDATE sites SET name = ? WHERE name = 'site-1'", (evil,))
    found = report_cases.attack()
    series = {
        "roc": {evil: {evil: [[0.001, 0.5], [math.nan, 1.0], [1.0, 1.0]]}},
        "recovery": [{"variant": evil, "sigma": 1.0, "precision": 0.5, "chance": 0.1}],
    }
    check = Check(evil, evil, math.nan, evil, True, evil)
    replace(found, checks=[check], series=series, limits=[evil], parameters={evil: evil}).write(run)
    code, html, said = command(run)
    assert code == 1, "a site is called otherwise than its receipts say"
    assert "<script" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;alert(" in html
    for text in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(text)
    assert said["tools"][3]["evidence"]["checks"][0]["measured"] is None


def test_figures_that_are_missing_or_odd_leave_the_page_whole(run: Path) -> None:
    for found in (report_cases.noise(), report_cases.canary(), report_cases.attack()):
        replace(found, series={"sites": {"a": [{"round": 1}]}, "rounds": [3], "roc": []}).write(run)
    html = command(run)[1]
    assert html.count("There is nothing to draw") == 4
    assert len(re.findall("<svg", html)) == 2


def test_a_burnt_charge_is_on_the_page(run: Path) -> None:
    site = Site.load(run / "sites" / "00000")
    registry = Registry(run / "registry")
    with Ledger.open(site.ledger_folder) as ledger:
        last = ledger.status().charges[-1].reserve
        lost = ledger.reserve(
            run=last.run, round=2, attempt=2, event=PoissonSubsampledGaussian(0.01, 50.0, 1),
            plan_hash=last.plan_hash, model_hash=last.model_hash, nonce="d" * 32, clip_norm=1.0, normaliser=1.0,
            learning_rate=1.0,
        )  # fmt: skip
        ledger.burn(lost)
        registry.accept(registry.chain(ledger.key_id).extended(ledger.entries()))
    code, html, said = command(run)
    assert code == 0
    [first] = [ledger for ledger in said["ledgers"] if ledger["site"] == "site-0"]
    assert [charge["outcome"] for charge in first["charges"]] == ["released", "released", "burnt"]
    assert "burnt: charged, nothing released" in html
    assert "site-0: 1 charges burnt, 0 still open." in html


def another_run(run: Path, outcome: str = "released") -> LedgerStatus:
    """What the first site's ledger comes to after a charge of another run, of which the server has the receipt."""
    site = Site.load(run / "sites" / "00000")
    registry = Registry(run / "registry")
    with Ledger.open(site.ledger_folder) as ledger:
        last = ledger.status().charges[-1].reserve
        more = ledger.reserve(
            run="another-run", round=1, attempt=0, event=PoissonSubsampledGaussian(0.5, 1.5, 3),
            plan_hash=last.plan_hash, model_hash=last.model_hash, nonce="e" * 32, clip_norm=1.0, normaliser=1.0,
            learning_rate=1.0,
        )  # fmt: skip
        if outcome == "released":
            ledger.release(more, b"noise")
        else:
            ledger.burn(more)
        registry.accept(registry.chain(ledger.key_id).extended(ledger.entries()))
        return ledger.status()


@pytest.mark.parametrize("outcome", ["released", "burnt"])
def test_the_page_says_what_is_from_this_run_and_beside_it_what_all_runs_come_to(
    run: Path, outcome: str
) -> None:
    status = another_run(run, outcome)
    code, html, said = command(run)
    assert code == 0
    sentences = said["sentences"]
    assert "from this run" in sentences["promised"]
    assert "all that left" not in html
    pld = by_dp_accounting(status.events, status.genesis.delta)
    [ledger] = [each for each in said["ledgers"] if each["site"] == "site-0"]
    spent = ledger["spending"]
    assert spent["epsilon_pld"] == pytest.approx(pld, abs=2e-3)
    assert (spent["runs"], spent["charges"]) == (2, len(status.charges))
    assert spent["epsilon_pld"] > said["epsilon"] + 0.05, "this run alone comes to less"
    assert spent["best_guess_right"] > said["odds"]["right"] + 0.005
    assert "at site-0, whose ledger holds 2 runs, epsilon so far is" in sentences["over all runs"]
    for figure in (up_to(spent["epsilon_pld"]), up_to(spent["epsilon_filter"])):
        assert figure in sentences["over all runs"]
        assert f'<td class="n">{figure}</td>' in html
    assert percent(spent["best_guess_right"]) in sentences["over all runs"]
    others = {each["spending"]["epsilon_pld"] for each in said["ledgers"] if each["site"] != "site-0"}
    assert others == {said["epsilon"]}


def test_a_page_that_counts_one_run_for_all_is_noticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the test above is about, planted: what one run charged, said of all."""
    status = another_run(run)
    honest = common.privacy.chain.spending

    def one_run(genesis: Genesis, reserves: Sequence[Reserve], _: int) -> Spending:
        kept = [reserve for reserve in reserves if reserve.run != "another-run"]
        return honest(genesis, kept, sum(reserve.charge for reserve in kept))

    monkeypatch.setattr("common.privacy.chain.spending", one_run)
    pld = by_dp_accounting(status.events, status.genesis.delta)
    [ledger] = [each for each in build_report(run).as_json()["ledgers"] if each["site"] == "site-0"]
    assert ledger["spending"]["epsilon_pld"] < pld - 0.05


def test_the_dotted_line_is_the_brake_of_all_runs(run: Path) -> None:
    before = another_run(run)
    registry, site = Registry(run / "registry"), Site.load(run / "sites" / "00000")
    with Ledger.open(site.ledger_folder) as ledger:
        last = before.charges[0].reserve
        ledger.release(
            ledger.reserve(
                run=last.run, round=2, attempt=7, event=GaussianSum(50.0), plan_hash=last.plan_hash,
                model_hash=last.model_hash, nonce="f" * 32, clip_norm=1.0, normaliser=1.0,
            ), b"noise",
        )  # fmt: skip
        registry.accept(registry.chain(ledger.key_id).extended(ledger.entries()))
        spent = ledger.status().spending()
    [ledger_said] = [each for each in command(run)[2]["ledgers"] if each["site"] == "site-0"]
    assert ledger_said["by_round"][-1]["filter"] == pytest.approx(spent.by_filter)


def _all_runs(name: str, change: float) -> Change:
    def edit(run: Path) -> None:
        said = json.loads((run / "privacy.json").read_text())
        said["sites"][0]["over_all_runs"][name] += change
        (run / "privacy.json").write_text(json.dumps(said))

    return edit


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("epsilon_pld", -0.1),
        ("epsilon_filter", -0.1),
        ("charges", -1),
        ("seen_until_entry", -3),
        ("seen_until_entry", 9),
    ],
)
def test_an_edit_of_what_all_runs_came_to_is_named(run: Path, name: str, change: float) -> None:
    _all_runs(name, change)(run)
    code, _, said = command(run)
    assert code == 1
    assert "wrong_epsilon" in {lie["reason"] for lie in said["lies"]}


def test_odds_are_the_exact_ones_from_above() -> None:
    normal, power = NormalDist(), 1 / 1.3
    found = odds([GaussianSum(1.3)])
    right = normal.cdf(power / 2)
    assert right <= found.right <= right + 1e-3
    for rate in (0.01, 0.001):
        exact = normal.cdf(normal.inv_cdf(rate) + power)
        assert exact <= found.found[f"{rate:g}"] <= 1.05 * exact
    blatant = odds([GaussianSum(0.1)])
    assert blatant.right > 0.9999


def test_bad_input_is_one_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "plan.json").write_text("{")
    for folder, said in ((tmp_path / "nowhere", "there is no run in"), (run, "cannot be parsed")):
        with pytest.raises(SystemExit) as end:
            main(["audit", "report", str(folder), "-o", str(tmp_path / "none.html")])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "none.html").exists()


def test_a_tool_that_stops_leaves_the_others_to_go_on(tmp_path: Path) -> None:
    from rich.console import Console

    from simulations.audit.full import tools

    console = Console(record=True, width=200)
    assert run_tools(tmp_path, console) == list(tools())  # none can do anything without a run
    assert console.export_text().count("stopped (RunError): there is no run in") == len(tools())


def test_an_installed_fedtide_has_the_page() -> None:
    """What stands beside the modules and is no module is packaged only where pyproject.toml says so."""
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())
    for folder, least in (("common", "page.css"), ("simulations/audit", "page.html.j2")):
        patterns = project["tool"]["setuptools"]["package-data"][folder.replace("/", ".")]
        files = [
            each.name
            for each in (HOUSE / folder).iterdir()
            if each.is_file() and each.suffix != ".py" and each.name != "py.typed"
        ]
        assert least in files
        assert not [name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)]
