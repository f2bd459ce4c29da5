"""The audit with canaries: honest code passes, sabotaged code does not, and an audit that cannot see says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.cli import main
from common.model_plan import ModelPlan
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from simulations.audit.canary import Hunt, canary_model, hunt
from simulations.audit.canary_findings import (
    LEAST_LOUD,
    LOUD,
    audit_canaries,
    bounds_by_round,
    loud_clip_norm,
)
from simulations.audit.canary_plan import (
    CanaryError,
    CanaryPlan,
    Registration,
    plan_canaries,
    register,
)
from simulations.audit.evidence import read_evidence
from simulations.audit.one_run import f_dp_refuted, guess_extremes
from simulations.audit.trainers import Silence
from tests.simulations.audit.liars import TRAINERS

torch.set_num_threads(1)

REGISTRATION = Registration("0" * 64, 1)


@pytest.fixture(scope="module")
def plan() -> CanaryPlan:
    """One round of 400 canaries at epsilon 2."""
    return plan_canaries(ModelPlan(), canaries=400, guesses=40, rounds=1)


@pytest.fixture(scope="module")
def model(plan: CanaryPlan) -> Iterator[InterestModel]:
    """The model of that plan."""
    with canary_model(plan.model, plan.canaries) as built:
        yield built


def refuted(plan: CanaryPlan, found: Hunt) -> bool:
    """The verdict."""
    guesses = guess_extremes(found.scores.sum(axis=0), found.included, plan.guesses)
    return f_dp_refuted(guesses, plan.curve(plan.rounds), plan.level)


def test_the_sites_own_code_passes(model: InterestModel, plan: CanaryPlan) -> None:
    start = model.trainable_state()
    assert not any(refuted(plan, hunt(model, plan)) for _ in range(3))
    assert all(torch.equal(start[name], value) for name, value in model.trainable_state().items())


@pytest.mark.parametrize(
    "liar",
    [
        "noise off",
        "a tenth of the noise",
        "clipping off",
        "clip of the mean",
        "clip per event",
        "three rows",
    ],
)
def test_a_liar_is_caught(model: InterestModel, plan: CanaryPlan, liar: str) -> None:
    """In one of three tries, of which the site's own code fails none: the quietest is missed by some 2 of 38."""
    assert any(refuted(plan, hunt(model, plan, trainer=TRAINERS[liar])) for _ in range(3))


def test_without_noise_a_canary_scores_one_if_it_is_in_and_nothing_if_not(
    model: InterestModel, plan: CanaryPlan
) -> None:
    found = hunt(model, plan, noise=Silence())
    inside, outside = found.scores[0, found.included], found.scores[0, ~found.included]
    assert (inside.mean(), outside.mean()) == pytest.approx((1.0, 0.0), abs=0.1)
    assert max(inside.std(), outside.std()) < plan.noise_multiplier / 6  # canaries hardly disturb one another
    assert found.loudness.min() > LEAST_LOUD


def test_all_rounds_together_say_more_than_one(model: InterestModel, plan: CanaryPlan) -> None:
    longer = replace(plan, rounds=3)
    found = hunt(model, longer, noise=Silence())
    assert found.scores.shape == (3, plan.canaries)
    rows = bounds_by_round(longer, hunt(model, longer))
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert rows[0]["claimed"] == pytest.approx(2.0, abs=0.01)
    assert rows[0]["claimed"] < rows[1]["claimed"] < rows[2]["claimed"]


def test_under_poisson_sampling_honest_code_passes_and_no_noise_is_caught(model: InterestModel) -> None:
    sampled = plan_canaries(ModelPlan(), canaries=400, guesses=40, rounds=2, sampling_rate=0.7)
    assert not refuted(sampled, hunt(model, sampled))
    assert refuted(sampled, hunt(model, sampled, trainer=TRAINERS["noise off"]))


def a_small_plan(**values: Any) -> CanaryPlan:
    return plan_canaries(
        ModelPlan(hidden_width=4, width=8), canaries=200, guesses=20, **{"rounds": 1, **values}
    )


def test_evidence_holds_for_honest_code_and_repeats_what_was_registered(tmp_path: Path) -> None:
    small = a_small_plan()
    registration = register(tmp_path / "audit", small)
    found = audit_canaries(small, registration)
    assert found.holds
    assert [check.name for check in found.checks if check.control] == ["guesses without noise"]
    written = json.loads((tmp_path / "audit" / "canary.registered.json").read_text())
    assert written[0]["digest"] == found.parameters["registered"] == small.digest()
    assert read_evidence(found.write(tmp_path)) == found
    assert len(found.series["scores"]["included"]) + len(found.series["scores"]["left_out"]) == 200


