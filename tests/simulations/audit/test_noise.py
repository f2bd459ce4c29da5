"""`fedtide audit noise`: honest runs hold, sabotaged trainers do not, damaged folders are said in a line."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.cli import main
from common.models.interface import InterestModel
from common.privacy.noise import GaussianNoise
from common.wire import state_from_bytes, state_to_bytes
from common.witness import is_witness
from server.runs import RunFolder
from simulations.audit.conformance.sabotages import SABOTAGES
from simulations.audit.evidence import read_evidence
from simulations.audit.noise import audit_noise
from simulations.audit.trainers import ChangedNoise, Trainer
from simulations.audit.witnesses import claimed_deviation, read_witnesses
from tests.simulations.audit.liars import TRAINERS, draws, noise_times
from tests.simulations.audit.noise_cases import PLACES, made_run, made_run_of_sums, plan_of
from tests.tiny import tiny_run


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path, *more: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fedtide", "audit", "noise", str(run), *more])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def every_phase(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole federation of four sites: popularity, transitions, two rounds, metrics."""
    plan = {
        "statistics": {"popularity_share": 0.1, "transition_share": 0.2},
        "metrics": {"share": 0.1},
        "privacy": {"noise_multiplier": None},
    }
    return tiny_run(tmp_path_factory.mktemp("run"), plan=plan).run.path


