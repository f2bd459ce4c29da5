"""Whole federations whose updates travel rounded: audited, aggregated as decoded, and no bad noise is hidden by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from client.training import train_round
from common.config import Precision
from common.precision import DTYPES, SCALES, broadcast, decoded, encoded
from common.wire import state_from_bytes, state_to_bytes
from common.witness import is_witness
from simulations.audit import receipts
from simulations.audit.noise import audit_noise
from simulations.audit.receipts import audit_receipts
from simulations.audit.trainers import ChangedNoise, Normals, Trainer, changed_trainer
from simulations.outcome import Outcome
from tests.simulations.audit.liars import noise_times
from tests.simulations.audit.noise_cases import PLACES, made_run
from tests.tiny import SITES, tiny_run

PLAN = {
    "statistics": {"popularity_share": 0.1, "popularity_noise_multiplier": 20.0},
    "privacy": {"epsilon": 100.0},
    "training": {"rounds": 2, "steps_per_round": 1},
}
RARE = 1e-6
"""False alarms of an audit here."""
ALL: tuple[Precision, ...] = ("float32", "bfloat16", "int8")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Outcome]:
    folder = tmp_path_factory.mktemp("precision")
    return {
        precision: tiny_run(
            folder,
            plan={
                **PLAN,
                "name": precision,
                "wire": {
                    "precision": precision,
                    "parameters": "float32" if precision == "float32" else "bfloat16",
                },
            },
        )
        for precision in ALL
    }


@pytest.mark.parametrize("precision", ALL)
def test_a_federation_in_each_precision_is_whole_and_its_audit_holds(
    precision: Precision, outcomes: dict[Precision, Outcome]
) -> None:
    run = outcomes[precision].run
    phases = {int(record["round"]): str(record["phase"]) for record in run.records()}
    assert list(phases.values()) == ["popularity", "update", "update"]
    for number, phase in phases.items():
        lines = run.receipts(number)
        assert len(lines) == SITES
        for line in lines:
            key = str(line["key_id"])
            kept = state_from_bytes(run.update_file(number, key).read_bytes())
            rounded = precision if phase == "update" else "float32"
            for name, value in kept.items():
                wanted = torch.float32 if is_witness(name) or name == SCALES else DTYPES[rounded]
                assert value.dtype == wanted, name
            assert (SCALES in kept) == (rounded == "int8")
            assert all(
                torch.equal(run.update(number, key)[name], value) for name, value in decoded(kept).items()
            )
    assert audit_receipts(run.path).lies == []
    assert audit_noise(run.path, level=RARE).holds


def test_a_kept_update_that_was_rounded_again_or_not_at_all_is_found(
    outcomes: dict[Precision, Outcome],
) -> None:
    """The receipt is over the bytes as sent, so the audit of receipts fails where they are other ones."""
    run = outcomes["int8"].run
    (line, *_) = run.receipts(2)
    file = run.update_file(2, str(line["key_id"]))
    sent = file.read_bytes()
    plain = decoded(state_from_bytes(sent))
    try:
        for other in (plain, encoded(plain, "bfloat16")):
            file.write_bytes(state_to_bytes(other))
            assert "wrong_digest" in {lie.reason for lie in audit_receipts(run.path).lies}
    finally:
        file.write_bytes(sent)
    assert audit_receipts(run.path).lies == []


def test_a_checkpoint_of_updates_as_they_were_before_rounding_is_found(
    outcomes: dict[Precision, Outcome],
) -> None:
    """What is added up is what was signed for: a checkpoint made of anything else is not the sum of the updates."""
    run = outcomes["int8"].run
    file = run.path / "rounds" / "00003.safetensors"
    sound = file.read_bytes()
    state = state_from_bytes(sound)
    name = next(name for name in state if not is_witness(name))
    state[name] = state[name] + 1e-3
    try:
        file.write_bytes(state_to_bytes(state))
        assert "wrong_aggregate" in {lie.reason for lie in audit_receipts(run.path).lies}
    finally:
        file.write_bytes(sound)


def test_rounds_of_updates_get_lighter(outcomes: dict[Precision, Outcome]) -> None:
    up = {
        precision: sum(
            value.nbytes
            for line in outcome.run.receipts(2)
            for value in state_from_bytes(
                outcome.run.update_file(2, str(line["key_id"])).read_bytes()
            ).values()
        )
        for precision, outcome in outcomes.items()
    }
    witness = SITES * PLACES * 4
    weights = {precision: heavy - witness for precision, heavy in up.items()}
    assert weights["bfloat16"] * 2 == weights["float32"]
    assert weights["int8"] * 4 < weights["float32"] * 1.06


def test_parameters_go_down_in_half_the_bytes_and_the_audit_knows_which_were_sent(
    outcomes: dict[Precision, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against checkpoints that are not rounded, every receipt after the first update is for another model."""
    down = {name: list(outcome.run.records())[2]["bytes_down"] for name, outcome in outcomes.items()}
    run = outcomes["int8"].run
    state = run.round_state(2)
    saved = SITES * 2 * sum(value.numel() for value in state.values())
    assert down["float32"] - max(down["bfloat16"], down["int8"]) > 0.95 * saved  # the plan's text differs too
    assert any(not torch.equal(value, broadcast(state, "bfloat16")[name]) for name, value in state.items())
    monkeypatch.setattr(receipts, "broadcast", lambda state, parameters: state)
    found = {(lie.place, lie.reason) for lie in audit_receipts(run.path).lies}
    assert {reason for _, reason in found} == {"wrong_model"}


def rounded(trainer: Trainer, precision: Precision) -> Trainer:
    """The trainer, and after it what a site does with its update."""
    return changed_trainer(trainer, update_of=lambda update: encoded(update, precision))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_nine_tenths_of_the_noise_are_caught_all_the_same_and_the_whole_of_it_is_not(
    precision: Precision, tmp_path: Path
) -> None:
    honest = audit_noise(
        made_run(tmp_path / "honest", rounded(train_round, precision), rounds=20), level=RARE
    )
    assert honest.holds, [check for check in honest.checks if not check.holds]
    lying = audit_noise(
        made_run(tmp_path / "lying", rounded(noise_times(0.9), precision), rounds=20), level=RARE
    )
    assert "level-by-site" in {check.name for check in lying.checks if not check.holds}


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_noise_in_the_witness_alone_is_caught_though_rounding_adds_to_the_rest(
    precision: Precision, tmp_path: Path
) -> None:
    def change(normals: Normals) -> Normals:
        return np.concatenate([np.zeros(len(normals) - PLACES), normals[-PLACES:]])

    trainer = rounded(
        changed_trainer(train_round, noise_of=lambda noise, _: ChangedNoise(noise, change)), precision
    )
    found = audit_noise(made_run(tmp_path / "run", trainer, rounds=2))
    assert "rest" in {check.name for check in found.checks if not check.holds}
