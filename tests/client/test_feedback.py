"""Online feedback follows the formula, stays local, and is refused where it cannot work."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from client.feedback import LARGEST_STEP, FeedbackError, OnlineModel
from common.models.batches import HistoryBatch
from tests.common.models.test_families import a_batch, a_model, moved

LIKED = torch.tensor([True, False, True, True, False])
ITEMS = torch.tensor([8, 1, 2, 3, 4])


@pytest.mark.parametrize("task", ["next-item", "interest"])
@pytest.mark.parametrize("family", ["recommend", "dual"])
def test_one_step_is_alpha_times_the_gradient_of_the_log_probability(family: str, task: str) -> None:
    model, batch = moved(a_model(family, task)), a_batch()
    online = OnlineModel(model, family, alpha=0.01)
    before = online.model.residual.weight.clone()  # type: ignore[union-attr, operator]
    step = 1e-3
    gradient = torch.zeros_like(before)
    sign = torch.where(LIKED, 1.0, -1.0)

    def log_probability() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.logsigmoid(sign * online.log_odds(batch, ITEMS)).double().sum())

    places = [(0, 0), (3, 5), (7, 2)]
    for place in places:
        with torch.no_grad():
            online.model.residual.weight[place] += step  # type: ignore[union-attr, index, operator]
            up = log_probability()
            online.model.residual.weight[place] -= 2 * step  # type: ignore[union-attr, index, operator]
            gradient[place] = (up - log_probability()) / (2 * step)
            online.model.residual.weight[place] += step  # type: ignore[union-attr, index, operator]
    online.feedback(batch, ITEMS, LIKED)
    change = online.model.residual.weight - before  # type: ignore[union-attr, operator]
    assert change.norm() < LARGEST_STEP
    for place in places:
        assert float(change[place]) == pytest.approx(0.01 * float(gradient[place]), rel=0.05, abs=2e-5)


@pytest.mark.parametrize("family", ["recommend", "dual"])
def test_feedback_makes_what_was_said_likelier_and_leaves_the_given_model_alone(family: str) -> None:
    model, batch = moved(a_model(family)), a_batch()
    kept = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    online = OnlineModel(model, family)
    first = online.feedback(batch, ITEMS, LIKED)
    for _ in range(20):
        last = online.feedback(batch, ITEMS, LIKED)
    assert last > first + 0.1
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.trainable_state().items())
    opposite = OnlineModel(model, family)
    for _ in range(20):
        opposite.feedback(batch, ITEMS, ~LIKED)
    assert ((online.log_odds(batch, ITEMS) > opposite.log_odds(batch, ITEMS)) == LIKED).all()


def test_no_single_event_moves_the_layer_further_than_the_largest_step() -> None:
    online = OnlineModel(moved(a_model("dual")), "dual", alpha=10)
    before = online.model.residual.weight.clone()  # type: ignore[union-attr, operator]
    online.feedback(a_batch(), ITEMS, LIKED)
    assert float((online.model.residual.weight - before).norm()) <= LARGEST_STEP + 1e-5  # type: ignore[union-attr, operator]


def test_adapted_weights_are_private_travel_and_fit_their_own_model_only(tmp_path: Path) -> None:
    model, batch = moved(a_model("dual")), a_batch()
    online = OnlineModel(model, "dual")
    online.feedback(batch, ITEMS, LIKED)
    file = tmp_path / "adapted.safetensors"
    online.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    other = OnlineModel(model, "dual")
    other.load(file)
    assert torch.equal(other.log_odds(batch, ITEMS), online.log_odds(batch, ITEMS))
    with pytest.raises(FeedbackError, match="another model"):
        OnlineModel(a_model("recommend"), "recommend").load(file)
    whole = load(file.read_bytes())
    file.write_bytes(save({"weight": whole["weight"] + 1, "bias": whole["bias"][1:]}))
    with pytest.raises(FeedbackError, match="another model"):
        other.load(file)
    file.write_bytes(save(whole)[:-1])
    with pytest.raises(FeedbackError, match="is damaged: put a copy of it back"):
        other.load(file)
    with pytest.raises(FeedbackError, match=r"cannot be read \(Is a directory\)") as refused:
        other.load(tmp_path)
    assert "delete" not in str(refused.value)  # what is in it may be whole
    assert torch.equal(other.log_odds(batch, ITEMS), online.log_odds(batch, ITEMS))


def test_feedback_that_cannot_work_is_refused_in_words() -> None:
    with pytest.raises(FeedbackError, match="recommend, dual"):
        OnlineModel(a_model("lstm-vae"), "lstm-vae")
    with pytest.raises(FeedbackError, match="alpha"):
        OnlineModel(a_model("dual"), "dual", alpha=0)
    online = OnlineModel(a_model("dual"), "dual")
    with pytest.raises(FeedbackError, match="rows of the catalog"):
        online.feedback(a_batch(), ITEMS + 100, LIKED)
    nobody = HistoryBatch(items=torch.full((1, 2), -1), times=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(FeedbackError, match="at least one event"):
        online.feedback(nobody, ITEMS[:1], LIKED[:1])
