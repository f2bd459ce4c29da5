"""The rounds of a run: ask, admit, aggregate, checkpoint. Works on any Flower grid, real or in one process.

Flower's own strategies end a run on one malformed reply and wait for nodes without an end; this loop does
neither. Server optimisation is post-processing of what sites released.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from common.config import Plan
from common.privacy.mechanisms import event_to_fields
from common.privacy.receipts import Request as Asked
from common.wire import TRAIN, Request, State, payload_bytes, request_to_records
from server.admission import Admitted, Expectation, LeftOut, admit
from server.aggregation import aggregation, check_aggregation, fewest_updates
from server.registry import Registry
from server.runs import RunError, RunFolder, append_line

_POLL = 0.05


@dataclass
class RoundRecord:
    """What is recorded of a round: nothing that a site did not release."""

    round: int
    admitted: list[str] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    missing: int = 0
    aggregated: bool = False
    bytes_down: int = 0
    bytes_up: int = 0
    update_norm: float = 0.0
    seconds: float = 0.0


def wait_for_nodes(grid: Grid, at_least: int, deadline: float) -> list[int]:
    """Ids of the connected nodes, in order, once there are enough.

    Raises:
        RunError: there were too few until the deadline (seconds).
    """
    end = time.monotonic() + deadline
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= at_least:
            return nodes
        if time.monotonic() > end:
            raise RunError(
                f"{len(nodes)} sites are connected after {deadline:g} s, but the plan needs {at_least}: "
                "start more sites, or lower server.minimum_sites"
            )
        time.sleep(_POLL)


def run_rounds(
    grid: Grid,
    plan: Plan,
    run: RunFolder,
    registry: Registry,
    start: State,
    *,
    nodes_expected: int | None = None,
    on_round: Callable[[RoundRecord], None] = lambda _: None,
) -> dict[str, Tensor]:
    """All rounds of a calibrated plan.

    Args:
        start: the seeded start of the model's trainable parameters.
        nodes_expected: how many sites to wait for at the beginning; the plan's minimum where None.

    Returns:
        The final parameters: the mean over the last rounds, as the plan says.

    Raises:
        RunError: too few sites, no round was aggregated, or the disk is full.
        PlanError: the sites are too few for the plan's aggregation.
    """
    deadline = plan.server.round_deadline
    nodes = wait_for_nodes(grid, nodes_expected or fewest_updates(plan.server), deadline)
    check_aggregation(plan.server, len(nodes))
    state: State = {name: tensor.clone() for name, tensor in start.items()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    anchors: dict[int, bytes] = {}
    history: list[State] = []
    run.save_round(0, state)
    for number in range(1, plan.training.rounds + 1):
        began = time.monotonic()
        record = RoundRecord(round=number)
        nodes = sorted(grid.get_node_ids()) or nodes
        requests = {
            node: Request(
                run=run.name,
                round=number,
                attempt=1,
                nonce=secrets.token_hex(16),
                plan=plan.model_dump_json(),
                state=state,
                anchor=anchors.get(node),
            )
            for node in nodes
        }
        admitted = _exchange(grid, requests, plan, registry, record, anchors, run)
        if len(admitted) >= fewest_updates(plan.server):
            admitted.sort(key=lambda each: each.site)
            mean = aggregation(plan.server)([each.state for each in admitted])
            for name, value in mean.items():
                velocity[name] = plan.training.server_momentum * velocity[name] + value
            state = {n: state[n] + plan.training.server_learning_rate * velocity[n] for n in state}
            record.aggregated = True
            record.update_norm = float(sum(value.double().square().sum() for value in mean.values()) ** 0.5)
            history.append(state)
        record.seconds = time.monotonic() - began
        run.save_round(number, state)
        append_line(run.rounds_file, asdict(record))
        on_round(record)
    if not history:
        raise RunError(
            "no round was aggregated, so nothing was learned: rounds.jsonl says for each site why; "
            "lower server.minimum_sites only if the reasons are sound"
        )
    last = history[-max(1, round(len(history) * plan.training.average_last)) :]
    final = {name: torch.stack([each[name].double() for each in last]).mean(dim=0).float() for name in state}
    run.save_model(final)
    return final


def _exchange(
    grid: Grid,
    requests: dict[int, Request],
    plan: Plan,
    registry: Registry,
    record: RoundRecord,
    anchors: dict[int, bytes],
    run: RunFolder,
) -> list[Admitted]:
    """Sends a round's requests, admits what comes back until the deadline, and stores receipts and heads."""
    deadline = plan.server.round_deadline
    messages = []
    for node, request in requests.items():
        content = request_to_records(request)
        record.bytes_down += payload_bytes(content)
        # A request that outlives its round must not be trained on: it would spend budget for nothing.
        messages.append(
            Message(content, dst_node_id=node, message_type=TRAIN, ttl=deadline, group_id=str(request.round))
        )
    asked = dict(zip(grid.push_messages(messages), requests.items(), strict=True))
    event = plan.round_event()
    admitted: list[Admitted] = []
    end = time.monotonic() + deadline
    while asked and time.monotonic() < end:
        replies = list(grid.pull_messages(list(asked)))
        for reply in replies:
            # An error made by the server's own link has no sender, so the node is told by what it replies to.
            found = asked.pop(reply.metadata.reply_to_message_id, None)
            if found is None:  # answers nothing that was asked in this round
                continue
            node, request = found
            if reply.has_error():
                record.left_out.append({"node": str(node), "reason": "node_error", "code": reply.error.code})
                continue
            record.bytes_up += payload_bytes(reply.content)
            verdict = admit(
                reply.content,
                _expectation(plan, request, event),
                registry,
                [each.key_id for each in admitted],
            )
            if isinstance(verdict, LeftOut):
                record.left_out.append({"node": str(node), **asdict(verdict)})
                continue
            run.save_update(request.round, verdict.key_id, verdict.state)
            anchors[node] = registry.accept(verdict.chain).to_bytes()
            admitted.append(verdict)
            record.admitted.append(verdict.site)
            append_line(
                run.receipts_file,
                {
                    "run": run.name,
                    "round": request.round,
                    "site": verdict.site,
                    "key_id": verdict.key_id,
                    "delta": verdict.chain.genesis.delta,
                    "event": event_to_fields(verdict.receipt.reserve.event),
                    "receipt": verdict.receipt.to_bytes().decode("ascii"),
                    "anchor": anchors[node].decode("ascii"),
                },
            )
        if asked and not replies:
            time.sleep(_POLL)
    record.missing = len(asked)
    return admitted


def _expectation(plan: Plan, request: Request, event: object) -> Expectation:
    return Expectation(
        request=Asked(
            run=request.run,
            round=request.round,
            nonce=request.nonce,
            plan_hash=plan.digest(),
            model_hash=request.model_digest,
            attempt=request.attempt,
        ),
        shapes={name: tuple(tensor.shape) for name, tensor in request.state.items()},
        norm_bound=plan.server.update_norm_bound,
        event=event,
        clip_norm=plan.privacy.clip_norm,
        normaliser=plan.privacy.normaliser,
        learning_rate=plan.training.learning_rate,
    )