def test_every_release_of_an_honest_run_holds(
    every_phase: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = command(monkeypatch, capsys, every_phase)
    assert code == 0, shown
    assert "Everything holds" in shown
    found = read_evidence(every_phase / "audit" / "noise.json")
    assert found.holds
    assert (every_phase / "audit" / "noise.svg").read_text().startswith("<?xml")
    assert found.parameters["releases"] == 4 * 5
    for points in found.series["sites"].values():
        assert [point["round"] for point in points] == [1, 2, 3, 4, 5]
        phases = [point["phase"] for point in points]
        assert phases == ["popularity", "transitions", "update", "update", "metrics"]
        for point in points:
            assert point["low"] == pytest.approx(1 - 3 / math.sqrt(2 * PLACES))
            assert 0.7 < point["ratio"] < 1.3
    assert abs(found.series["correlations"]["between"]["correlation"]) < 0.5
    code, text, _ = command(monkeypatch, capsys, every_phase, "--json")
    assert code == 0
    assert json.loads(text)["holds"] is True


def test_the_server_keeps_the_witness_of_sums_out_of_what_it_sends(every_phase: Path) -> None:
    run = RunFolder(every_phase)
    assert run.released_state()
    assert not any(is_witness(name) for name in run.released_state())
    kept = next(file for file in sorted((every_phase / "updates").iterdir()) if "00001" in file.name)
    assert any(is_witness(name) for name in state_from_bytes(kept.read_bytes()))


def nine_tenths() -> Trainer:
    return noise_times(0.9)


def rest_alone(model: InterestModel) -> slice:
    """Where the witness is not: it is the last of the parameters."""
    return slice(0, sum(p.numel() for p in model.trainable().values()) - PLACES)


def a_layer(model: InterestModel) -> slice:
    """One layer's weights."""
    start = 0
    for name, parameter in model.trainable().items():
        if name == "core.input_map.weight":
            return slice(start, start + parameter.numel())
        start += parameter.numel()
    raise AssertionError("the model has another core")


def silent(where: Callable[[InterestModel], slice]) -> Trainer:
    def of(noise: GaussianNoise, model: InterestModel) -> GaussianNoise:
        def change(normals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            normals[where(model)] = 0.0
            return normals

        return ChangedNoise(noise, change)

    return draws(noise_of=of)


CAUGHT: dict[str, tuple[Callable[[], Trainer], int, str]] = {
    "noise off": (lambda: TRAINERS["noise off"], 2, "level"),
    "a tenth": (lambda: TRAINERS["a tenth of the noise"], 2, "level"),
    "half": (lambda: TRAINERS["half the noise"], 2, "level"),
    "nine tenths over twenty rounds": (nine_tenths, 20, "level-by-site"),
    "same seed": (lambda: TRAINERS["same seed"], 3, "repeat"),
    "one draw for all steps": (lambda: TRAINERS["one draw"], 2, "level"),
    "another normaliser": (lambda: TRAINERS["counted normaliser"], 3, "level"),
    "a loss in the update": (lambda: TRAINERS["loss in the update"], 2, "outlier"),
    "no noise in the witness": (
        lambda: silent(lambda model: slice(rest_alone(model).stop, None)),
        2,
        "level",
    ),
    "noise in the witness alone": (lambda: silent(rest_alone), 2, "rest"),
    "no noise in one layer": (lambda: silent(a_layer), 2, "rest"),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_liar_is_caught_from_its_updates(name: str, tmp_path: Path) -> None:
    trainer, rounds, question = CAUGHT[name]
    found = audit_noise(made_run(tmp_path / "run", trainer(), rounds=rounds))
    assert not found.holds
    assert question in {check.name for check in found.checks if not check.holds}


DRAWN_OTHERWISE = {"last draw turned": "places", "four uniforms": "tails", "cut at three": "tails"}


@pytest.mark.parametrize("name", DRAWN_OTHERWISE)
def test_a_generator_that_draws_otherwise_is_caught_from_its_updates(name: str, tmp_path: Path) -> None:
    with SABOTAGES[name].at_work():
        found = audit_noise(made_run(tmp_path / "run", sites=5, rounds=10, steps=1, users=2))
    assert DRAWN_OTHERWISE[name] in {check.name for check in found.checks if not check.holds}


def test_sums_are_looked_at_for_noise_beside_the_grid(tmp_path: Path) -> None:
    def grid(run: Path) -> list[bool]:
        return [check.holds for check in audit_noise(run).checks if check.name == "grid"]

    assert grid(made_run_of_sums(tmp_path / "honest")) == [True]
    with SABOTAGES["noise in float32"].at_work():
        assert grid(made_run_of_sums(tmp_path / "run")) == [False]
    assert grid(made_run(tmp_path / "updates", rounds=1)) == []  # parameters have rounded them


def test_the_honest_trainer_holds_by_the_same_road(tmp_path: Path) -> None:
    found = audit_noise(made_run(tmp_path / "run", rounds=20))
    assert found.holds, [check for check in found.checks if not check.holds]


def test_the_claimed_level_is_the_plans_formula() -> None:
    plan = plan_of(2, clip_norm=0.3, sampling_rate=0.25)
    claimed = claimed_deviation(plan, plan.schedule()[0])
    assert claimed == pytest.approx(0.5 * 1.001 * 2.0 * 0.3 / (0.25 * 15) * math.sqrt(2))


def edited(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = sorted((run / "updates").iterdir())[0]
    state = state_from_bytes(file.read_bytes())
    change(state)
    file.write_bytes(state_to_bytes(state))


def fill(state: dict[str, torch.Tensor], value: float) -> None:
    state["witness"][3] = value


def cut_plan(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["privacy"]["witness_places"] = 0
    (run / "plan.json").write_text(json.dumps(plan))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an update is gone": (
        lambda run: sorted((run / "updates").iterdir())[0].unlink(),
        "round 1, site site-0: its release cannot be read (FileNotFoundError)",
    ),
    "an update is cut": (
        lambda run: sorted((run / "updates").iterdir())[0].write_bytes(b"\x10"),
        "round 1, site site-0: its release cannot be read",
    ),
    "no witness": (lambda run: edited(run, lambda s: s.pop("witness")), "no witness of 256 places"),
    "a short witness": (
        lambda run: edited(run, lambda s: s.update(witness=s["witness"][:9].clone())),
        "no witness of 256 places",
    ),
    "not a number": (lambda run: edited(run, lambda s: fill(s, math.nan)), "not finite"),
    "a receipt is gone": (
        lambda run: (run / "receipts.jsonl").write_text(
            (run / "receipts.jsonl").read_text().split("\n", 1)[1]
        ),
        "round 1, site site-0: it was admitted, but has no receipt",
    ),
    "a round too many": (
        lambda run: (run / "rounds.jsonl").write_text('{"round": 9, "admitted": ["x"]}\n'),
        "the plan has no such round",
    ),
    "nothing admitted": (
        lambda run: (run / "rounds.jsonl").write_text(""),
        "no release was admitted in this run yet",
    ),
    "no witness in the plan": (cut_plan, "privacy.witness_places = 0"),
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("short") / "run", rounds=1)


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_missing_or_damaged_does_not_hold_and_is_named(
    name: str, short: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short, run)
    assert audit_noise(run).holds
    damage, said = FAULTS[name]
    damage(run)
    found = audit_noise(run)
    (kept,) = [check for check in found.checks if check.name == "kept"]
    assert not found.holds
    assert not kept.holds
    assert said in kept.says


@pytest.mark.parametrize("file", ["rounds.jsonl", "receipts.jsonl", "plan.json"])
@pytest.mark.parametrize("text", ["{}\n", "nonsense\n", "[1]\n"])
def test_a_folder_that_cannot_be_read_is_one_line_and_code_2(
    file: str,
    text: str,
    short: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short, run)
    (run / file).write_text(text)
    if (file, text) == ("plan.json", "{}\n"):
        text = "an empty plan is a plan, but not calibrated"
    code, shown, errors = command(monkeypatch, capsys, run)
    assert (code, shown) == (2, ""), (code, shown, errors)
    assert errors.count("\n") == 1
    assert "error: " in errors


def test_no_run_at_all_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = command(monkeypatch, capsys, tmp_path / "nowhere")
    assert code == 2
    assert errors.count("\n") == 1
    assert "there is no run in" in errors


def test_a_liar_makes_the_command_fail_and_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run", TRAINERS["same seed"], rounds=2)
    code, shown, _ = command(monkeypatch, capsys, run)
    assert code == 1
    assert "FAILS" in shown
    assert "a seed or a" in shown
    assert not read_evidence(run / "audit" / "noise.json").holds


def test_a_sites_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", rounds=1)
    for file in ("rounds.jsonl", "receipts.jsonl"):
        said = (run / file).read_text().replace("site-0", "\\u001b[31m[bold]x")
        (run / file).write_text(said)
    names = {release.site for release in read_witnesses(run).releases}
    assert names == {"?[31m[bold]x", "site-1"}
