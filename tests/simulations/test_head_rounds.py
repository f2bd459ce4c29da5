"""Head first, then adapters: in the first rounds no site releases anything about adapters, and nobody moves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.policy import Performance
from common.config import PlanError, make_plan
from common.models.interface import InterestModel
from common.models.lora import is_adapter
from simulations.audit.receipts import audit_receipts
from simulations.outcome import Outcome
from tests.tiny import tiny_run

MODEL = {"mode": "lora", "lora_rank": 2, "lora_layers": 1, "max_events": 6}
PLAN = {
    "model": MODEL,
    "training": {"rounds": 3, "steps_per_round": 1, "head_rounds": 2, "server_momentum": 0.5},
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def outcome(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outcome:
    performance = Performance(frozen_precision=request.param)
    return tiny_run(tmp_path_factory.mktemp("head"), plan=PLAN, performance=performance)


def test_adapters_stand_still_until_their_rounds_and_the_audit_holds(outcome: Outcome) -> None:
    run = outcome.run
    keys = [str(line["key_id"]) for line in run.receipts(1)]
    assert len(keys) == 4
    for number, held in ((1, True), (2, True), (3, False)):
        before, after = run.round_state(number - 1), run.round_state(number)
        assert any(map(is_adapter, after))
        for name, value in after.items():
            assert torch.equal(value, before[name]) == (held and is_adapter(name)), name
        for key in keys:
            released = run.update(number, key)
            wanted = {name for name in after if not (held and is_adapter(name))}
            assert set(released) == wanted
    assert audit_receipts(run.path).lies == []


def test_an_adapter_that_a_site_moves_before_its_time_is_not_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites are made to hold no adapter in any round; the server takes nothing of theirs until adapters may move."""
    monkeypatch.setattr(InterestModel, "hold_adapters", lambda model, held: None)
    training = {"rounds": 2, "steps_per_round": 1, "head_rounds": 1}
    run = tiny_run(tmp_path, plan=PLAN | {"training": training}).run
    first, second = run.records()
    assert first["admitted"] == []
    assert len(second["admitted"]) == 4
    assert {each["reason"] for each in first["left_out"]} == {"wrong_tensors"}


@pytest.mark.parametrize(
    ("model", "training", "says"),
    [
        ({"mode": "vectors"}, {"rounds": 3, "head_rounds": 1}, "adapters in mode lora alone"),
        ({"mode": "lora"}, {"rounds": 3, "head_rounds": 3}, "never be trained"),
        ({"mode": "lora"}, {"rounds": 3, "head_rounds": -1}, "head_rounds"),
    ],
)
def test_head_rounds_that_mean_nothing_are_refused(
    model: dict[str, str], training: dict[str, int], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        make_plan({"model": model, "training": training})


def test_head_rounds_are_part_of_what_a_plan_means() -> None:
    lora = {"model": {"mode": "lora"}}
    digests = {make_plan(lora | {"training": {"head_rounds": held}}).digest() for held in (0, 1, 2)}
    assert len(digests) == 3
