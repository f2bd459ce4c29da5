"""The final model as an average of rounds: over the last ones, or exponential over all."""

from __future__ import annotations

import pytest
import torch

from common.config import PlanError, make_plan
from server.progress import average_of_rounds

ROUNDS = [{"w": torch.tensor([float(number), 1.0])} for number in (8, 4, 2)]


def averaged(**training: float) -> list[float]:
    plan = make_plan({"training": {"rounds": 3, **training}})
    found: list[float] = average_of_rounds(ROUNDS, plan)["w"].tolist()
    return found


def test_an_exponential_average_weighs_each_round_by_its_age_over_all_rounds() -> None:
    # Weights 0.25, 0.5 and 1 of rounds 1, 2 and 3, over their sum: (2 + 2 + 2) / 1.75.
    assert averaged(ema=0.5) == pytest.approx([6 / 1.75, 1.0])
    assert averaged(ema=1e-9) == pytest.approx([2.0, 1.0])  # the last round alone
    assert averaged(ema=1 - 1e-9) == pytest.approx([14 / 3, 1.0])  # all alike
    assert averaged(ema=0.5, average_last=0.01) == averaged(ema=0.5)  # ema takes the place of the mean


def test_an_exponential_average_of_one_round_is_that_round() -> None:
    plan = make_plan({"training": {"ema": 0.9}})
    assert average_of_rounds(ROUNDS[:1], plan)["w"].tolist() == [8.0, 1.0]
    assert average_of_rounds(ROUNDS[:1], plan)["w"].dtype == torch.float32


def test_without_it_the_mean_over_a_share_of_the_last_rounds_is_taken_at_least_one() -> None:
    assert averaged(average_last=1.0) == pytest.approx([14 / 3, 1.0])
    assert averaged(average_last=0.67) == pytest.approx([3.0, 1.0])
    assert averaged(average_last=0.01) == pytest.approx([2.0, 1.0])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2.0])
def test_a_decay_outside_the_open_unit_interval_is_refused(decay: float) -> None:
    with pytest.raises(PlanError, match="ema"):
        make_plan({"training": {"ema": decay}})
