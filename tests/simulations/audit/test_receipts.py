"""`fedtide audit receipts`: an honest run holds, and each change to its folder or registry is a lie with a name."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.ledger import Ledger
from client.site_folder import Site
from common.config import Plan
from common.privacy.mechanisms import PoissonSubsampledGaussian
from common.wire import state_from_bytes, state_to_bytes
from server.privacy_record import Releases
from server.registry import Registry
from server.runs import RunError, RunFolder
from simulations.audit.cli import app
from simulations.audit.receipts import audit_receipts
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run")).run.path


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    copy = tmp_path / honest.name
    shutil.copytree(honest, copy)
    return copy


def command(run: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["receipts", str(run), *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_an_honest_run_holds_and_every_accountant_is_shown(run: Path) -> None:
    code, shown = command(run)
    assert code == 0, shown
    assert "Everything holds" in shown
    code, text = command(run, "--json")
    found = json.loads(text)
    printed = json.loads((run / "privacy.json").read_text())
    assert code == 0
    assert found["verified"] is True
    assert found["epsilon"] == pytest.approx(printed["epsilon"], abs=1e-3)
    for site in found["sites"]:
        figures = site["figures"]
        assert site["receipts"] == site["charges"] == site["released"] == 2
        assert figures["pld"] <= figures["prv"] <= figures["pld"] + 0.02 + 0.001 * figures["pld"]
        assert figures["pld"] <= figures["rdp"]
        assert figures["rdp_google"] == pytest.approx(figures["rdp"], rel=0.05)
        assert site["share"] > 0.5


def test_the_curve_of_epsilon_is_of_what_was_released(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [line["epsilon"] for line in lines if "epsilon" in line]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(json.loads((run / "privacy.json").read_text())["epsilon"])
    released, nothing = Releases(), Releases()
    assert [released.add(RunFolder.finished(run).receipts(number)) for number in (1, 2)] == curve
    assert nothing.add([]) == 0.0


def test_a_run_whose_plan_said_more_than_plans_do_now_is_left_to_its_own_version(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["model"]["frozen_precision"] = "float32"
    (run / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match="Audit the run with the version that made it"):
        audit_receipts(run)


def test_a_run_without_its_registry_is_told_and_another_place_is_taken(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "registry", tmp_path / "elsewhere")
    result = CliRunner().invoke(app, ["receipts", str(run)])
    assert "say where the server's lies with --registry" in str(result.exception)
    assert command(run, "--registry", str(tmp_path / "elsewhere"))[0] == 0
    (tmp_path / "elsewhere" / "server.key").unlink()  # an auditor has no key, and gets none
    assert command(run, "--registry", str(tmp_path / "elsewhere"))[0] == 0
    assert not (tmp_path / "elsewhere" / "server.key").exists()


def test_a_run_of_every_phase_holds(tmp_path: Path) -> None:
    """Statistics, public pre-training between, private fine-tuning, metrics: sums, models and figures."""
    plan = {
        "privacy": {"noise_multiplier": 3.0, "epsilon": 30.0, "sampling_rate": 1.0},
        "statistics": {"popularity_share": 0.2, "transition_share": 0.3},
        "metrics": {"share": 0.1},
        "pretraining": {"histories": 20},
    }
    run = tiny_run(tmp_path, plan=plan).run.path
    found = audit_receipts(run)
    assert not found.lies, found.lies
    assert [site.charges for site in found.sites] == [site.receipts for site in found.sites] == [5] * 4
    assert (run / "rounds" / "00002.pretrained.safetensors").is_file()
    assert found.sites[0].figures is not None
    closed = found.sites[0].figures.closed_form  # nobody is sampled, so the exact figure is known
    assert closed == pytest.approx(found.epsilon, abs=2e-3)
    _scaled(run / "rounds" / "00002.pretrained.safetensors")
    assert {(lie.reason, lie.place) for lie in audit_receipts(run).lies} >= {("wrong_aggregate", "round 3")}
    statistics = run / "rounds" / "00002.released.safetensors"
    _scaled(statistics)
    told = {(lie.reason, lie.place) for lie in audit_receipts(run).lies}
    assert {("wrong_aggregate", "round 2"), ("wrong_aggregate", "round 3")} <= told


def test_a_folder_that_was_renamed_is_a_note_and_no_lie(run: Path) -> None:
    renamed = run.rename(run.with_name("copy-of-the-run"))
    found = audit_receipts(renamed)
    assert not found.lies
    assert "is now called copy-of-the-run" in found.notes[0]


Change = Callable[[Path], object]
LIES: list[tuple[str, str, str, Change]] = []


def lie(name: str, reason: str, place: str) -> Callable[[Change], Change]:
    def keep(change: Change) -> Change:
        LIES.append((name, reason, place, change))
        return change

    return keep


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "receipts.jsonl").read_text().splitlines()]


def _write(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "receipts.jsonl").write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))


def _edited(name: str, reason: str, change: Callable[[dict[str, Any]], object]) -> None:
    def apply(run: Path) -> None:
        lines = _lines(run)
        change(lines[1])
        _write(run, lines)

    lie(name, reason, "receipts.jsonl line 2")(apply)


def _in_receipt(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def change(line: dict[str, Any]) -> None:
        assert old in line["receipt"]
        line["receipt"] = line["receipt"].replace(old, new)

    return change


_edited("sigma edited in the label", "wrong_label", lambda it: it["event"].update(noise_multiplier="4"))
_edited(
    "sigma edited in the receipt",
    "bad_signature",
    _in_receipt('"noise_multiplier":"2"', '"noise_multiplier":"4"'),
)
_edited(
    "a float in the receipt", "float_number", _in_receipt('"noise_multiplier":"2"', '"noise_multiplier":2.0')
)
_edited("delta edited", "wrong_label", lambda it: it.update(delta=1e-6))
_edited("site renamed", "wrong_label", lambda it: it.update(site="site-9"))
_edited("a field more", "malformed_line", lambda it: it.update(users=1042))
_edited(
    "an anchor edited in its line",
    "bad_anchor",
    lambda it: it.update(anchor=it["anchor"].replace('"seq":"2"', '"seq":"1"')),
)


@lie("a line dropped", "missing_receipt", "round 1")
def _(run: Path) -> None:
    _write(run, _lines(run)[1:])


@lie("a line twice", "unlisted_receipt", "round 1")
def _(run: Path) -> None:
    lines = _lines(run)
    _write(run, [lines[0], *lines])


@lie("a line cut short", "malformed_line", "receipts.jsonl line 8")
def _(run: Path) -> None:
    data = (run / "receipts.jsonl").read_bytes()
    (run / "receipts.jsonl").write_bytes(data[:-200])


# Which two lines is chance: files are named by keys, and keys are new in each run.
@lie("two updates swapped", "wrong_digest", "receipts.jsonl line")
def _(run: Path) -> None:
    first, second = sorted((run / "updates").glob("00001-*"))[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@lie("an update replaced", "wrong_digest", "receipts.jsonl line")
def _(run: Path) -> None:
    file = sorted((run / "updates").iterdir())[0]
    state = state_from_bytes(file.read_bytes())
    file.write_bytes(state_to_bytes({name: value * 2 for name, value in state.items()}))


@lie("an update thrown away", "missing_update", "receipts.jsonl line")
def _(run: Path) -> None:
    sorted((run / "updates").iterdir())[0].unlink()


@lie("another model than was sent", "wrong_model", "receipts.jsonl line 1")
def _(run: Path) -> None:
    _scaled(run / "rounds" / "00000.safetensors")


@lie("two items of the catalog swapped", "wrong_catalog", "catalog.jsonl")
def _(run: Path) -> None:
    first, second, *others = (run / "catalog.jsonl").read_bytes().splitlines(keepends=True)
    (run / "catalog.jsonl").write_bytes(b"".join([second, first, *others]))


@lie("something else added to the last round", "wrong_aggregate", "round 2")
def _(run: Path) -> None:
    _scaled(run / "rounds" / "00002.safetensors")


@lie("another final model", "wrong_model", "model.safetensors")
def _(run: Path) -> None:
    _scaled(run / "model.safetensors")


def _scaled(file: Path) -> None:
    state = {name: value + 0.1 for name, value in state_from_bytes(file.read_bytes()).items()}
    file.write_bytes(state_to_bytes(state))


@lie("the plan edited", "wrong_plan", "receipts.jsonl line 1")
def _(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["training"]["learning_rate"] = 0.5
    (run / "plan.json").write_text(json.dumps(plan))


@lie("a smaller epsilon printed", "wrong_epsilon", "privacy.json")
def _(run: Path) -> None:
    said = json.loads((run / "privacy.json").read_text())
    said["sites"][2]["epsilon_pld"] -= 0.002
    (run / "privacy.json").write_text(json.dumps(said))


@lie("a smaller epsilon for the whole run", "wrong_epsilon", "privacy.json")
def _(run: Path) -> None:
    said = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps({**said, "epsilon": said["epsilon"] - 0.002}))


@lie("a charge left out of the record", "wrong_events", "privacy.json")
def _(run: Path) -> None:
    said = json.loads((run / "privacy.json").read_text())
    said["sites"][0]["events"].pop()
    (run / "privacy.json").write_text(json.dumps(said))


@lie("a site left out of the record", "missing_site", "privacy.json")
def _(run: Path) -> None:
    said = json.loads((run / "privacy.json").read_text())
    said["sites"].pop()
    (run / "privacy.json").write_text(json.dumps(said))


@lie("a budget made smaller in the record", "wrong_promise", "privacy.json")
def _(run: Path) -> None:
    said = json.loads((run / "privacy.json").read_text())
    said["sites"][0]["budget_epsilon"] = 1.0
    (run / "privacy.json").write_text(json.dumps(said))


@lie("no record at all", "missing", "privacy.json")
def _(run: Path) -> None:
    (run / "privacy.json").unlink()


@lie("a round left out", "wrong_rounds", "rounds.jsonl")
def _(run: Path) -> None:
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text(lines[0])


def _in_registry(name: str, reason: str, place: str, *changes: str) -> None:
    def apply(run: Path) -> None:
        with sqlite3.connect(run / "registry" / "registry.sqlite") as db:
            for change in changes:
                assert db.execute(change).rowcount > 0

    lie(name, reason, place)(apply)


_KEY = "key_id = (SELECT key_id FROM sites WHERE name = 'site-1')"
_in_registry(
    "an entry of the registry edited",
    "bad_signature",
    "registry, site-1",
    'UPDATE entries SET entry = CAST(replace(CAST(entry AS TEXT), \'"steps":"2"\', \'"steps":"1"\') AS BLOB) '
    f"WHERE {_KEY} AND seq = 1",
)
_in_registry(
    "an entry of the registry deleted",
    "sequence_gap",
    "registry, site-1",
    f"DELETE FROM entries WHERE {_KEY} AND seq = 3",
)
_in_registry(
    "the registry's tail cut off",
    "truncated",
    "registry, site-1",
    f"DELETE FROM entries WHERE {_KEY} AND seq >= 3",
)
_in_registry(
    "the tail cut off with its anchors",
    "truncated",
    "receipts.jsonl line",
    f"DELETE FROM entries WHERE {_KEY} AND seq >= 3",
    f"DELETE FROM anchors WHERE {_KEY} AND seq >= 3",
)
_in_registry(
    "an anchor deleted",
    "missing_anchor",
    "receipts.jsonl line",
    f"DELETE FROM anchors WHERE {_KEY} AND seq = 2",
)
_in_registry(
    "an anchor edited",
    "bad_field",
    "registry, site-1",
    'UPDATE anchors SET countersignature = CAST(replace(CAST(countersignature AS TEXT), \'"signature":"\', '
    f'\'"signature":"00\') AS BLOB) WHERE {_KEY} AND seq = 2',
)
_in_registry(
    "a site struck off", "not_enrolled", "receipts.jsonl line", "DELETE FROM sites WHERE name = 'site-1'"
)
_in_registry(
    "two sites' names swapped",
    "wrong_label",
    "receipts.jsonl line",
    "UPDATE sites SET name = 'tmp' WHERE name = 'site-1'",
    "UPDATE sites SET name = 'site-1' WHERE name = 'site-2'",
    "UPDATE sites SET name = 'site-2' WHERE name = 'tmp'",
)
_in_registry(
    "barred without a proof",
    "wrong_bar",
    "registry, site-1",
    "UPDATE sites SET barred = 1 WHERE name = 'site-1'",
)


@pytest.mark.parametrize(("name", "reason", "place", "change"), LIES, ids=[each[0] for each in LIES])
def test_each_change_is_a_lie_with_a_name(
    name: str, reason: str, place: str, change: Change, run: Path
) -> None:
    change(run)
    code, text = command(run, "--json")
    found = json.loads(text)
    assert code == 1, "it was believed"
    assert found["verified"] is False
    told = [(each["reason"], each["place"]) for each in found["lies"]]
    assert any(said == reason and where.startswith(place) for said, where in told), told


def test_the_lie_is_named_on_the_terminal(run: Path) -> None:
    lines = _lines(run)
    lines[1]["site"] = "evil\x1b[2J"
    _write(run, lines)
    code, shown = command(run)
    assert code == 1
    assert "LIE wrong_label in receipts.jsonl line 2" in " ".join(shown.split())
    assert "\x1b[2J" not in shown
    assert "Everything holds" not in shown


def test_a_burnt_charge_that_came_to_light_later_is_a_note_and_counted(run: Path) -> None:
    """A site that died in the last round tells of it in the next run only."""
    site = Site.load(run / "sites" / "00000")
    registry = Registry(run / "registry")
    with Ledger.open(site.ledger_folder) as ledger:
        last = ledger.status().charges[-1].reserve
        cheap = PoissonSubsampledGaussian(0.01, 50.0, 1)
        lost = ledger.reserve(
            run=last.run,
            round=2,
            attempt=2,
            event=cheap,
            plan_hash=last.plan_hash,
            model_hash=last.model_hash,
            nonce="d" * 32,
            clip_norm=1.0,
            normaliser=1.0,
            learning_rate=1.0,
        )
        ledger.burn(lost)
        registry.accept(registry.chain(ledger.key_id).extended(ledger.entries()))
    found = audit_receipts(run)
    assert not found.lies, found.lies
    first = next(each for each in found.sites if each.site == "site-0")
    assert (first.charges, first.burnt, first.late) == (3, 1, 1)
    assert "1 charges of this run came to light after it had ended" in found.notes[0]
    assert first.figures is not None
    assert first.printed is not None
    assert first.figures.pld >= first.printed


@pytest.mark.parametrize("promised", [8.0, 0.5])
def test_a_run_that_cost_more_than_its_plan_promised_does_not_hold(
    promised: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan whose noise was calibrated for less than it promises: every receipt is sound, and the promise is not."""
    monkeypatch.setattr("common.config.Plan.calibrated", lambda plan: plan)
    outcome = tiny_run(tmp_path, baseline_epochs=0, plan={"privacy": {"epsilon": promised}})
    code, shown = command(outcome.run.path)
    said = " ".join(shown.split())
    broken = promised < 1
    assert (code, "over_promise" in said, "Everything holds" in said) == (int(broken), broken, not broken)
    if broken:
        assert "but the plan promised 0.5; the site's own cap is" in said


@pytest.mark.parametrize("times", [1, 100])
def test_a_plan_that_is_calibrated_for_a_larger_delta_does_not_hold(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told at the larger delta keeps the promise; what was promised, at the plan's own, is not kept."""
    whole = Plan.calibrated

    def sloppy(plan: Plan) -> Plan:
        privacy = plan.privacy.model_copy(update={"delta": times * plan.privacy.delta})
        found = whole(plan.model_copy(update={"privacy": privacy}))
        return found.model_copy(
            update={"privacy": found.privacy.model_copy(update={"delta": plan.privacy.delta})}
        )

    monkeypatch.setattr(Plan, "calibrated", sloppy)
    outcome = tiny_run(
        tmp_path, baseline_epochs=0, plan={"privacy": {"epsilon": 2.0, "noise_multiplier": None}}
    )
    code, shown = command(outcome.run.path)
    said = " ".join(shown.split())
    assert (code, "at delta 1e-05, but the plan promised 2" in said) == (int(times > 1), times > 1)
