"""Honest code passes; every liar is refused by the check that is meant to see it; and each check can fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.models.names import FAMILIES
from simulations.audit.cli import app
from simulations.audit.conformance.checking import ANSWER, LEVEL, attempted
from simulations.audit.conformance.code import Code
from simulations.audit.conformance.controls import refused
from simulations.audit.conformance.forks import in_fork
from simulations.audit.conformance.noise import forked_noise, noise_checks
from simulations.audit.conformance.reply import reply_checks
from simulations.audit.conformance.sampling import RATE, USERS, judge, sampling
from simulations.audit.conformance.sensitivity import rows_are_users, sensitivity
from simulations.audit.conformance.subjects import Subject, a_subject
from simulations.audit.conformance.suite import Options, conformance
from simulations.audit.conformance.sums import sum_checks
from simulations.audit.evidence import Check, read_evidence
from tests.simulations.audit.catch_liars import BEGIN, END, table, write_table
from tests.simulations.audit.liars import LIARS, Liar

Ask = Callable[[Subject, Subject, Code, Path], Sequence[Check]]

ASK: dict[str, Ask] = {
    "training": lambda small, _, code, __: sensitivity(small, code),
    "noise": lambda small, _, code, __: noise_checks(small, code, 4),
    "forks": lambda small, _, code, __: forked_noise(small, code),
    "sampling": lambda _, separable, code, __: sampling(separable, code),
    "metrics": lambda small, _, code, __: sum_checks(small, code, only=("metrics",)),
    "reply": lambda _, __, code, folder: reply_checks(code, folder),
}

CAUGHT_BY: dict[str, tuple[str, str]] = {
    "noise off": ("noise", "noise level"),
    "a tenth of the noise": ("noise", "noise level"),
    "half the noise": ("noise", "noise level"),
    "a silent layer": ("noise", "every coordinate"),
    "clipping off": ("training", "sensitivity"),
    "clip of the mean": ("training", "sensitivity"),
    "clip of the sum": ("training", "own row"),
    "clip per event": ("training", "sensitivity"),
    "three rows": ("training", "sensitivity"),
    "in-batch negatives": ("training", "sensitivity"),
    "same seed": ("noise", "new noise"),
    "seeded process": ("forks", "forked noise"),
    "one draw": ("noise", "noise level"),
    "shuffled": ("sampling", "sampling"),
    "fixed size": ("sampling", "sampling"),
    "same users": ("sampling", "sampling"),
    "counted q": ("sampling", "sampling"),
    "counted normaliser": ("training", "own row"),
    "loss beside the update": ("training", "update fields"),
    "loss in the update": ("noise", "every coordinate"),
    "loss in a weight": ("noise", "every coordinate"),
    "exact hits": ("metrics", "sum noise"),
    "users counted": ("metrics", "sum fields"),
    "count in the reply": ("reply", "nothing else leaves"),
    "skips empty batches": ("noise", "noise level"),
}
"""Liar -> which checks to ask, and which one must refuse it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conformance")


@pytest.fixture(scope="module")
def small(folder: Path) -> Subject:
    return a_subject(folder, "recommend", "vectors", "cpu")


@pytest.fixture(scope="module")
def separable(folder: Path) -> Subject:
    return a_subject(folder, "recommend", "vectors", "cpu", items=3 * USERS, off_start=0.0)


def code_of(liar: Liar) -> Code:
    return Code(trainer=liar.trainer, metrics=liar.metrics, reply=liar.reply)


@pytest.mark.parametrize("name", LIARS)
def test_every_liar_is_refused_where_honest_code_passes(
    name: str, small: Subject, separable: Subject, folder: Path
) -> None:
    ask, wanted = CAUGHT_BY[name]
    found = attempted(wanted, "a liar", lambda: ASK[ask](small, separable, code_of(LIARS[name]), folder))
    refused = {check.name for check in found if not check.holds and check.bound != ANSWER}
    assert wanted in refused, [check.says for check in found]


@pytest.mark.parametrize("ask", ASK)
def test_honest_code_passes(ask: str, small: Subject, separable: Subject, folder: Path) -> None:
    assert [check.says for check in ASK[ask](small, separable, Code(), folder) if not check.holds] == []


