"""One exchange with the sites: send a request to each, admit what comes back until the deadline.

Flower's own strategies end a run on one malformed reply and wait for nodes without an end; this does neither.
What is made of the admitted releases is `rounds.py`'s business.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from common.config import Plan
from common.phases import Exchange, Phase
from common.privacy.mechanisms import event_to_fields
from common.privacy.receipts import Request as Asked
from common.sums import METRICS, POPULARITY, TRANSITIONS, PairLayout
from common.wire import MESSAGE_TYPES, Request, payload_bytes, request_to_records
from server.admission import Admitted, Expectation, LeftOut, admit
from server.registry import Registry
from server.runs import RunError, RunFolder, append_line

_POLL = 0.05


@dataclass
class RoundRecord:
    """What is recorded of a round: nothing that a site did not release."""

    round: int
    phase: str = Phase.UPDATE.value
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


def expected_shapes(plan: Plan, request: Request, catalog: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a release that answers the request.

    Args:
        catalog: number of items.
    """
    match request.phase:
        case Phase.POPULARITY:
            return {POPULARITY: (catalog,)}
        case Phase.TRANSITIONS:
            size = plan.statistics.most_items(catalog)
            return {TRANSITIONS: (PairLayout(size, plan.statistics.symmetric).places,)}
        case Phase.METRICS:
            return {METRICS: (3,)}
    return {name: tuple(tensor.shape) for name, tensor in request.state.items()}


def ask_sites(
    grid: Grid,
    requests: dict[int, Request],
    plan: Plan,
    exchange: Exchange,
    registry: Registry,
    record: RoundRecord,
    anchors: dict[int, bytes],
    run: RunFolder,
    catalog: int,
) -> list[Admitted]:
    """Sends a round's requests, admits what comes back until the deadline, and stores receipts and heads."""
    deadline = plan.server.round_deadline
    messages = []
    for node, request in requests.items():
        content = request_to_records(request)
        record.bytes_down += payload_bytes(content)
        # A request that outlives its round must not be answered: it would spend budget for nothing.
        messages.append(
            Message(
                content,
                dst_node_id=node,
                message_type=MESSAGE_TYPES[request.phase],
                ttl=deadline,
                group_id=str(request.round),
            )
        )
    asked = dict(zip(grid.push_messages(messages), requests.items(), strict=True))
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
                _expectation(plan, request, exchange, catalog),
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


def _expectation(plan: Plan, request: Request, exchange: Exchange, catalog: int) -> Expectation:
    stated = plan.stated(exchange.phase)
    return Expectation(
        request=Asked(
            run=request.run,
            round=request.round,
            nonce=request.nonce,
            plan_hash=plan.digest(),
            model_hash=request.model_digest,
            attempt=request.attempt,
        ),
        shapes=expected_shapes(plan, request, catalog),
        norm_bound=plan.server.update_norm_bound,
        event=exchange.event,
        clip_norm=stated.clip_norm,
        normaliser=stated.normaliser,
        learning_rate=stated.learning_rate,
        content=exchange.phase.content,
    )
