"""The rounds of a run, phase by phase: ask, admit, aggregate, checkpoint. Works on any Flower grid.

Statistics (popularity, then transitions), public pre-training between, private fine-tuning, metrics; each part
is there if the plan has it. All that the server does with releases is post-processing of what sites released.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from flwr.serverapp import Grid

from common.config import Plan
from common.phases import Exchange, Phase
from common.sums import METRICS, POPULARITY, SITES
from common.wire import State
from common.witness import without_witness
from server.admission import Admitted
from server.aggregation import aggregation, check_aggregation, fewest_updates
from server.asking import requests_of
from server.exchange import RoundRecord, ask_sites
from server.metrics import estimate
from server.progress import Progress, stepped
from server.registry import Registry
from server.runs import RunFolder, append_line
from server.waiting import check_budgets, check_not_in_vain, wait_for_sites

_log = logging.getLogger("fedtide.server")

Pretrain = Callable[[State], State]
"""From released statistics to the parameters that private fine-tuning starts with."""


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
    names: Callable[[], Mapping[int, str]] = dict,
) -> State:
    """All rounds of a calibrated plan, from where the run's folder stands.

    Killed between any two steps and called again, it comes to the same end: what is asked is on the disk before it
    is sent, what is admitted before it counts, and a round's line in rounds.jsonl after all else of it.

    Args:
        start: the seeded start of the model's trainable parameters.
        nodes_expected: how many sites to wait for at the beginning; the plan's quorum or minimum where None.
        pretrain: called once, after the statistics and before the first round of private fine-tuning.
        names: node -> its site, as enrolled; of others the registry says who answers from them.

    Returns:
        The final parameters: the mean over the last rounds, as the plan says.

    Raises:
        RunError: too few sites for too long, rounds in vain, budgets that do not last, no round was aggregated, the
            disk is full, or the folder is damaged.
        PlanError: the sites are too few for the plan's aggregation.
    """
    schedule = plan.schedule()
    progress = Progress.found(run, schedule, start)
    fewest = fewest_updates(plan.server)
    needed = nodes_expected or max(fewest, plan.server.quorum or 0)
    in_vain, asked_before = 0, False
    if 0 < progress.done < len(schedule):
        _log.info("run %s goes on after round %d", run.name, progress.done)
    first_update = next((each.round for each in schedule if each.phase is Phase.UPDATE), None)
    catalog = len(run.catalog())
    final: State | None = None
    for exchange in schedule[progress.done :]:
        began = time.monotonic()
        record = RoundRecord(round=exchange.round, phase=exchange.phase.value)
        if exchange.round == first_update and pretrain is not None:
            if not run.has_pretrained(exchange.round - 1):
                run.save_pretrained(exchange.round - 1, pretrain(progress.released))
            progress.state = run.sent_state(exchange.round - 1)
        if exchange.phase is Phase.METRICS:
            progress.state = final = progress.final(plan)
        if exchange.phase is not Phase.TRANSITIONS or POPULARITY in progress.released:
            check_not_in_vain(in_vain, exchange.round - 1)
            check_budgets(plan, run, registry, schedule[exchange.round - 1 :])
            asked = run.asked(exchange.round)
            kept = run.receipts(exchange.round) if asked else []
            waits = time.monotonic()
            held = {str(line["key_id"]) for line in kept}
            nodes = wait_for_sites(grid, plan, run, registry, exchange.round, needed, names, held, asked)
            began += time.monotonic() - waits
            if not asked_before:
                there = max(len(nodes), fewest)
                check_aggregation(plan.server, min(there, plan.server.sites_per_round or there))
            needed, asked_before, known = fewest, True, names()
            with registry.kept_open():
                requests = requests_of(plan, run, exchange, progress, nodes, registry, known)
                admitted = ask_sites(
                    grid, requests, plan, exchange, registry, record, run, catalog, kept, known
                )
            if len(admitted) >= fewest:
                _aggregate(plan, run, exchange, progress, admitted, record)
            in_vain = 0 if record.aggregated else in_vain + 1
            _log.info(
                "round %d is %s: %s",
                exchange.round,
                "aggregated" if record.aggregated else "not aggregated, too few updates were admitted",
                ", ".join(sorted(record.admitted)) or "none",
            )
        record.admitted.sort()
        record.seconds = time.monotonic() - began
        run.save_round(exchange.round, progress.state)
        append_line(run.rounds_file, asdict(record))
        on_round(record)
    final = progress.final(plan) if final is None else final
    _publish_metrics(plan, run)
    run.save_model(final)
    return final


def _aggregate(
    plan: Plan,
    run: RunFolder,
    exchange: Exchange,
    progress: Progress,
    admitted: list[Admitted],
    record: RoundRecord,
) -> None:
    """Adds a round's admitted releases to what the run has; the order of the sites decides how floats are added."""
    ordered = sorted(admitted, key=lambda each: each.site)
    mean = aggregation(plan.server)([each.state for each in ordered])
    record.aggregated = True
    record.update_norm = float(sum(value.double().square().sum() for value in mean.values()) ** 0.5)
    if exchange.phase is Phase.UPDATE:
        progress.state, progress.velocity = stepped(progress.state, progress.velocity, mean, plan.training)
        progress.history.append(progress.state)
        run.save_velocity(exchange.round, progress.velocity)
    elif exchange.phase.content == "statistics":
        for name, value in without_witness(mean).items():
            sites = torch.tensor([float(len(admitted))])
            progress.released |= {name: value * len(admitted), name + SITES: sites}
        run.save_released(exchange.round, progress.released)


def _publish_metrics(plan: Plan, run: RunFolder) -> None:
    """Writes down the quality that sites released, once, from the updates kept: the round itself is done by now."""
    for record in run.records():
        number = int(record["round"])
        if record["phase"] != Phase.METRICS or not record["aggregated"] or run.released_metrics(number):
            continue
        lines = sorted(run.receipts(number), key=lambda line: str(line["site"]))
        states = [run.update(number, str(line["key_id"])) for line in lines]
        total = aggregation(plan.server)(states)[METRICS] * len(states)
        found = estimate(total, plan.metrics.noise_multiplier or 0.0, len(states))
        append_line(run.metrics_file, {"released": True, "round": number, **found.as_json(plan.metrics.top)})
