"""The rounds of a run, phase by phase: ask, admit, aggregate, checkpoint. Works on any Flower grid.

Statistics (popularity, then transitions), public pre-training between, private fine-tuning, metrics; each part
is there if the plan has it. All that the server does with releases is post-processing of what sites released.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from flwr.serverapp import Grid
from torch import Tensor

from common.config import Plan
from common.phases import Exchange, Phase
from common.sums import METRICS, POPULARITY, SITES
from common.wire import Request, State
from server.admission import Admitted
from server.aggregation import aggregation, check_aggregation, fewest_updates
from server.exchange import RoundRecord, ask_sites, wait_for_nodes
from server.metrics import estimate
from server.registry import Registry
from server.runs import RunError, RunFolder, append_line

Pretrain = Callable[[State], State]
"""From released statistics to the parameters that private fine-tuning starts with."""


class _Progress:
    """What a run has so far: parameters, what was released, and the parameters after each aggregated round."""

    def __init__(self, start: State) -> None:
        self.state: State = {name: tensor.clone() for name, tensor in start.items()}
        self.velocity = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        self.released: dict[str, Tensor] = {}
        self.history: list[State] = []

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


def run_rounds(
    grid: Grid,
    plan: Plan,
    run: RunFolder,
    registry: Registry,
    start: State,
    *,
    nodes_expected: int | None = None,
    on_round: Callable[[RoundRecord], None] = lambda _: None,
    pretrain: Pretrain | None = None,
) -> State:
    """All rounds of a calibrated plan.

    Args:
        start: the seeded start of the model's trainable parameters.
        nodes_expected: how many sites to wait for at the beginning; the plan's minimum where None.
        pretrain: called once, after the statistics and before the first round of private fine-tuning.

    Returns:
        The final parameters: the mean over the last rounds, as the plan says.

    Raises:
        RunError: too few sites, no round was aggregated, or the disk is full.
        PlanError: the sites are too few for the plan's aggregation.
    """
    schedule = plan.schedule()
    nodes = wait_for_nodes(grid, nodes_expected or fewest_updates(plan.server), plan.server.round_deadline)
    check_aggregation(plan.server, len(nodes))
    progress = _Progress(start)
    anchors: dict[int, bytes] = {}
    catalog = len(run.catalog())
    run.save_round(0, progress.state)
    final: State | None = None
    for exchange in schedule:
        began = time.monotonic()
        record = RoundRecord(round=exchange.round, phase=exchange.phase.value)
        nodes = sorted(grid.get_node_ids()) or nodes
        if exchange.phase is Phase.UPDATE and pretrain is not None:
            progress.state, pretrain = pretrain(progress.released), None
            run.save_pretrained(exchange.round - 1, progress.state)
        if exchange.phase is Phase.METRICS:
            progress.state = final = progress.final(plan)
        if exchange.phase is not Phase.TRANSITIONS or POPULARITY in progress.released:
            requests = {node: _request(plan, run, exchange, progress, anchors.get(node)) for node in nodes}
            admitted = ask_sites(grid, requests, plan, exchange, registry, record, anchors, run, catalog)
            if len(admitted) >= fewest_updates(plan.server):
                admitted.sort(key=lambda each: each.site)
                _aggregate(plan, run, exchange, progress, admitted, record)
        record.seconds = time.monotonic() - began
        run.save_round(exchange.round, progress.state)
        append_line(run.rounds_file, asdict(record))
        on_round(record)
    final = progress.final(plan) if final is None else final
    run.save_model(final)
    return final


def _request(
    plan: Plan, run: RunFolder, exchange: Exchange, progress: _Progress, anchor: bytes | None
) -> Request:
    statistics = exchange.phase.content == "statistics"
    return Request(
        run=run.name,
        round=exchange.round,
        attempt=1,
        nonce=secrets.token_hex(16),
        plan=plan.model_dump_json(),
        state={} if statistics else progress.state,
        anchor=anchor,
        phase=exchange.phase,
        released=progress.released,
    )


def _aggregate(
    plan: Plan,
    run: RunFolder,
    exchange: Exchange,
    progress: _Progress,
    admitted: list[Admitted],
    record: RoundRecord,
) -> None:
    """Adds a round's admitted releases to what the run has."""
    mean = aggregation(plan.server)([each.state for each in admitted])
    record.aggregated = True
    record.update_norm = float(sum(value.double().square().sum() for value in mean.values()) ** 0.5)
    if exchange.phase is Phase.UPDATE:
        for name, value in mean.items():
            progress.velocity[name] = plan.training.server_momentum * progress.velocity[name] + value
        progress.state = {
            name: value + plan.training.server_learning_rate * progress.velocity[name]
            for name, value in progress.state.items()
        }
        progress.history.append(progress.state)
        return
    sums = {name: value * len(admitted) for name, value in mean.items()}
    if exchange.phase is Phase.METRICS:
        found = estimate(sums[METRICS], plan.metrics.noise_multiplier or 0.0, len(admitted))
        append_line(
            run.metrics_file, {"released": True, "round": exchange.round, **found.as_json(plan.metrics.top)}
        )
        return
    for name, value in sums.items():
        progress.released |= {name: value, name + SITES: torch.tensor([float(len(admitted))])}
    run.save_released(exchange.round, progress.released)
