"""What a run has so far, and how it is found again in the run's folder after a crash, bit for bit.

A round is done when rounds.jsonl has its line and its checkpoint is there; the line is written last. Of a round
that is not done, the admitted updates with their receipts are kept (`exchange.py`), and the rest is done again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.config import Plan, TrainingPlan
from common.phases import Exchange, Phase
from common.sums import POPULARITY
from common.wire import State
from server.runs import RunError, RunFolder


class Progress:
    """Parameters, momentum, released statistics, and the parameters after each aggregated round of fine-tuning.

    Attributes:
        done: how many rounds of the plan are done.
    """

    def __init__(self, start: State) -> None:
        self.state: State = {name: tensor.clone() for name, tensor in start.items()}
        self.velocity: State = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        self.released: dict[str, Tensor] = {}
        self.history: list[State] = []
        self.done = 0

    @classmethod
    def found(cls, run: RunFolder, schedule: tuple[Exchange, ...], start: State) -> Progress:
        """Where the run in a folder stands; at its start in a new one.

        Raises:
            RunError: files that the rounds done have left are missing or damaged.
        """
        run.repair()
        if not run.has_round(0):
            run.save_round(0, start)
        records = _records(run, schedule)
        if records and not _whole(run, schedule, records[-1]):
            run.drop_last_record()
            records = records[:-1]
        try:
            it = cls(run.round_state(0))
            for record, exchange in zip(records, schedule, strict=False):
                if exchange.phase is Phase.UPDATE and record["aggregated"]:
                    it.history.append(run.round_state(exchange.round))
                    momentum = exchange.round
            if it.history:
                it.velocity = run.velocity(momentum)
            if records:
                it.done = len(records)
                it.state, it.released = run.round_state(it.done), run.released_state(it.done)
        except Exception as error:  # whatever the readers make of a missing or damaged file
            raise RunError(
                f"a checkpoint in {run.path / 'rounds'} is missing or damaged ({type(error).__name__}), so the run "
                "cannot go on: restore the folder from a backup, or start a new run"
            ) from error
        return it

    def final(self, plan: Plan) -> State:
        """The run's final parameters, as the plan says.

        Raises:
            RunError: nothing was released that could make a model.
        """
        if not self.history:
            if plan.training.rounds or POPULARITY not in self.released:
                raise RunError(
                    "no round was aggregated, so nothing was learned: rounds.jsonl says for each site why; "
                    "lower server.minimum_sites only if the reasons are sound"
                )
            return self.state
        return average_of_rounds(self.history, plan)


def stepped(
    state: State, velocity: State, mean: State, plan: TrainingPlan
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and momentum after a round; what its mean does not name (adapters that are held) stays as it is."""
    velocity = {
        name: plan.server_momentum * value + mean[name] if name in mean else value
        for name, value in velocity.items()
    }
    state = {
        name: value + plan.server_learning_rate * velocity[name] if name in mean else value
        for name, value in state.items()
    }
    return state, velocity


def average_of_rounds(history: list[State], plan: Plan) -> State:
    """The mean over the last rounds, or their exponential average where the plan has `ema`."""
    decay = plan.training.ema
    if decay is None:
        last = history[-max(1, round(len(history) * plan.training.average_last)) :]
        weights = [1.0 / len(last)] * len(last)
    else:
        last = history
        weights = [decay ** (len(last) - 1 - place) for place in range(len(last))]
        weights = [weight / sum(weights) for weight in weights]
    names = last[0].keys()
    return {
        name: sum(
            (w * each[name].double() for w, each in zip(weights, last, strict=True)), torch.zeros(())
        ).float()
        for name in names
    }


def _records(run: RunFolder, schedule: tuple[Exchange, ...]) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl, which must be the plan's first rounds."""
    try:
        records = list(run.records())
        numbers = [record["round"] for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run.rounds_file} cannot be read: restore it from a backup") from error
    planned = [exchange.round for exchange in schedule]
    if numbers != planned[: len(numbers)]:
        raise RunError(
            f"{run.rounds_file} tells of rounds {numbers}, but the plan has {planned}: restore it from a backup"
        )
    return records


def _whole(run: RunFolder, schedule: tuple[Exchange, ...], record: dict[str, Any]) -> bool:
    """Whether all that the last round leaves can be read."""
    exchange = schedule[record["round"] - 1]
    try:
        run.round_state(exchange.round)
        if record["aggregated"] and exchange.phase is Phase.UPDATE:
            run.velocity(exchange.round)
        if record["aggregated"] and exchange.phase.content == "statistics":
            return run.has_released(exchange.round)
    except Exception:  # a missing or damaged file, whatever the reader makes of it
        return False
    return True