def test_evidence_does_not_hold_for_a_liar_nor_for_a_tensor_that_nobody_asked_for() -> None:
    found = audit_canaries(a_small_plan(), REGISTRATION, trainer=TRAINERS["noise off"])
    assert [check.name for check in found.checks if not check.holds] == ["guesses against the claim"]
    found = audit_canaries(a_small_plan(), REGISTRATION, trainer=TRAINERS["loss beside the update"])
    assert [check.name for check in found.checks if not check.holds] == ["nothing else in the update"]


def test_an_audit_that_could_not_have_caught_anything_does_not_hold() -> None:
    """Its positive control fails for updates that say nothing, and quiet canaries are told."""

    def nothing(model: InterestModel, histories: HistoryBatch, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in model.trainable_state().items()}

    found = audit_canaries(a_small_plan(), REGISTRATION, trainer=nothing)
    assert [check.name for check in found.checks if not check.holds] == ["guesses without noise"]
    found = audit_canaries(a_small_plan(clip_norm=50.0), REGISTRATION)
    assert "canaries are loud" in [check.name for check in found.checks if not check.holds]


def test_canaries_are_made_loud_by_a_smaller_clip_norm_alone() -> None:
    small = a_small_plan(clip_norm=50.0)
    lower = loud_clip_norm(small)
    assert lower < 1
    with canary_model(small.model, small.canaries) as built:
        found = hunt(built, replace(small, clip_norm=lower))
    assert np.median(found.loudness) == pytest.approx(LOUD, rel=0.2)
    assert loud_clip_norm(replace(small, clip_norm=0.01)) == 0.01


@pytest.mark.parametrize(("family", "mode"), [("recommend", "lora"), ("lstm-vae", "vectors")])
def test_other_models_are_audited_alike(family: str, mode: str) -> None:
    small = plan_canaries(
        ModelPlan.model_validate({"family": family, "mode": mode, "most_tokens": 60, "width": 8}),
        canaries=100,
        guesses=20,
        rounds=1,
        events=6,
    )
    small = replace(small, clip_norm=loud_clip_norm(small))
    with canary_model(small.model, small.canaries) as built:
        assert not refuted(small, hunt(built, small))
        assert refuted(small, hunt(built, small, trainer=TRAINERS["noise off"]))


def test_a_second_registration_is_refused_unless_it_is_meant_and_then_stands_beside(tmp_path: Path) -> None:
    small = a_small_plan()
    assert register(tmp_path, small).number == 1
    with pytest.raises(CanaryError, match="registers 1 audit already"):
        register(tmp_path, small)
    assert register(tmp_path, replace(small, level=0.02), again=True).number == 2
    said = json.loads((tmp_path / "canary.registered.json").read_text())
    assert [each["number"] for each in said] == [1, 2]
    assert said[0]["digest"] != said[1]["digest"]
    (tmp_path / "canary.registered.json").write_text("{}")
    with pytest.raises(CanaryError, match="no list of registered audits"):
        register(tmp_path, small, again=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"canaries": 5}, "canaries is 5"),
        ({"guesses": 150}, "guesses is 150"),
        ({"epsilon": 0.0}, "epsilon is 0"),
        ({"sampling_rate": 1.5}, "sampling_rate is 1.5"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_numbers_out_of_their_bounds_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CanaryError, match=rf"{message}, but must lie in .*: choose"):
        plan_canaries(ModelPlan(), **{"canaries": 200, "guesses": 20, **wrong})


def test_an_audit_that_could_refute_nothing_is_refused_before_it_begins() -> None:
    with pytest.raises(CanaryError, match="even if every guess were right epsilon 8 would not be refuted"):
        plan_canaries(ModelPlan(), canaries=200, guesses=20, rounds=1, epsilon=8.0)


def test_the_command_says_what_it_found_and_refuses_to_try_twice_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "audit",
        "canary",
        "--canaries",
        "100",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
        "--family",
        "recommend",
    ]
    with pytest.raises(SystemExit) as end:
        main([*command, "--json"])
    assert end.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"]
    assert said == json.loads((tmp_path / "audit" / "canary.json").read_text()) | {"record": said["record"]}
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    assert "--again" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["audit", "canary", str(tmp_path / "nowhere")])
    assert end.value.code == 2
    assert "there is no run" in capsys.readouterr().err