def test_the_suite_finds_every_fault_that_it_makes_on_purpose() -> None:
    steps: list[tuple[int, int]] = []
    options = Options(families=("dual",), modes=("vectors",), devices=("cpu",))
    found = conformance(options, Code(), command="again", on_step=lambda *step: steps.append(step))
    assert [f"{check.name}, {check.subject}: {check.says}" for check in found.checks if not check.holds] == []
    assert found.holds
    asked = {check.name for check in found.checks if not check.control}
    assert asked == {check.name for check in found.checks if check.control}  # each can fail
    assert steps[-1][0] == steps[-1][1]
    assert found.parameters["false_alarm_of_all"] == pytest.approx(
        LEVEL * found.parameters["statistical_checks"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_user_is_one_row_of_every_family(family: str, folder: Path) -> None:
    subject = a_subject(folder, family, "lora-held", "cpu")  # tests of training see to the other modes
    assert all(check.holds for check in rows_are_users(subject))


def test_held_adapters_are_not_in_an_update(folder: Path) -> None:
    trained, held = (a_subject(folder, "recommend", mode, "cpu").start for mode in ("lora", "lora-held"))
    assert set(held) < set(trained)


def test_users_too_quiet_to_show_anything_are_no_proof(
    small: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.audit.conformance.sensitivity.LOUDEST", 0.5)
    found = {check.name: check for check in sensitivity(small, Code())}
    assert not found["sensitivity"].holds
    assert "nothing is shown" in found["sensitivity"].says


def test_code_that_breaks_off_does_not_hold(small: Subject) -> None:
    def breaks(*_: object, **__: object) -> dict[str, object]:
        raise ValueError("no such layer")

    (found,) = attempted("sensitivity", "x", lambda: sensitivity(small, Code(trainer=breaks)))  # type: ignore[arg-type]
    assert not found.holds
    assert "no such layer" in found.says


def test_a_fault_that_breaks_the_code_off_shows_nothing_of_the_check() -> None:
    def breaks() -> list[Check]:
        raise ValueError("no noise")

    assert not refused("noise level", "a fault", breaks).holds
    passing = Check("noise level", "x", 1.0, "1", True, "fine")
    assert not refused("noise level", "a fault", lambda: [passing]).holds


def poisson(steps: int = 120) -> Iterator[np.ndarray]:
    while True:
        yield np.random.default_rng().random((steps, 40)) < RATE


def test_the_level_of_the_sampling_checks_is_kept() -> None:
    """Their p-values, over many Poisson samples, are no smaller than chance has it."""
    masks = poisson()
    refused = sum(not all(check.holds for check in judge(next(masks), "")) for _ in range(60))
    assert refused == 0


def test_a_copy_of_the_process_answers_and_one_that_fails_is_said_to() -> None:
    assert in_fork(lambda: np.arange(3.0)).tolist() == [0.0, 1.0, 2.0]
    assert len(in_fork(lambda: np.zeros(200_000))) == 200_000
    with pytest.raises(RuntimeError, match="a copy of the process failed"):
        in_fork(lambda: np.array([1 / 0]))


def test_the_command_writes_evidence_and_refuses_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.audit.conformance import suite

    for name in ("_of_device", "_of_answers", "_of_language_model"):
        monkeypatch.setattr(suite, name, lambda *_: iter(()))
    monkeypatch.setattr(suite, "reply_checks", lambda *_: [])
    monkeypatch.setattr(suite, "ROUNDS", 2)
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text(
        json.dumps(
            {
                "model": {"family": "dual", "core": "gru", "task": "interest", "max_events": 30},
                "privacy": {"noise_multiplier": 3.0},
            }
        )
    )
    asked = ["conformance", "--family", "classifier", "--mode", "vectors", "--device", "cpu", "--no-controls"]
    answered = CliRunner().invoke(app, [*asked, "--run", str(run), "--json"])
    assert answered.exit_code == 0, answered.output
    found = read_evidence(run / "audit" / "conformance.json")
    assert {check.subject for check in found.checks} == {
        "classifier, vectors, cpu",
        "dual, vectors, cpu, core gru, task interest",
        "one site, the run's plan",
        "sites together, the run's plan",
    }
    assert (
        found.command
        == "fedtide audit conformance --family classifier --mode vectors --device cpu --run run "
        + ("--no-controls")
    )
    for wrong in (["--family", "nonsense"], ["--mode", "dora"], ["--device", "abacus"]):
        refused = CliRunner().invoke(app, ["conformance", *wrong])
        assert refused.exit_code == 2
        assert wrong[1] in refused.output


def test_the_table_of_liars_names_who_was_caught_by_what_and_replaces_the_one_before(tmp_path: Path) -> None:
    rows = [
        {"tool": "conformance", "liar": "noise off", "trial": 0, "refused": ["noise level"], "seconds": 1.5},
        {"tool": "noise", "liar": "clipping off", "trial": 0, "refused": [], "seconds": 0.7},
        {"tool": "conformance", "liar": "honest", "trial": 0, "refused": [], "seconds": 1.0},
        {"tool": "conformance", "liar": "honest", "trial": 1, "refused": ["normal"], "seconds": 1.0},
    ]
    said = table(rows)
    assert "| noise off | adds no noise | **noise level** (1.5 s) | - |" in said
    assert "| clipping off | clips nobody | - | passes (0.7 s) |" in said
    assert "1 of 2" in said
    assert said.count("\n| ") == len(LIARS) + 1  # a row each, and the honest
    page = tmp_path / "audit.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(page, said)
    assert page.read_text() == f"before\n{BEGIN}\n{said}\n{END}\nafter\n"


def test_every_liar_is_in_the_documents_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "audit.md").read_text(encoding="utf-8")
    assert all(f"| {name} | {liar.does} | **" in page for name, liar in LIARS.items())
