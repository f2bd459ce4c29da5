"""One exchange with the sites: send a request to each, admit what comes back until the deadline.

Flower's own strategies end a run on one malformed reply and wait for nodes without an end; this does neither, and what
one site sends, or holds back, concerns that site alone (`replies.py`).
What is made of the admitted releases is `rounds.py`'s business.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from common.config import Plan
from common.models.lora import is_adapter
from common.phases import Exchange, Phase
from common.precision import decoded
from common.privacy.anchors import Countersignature
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import event_to_fields
from common.privacy.receipts import Receipt, check_receipt
from common.privacy.receipts import Request as Asked
from common.sums import METRICS, POPULARITY, TRANSITIONS, PairLayout
from common.wire import (
    MESSAGE_TYPES,
    Reason,
    Request,
    SignedRequest,
    payload_bytes,
    request_to_records,
    state_from_bytes,
)
from common.witness import witness_name
from server.admission import Admitted, Expectation, LeftOut, admit
from server.asking import nonce_of
from server.registry import Extension, Registry, RegistryError
from server.replies import NOT_WHOLE, Reply, replies_to
from server.runs import RunError, RunFolder, append_lines

_log = logging.getLogger("fedtide.server")

_SHORTEST_POLL, _LONGEST_POLL = 0.01, 0.2
"""Seconds between two looks for replies: quick within a process, and easy on a server that sites are far from."""

_PUSH_PAUSES = (1.0, 4.0)
"""Seconds before the messages of a round are sent once more, where SuperLink failed."""

_AWAY = 5
_NODE_ERRORS = {
    2: "its ClientApp refused the bundle or failed: logs/site.log there says why",
    _AWAY: "it is not connected: its administrator runs `fedtide site up`, and `fedtide site check` where that fails",
    8: "its ClientApp was killed: its administrator looks whether memory ran out, and runs `fedtide site check`",
}
_OTHER_NODE_ERROR = "its administrator runs `fedtide site check`, and reads logs/supernode.log"
_AT_SITE = ": why stands in the site's own logs/site.log"
_MISSING = (
    "no answer in time: where that happens again, its administrator runs `fedtide site check`, or the plan gets a "
    "longer server.round_deadline or server.grace"
)


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


def expected_shapes(plan: Plan, request: Request, catalog: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a release that answers the request.

    Args:
        catalog: number of items.
    """
    match request.phase:
        case Phase.POPULARITY:
            return _with_witness(POPULARITY, catalog, plan)
        case Phase.TRANSITIONS:
            size = plan.statistics.most_items(catalog)
            return _with_witness(TRANSITIONS, PairLayout(size, plan.statistics.symmetric).places, plan)
        case Phase.METRICS:
            return _with_witness(METRICS, 3, plan)
    held = plan.holds_adapters(request.round)
    return {
        name: tuple(tensor.shape) for name, tensor in request.state.items() if not (held and is_adapter(name))
    }


def _with_witness(name: str, places: int, plan: Plan) -> dict[str, tuple[int, ...]]:
    """A sum's shape, and its witness'."""
    shapes: dict[str, tuple[int, ...]] = {name: (places,)}
    if plan.privacy.witness_places:
        shapes[witness_name(name)] = (plan.privacy.witness_places,)
    return shapes


def ask_sites(
    grid: Grid,
    requests: dict[int, Request],
    plan: Plan,
    exchange: Exchange,
    registry: Registry,
    record: RoundRecord,
    run: RunFolder,
    catalog: int,
    kept: Sequence[dict[str, Any]] = (),
    known: Mapping[int, str] = MappingProxyType({}),
) -> list[Admitted]:
    """Sends a round's requests, and admits what comes back until all answered, or quorum and grace, or the deadline.

    What a half-done round admitted before a crash is admitted still, and its sites are not asked again.

    Args:
        known: names of nodes' sites, for the log: the registry knows a node's from its first answer on.
    """
    deadline, quorum = plan.server.round_deadline, plan.server.quorum
    lines = {str(line["key_id"]): line for line in kept}
    any_request = next(iter(requests.values()), None)
    if any_request is None:
        return []
    admitted = [
        _admitted_before(line, any_request, plan, registry, run) for line in kept if _is_whole(line, run)
    ]
    record.admitted += [each.site for each in admitted]
    answered = {each.receipt.reserve.nonce for each in admitted}
    requests = {node: each for node, each in requests.items() if each.nonce not in answered}
    sites = registry.sites_by_node()
    names = {node: known.get(node, f"node {node}") for node in requests}
    names |= {node: site.name for node, site in sites.items() if node in requests}
    _log.info("round %d (%s) begins: %d sites are asked", exchange.round, exchange.phase, len(requests))
    end = time.monotonic() + deadline
    messages: list[Message] = []
    signed: SignedRequest | None = None
    for node, request in requests.items():  # of one round: all carry the same arrays
        # A request that outlives its round must not be answered: it would spend budget for nothing.
        ttl = max(0.1, end - time.monotonic())
        signed = registry.signed(request, expires=math.ceil(time.time() + ttl), like=signed)
        content = request_to_records(signed, messages[0].content if messages else None)
        record.bytes_down += payload_bytes(content)
        messages.append(
            Message(
                content,
                dst_node_id=node,
                message_type=MESSAGE_TYPES[request.phase],
                ttl=ttl,
                group_id=str(request.round),
            )
        )
    asked = _sent(grid, messages, requests, record, names)
    expected = _expectation(plan, any_request, exchange, catalog)
    replies, pause = replies_to(grid, asked), _SHORTEST_POLL

    def leave_out(verdict: LeftOut, node: int) -> None:
        record.left_out.append({"node": str(node), **asdict(verdict), "site": verdict.site or names[node]})
        _log.warning(
            "round %d: %s is left out: %s%s",
            exchange.round,
            verdict.site or names[node],
            verdict.reason,
            _words_after(verdict),
        )

    while asked and time.monotonic() < end:
        if quorum is not None and len(admitted) >= quorum:
            end, quorum = min(end, time.monotonic() + plan.server.grace), None
        came = replies.look()
        fit: list[tuple[Admitted, int]] = []
        for reply in came:
            node, request = asked.pop(reply.asked)
            if reply.error is not None:
                failed = {"node": str(node), "site": names[node], "reason": "node_error", "code": reply.error}
                record.left_out.append(failed)
                _log.warning(
                    "round %d: %s is left out: node_error %d: %s",
                    exchange.round,
                    names[node],
                    reply.error,
                    _NODE_ERRORS.get(reply.error, _OTHER_NODE_ERROR),
                )
                continue
            taken_keys = {each.key_id for each in admitted} | {each.key_id for each, _ in fit}
            verdict = _verdict(reply, expected.of(request.nonce), registry, taken_keys, record)
            if isinstance(verdict, Admitted):
                fit.append((verdict, node))
            else:
                leave_out(verdict, node)
        taken = _taken_in(exchange.round, fit, registry, run, lines)
        for (_, node), outcome in zip(fit, taken, strict=True):
            if isinstance(outcome, LeftOut):
                leave_out(outcome, node)
                continue
            admitted.append(outcome)
            record.admitted.append(outcome.site)
            _log.info("round %d: %s is admitted", exchange.round, outcome.site)
        if came:
            pause = _SHORTEST_POLL
        elif asked:
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
            pause = min(2 * pause, _LONGEST_POLL)
    for message in replies.announced():
        leave_out(LeftOut("malformed", NOT_WHOLE), asked.pop(message)[0])
    record.missing = len(asked)
    for node, _ in asked.values():
        _log.warning("round %d: %s is left out: missing: %s", exchange.round, names[node], _MISSING)
    return admitted


def _sent(
    grid: Grid,
    messages: list[Message],
    requests: Mapping[int, Request],
    record: RoundRecord,
    names: Mapping[int, str],
) -> dict[str, tuple[int, Request]]:
    """Id of each message that the grid took -> whom it asks what; a node that is gone by now is left out.

    Raises:
        RunError: the grid failed several times.
    """
    ids: list[str | None] = []
    for pause in (*_PUSH_PAUSES, None):
        try:
            ids = list(grid.push_messages(messages)) if messages else []
            break
        except Exception as error:  # the same messages again: what has come through is not sent twice
            if pause is None:
                raise RunError(
                    f"the server failed to send round {record.round} ({type(error).__name__}): see logs/superlink.log"
                ) from error
            _log.warning(
                "round %d: sending failed (%s): once more in %g s", record.round, type(error).__name__, pause
            )
            time.sleep(pause)
    if len(ids) != len(messages):
        raise RunError(
            f"the server took {len(ids)} of {len(messages)} messages of round {record.round}: see logs/superlink.log"
        )
    asked = {}
    for message, (node, request) in zip(ids, requests.items(), strict=True):
        if message:
            asked[message] = node, request
        else:
            away = {"node": str(node), "site": names[node], "reason": "node_error", "code": _AWAY}
            record.left_out.append(away)
            _log.warning("round %d: %s is left out: it is not known any more", record.round, names[node])
    return asked


def _verdict(
    reply: Reply, expected: Expectation, registry: Registry, taken: Collection[str], record: RoundRecord
) -> Admitted | LeftOut:
    """What is made of one reply; nothing in it ends a round."""
    if reply.content is None:
        return LeftOut("malformed", reply.fault)
    try:
        record.bytes_up += payload_bytes(reply.content)
    except Exception as error:  # records whose values are none that Fedtide sends
        return LeftOut("malformed", f"its content cannot be weighed ({type(error).__name__})")
    return admit(reply.content, expected, registry, taken)


def _words_after(verdict: LeftOut) -> str:
    """Where a person looks next."""
    if verdict.reason in set(Reason):
        return _AT_SITE
    return f": {verdict.explanation}" if verdict.reason == "malformed" else ""


def _taken_in(
    number: int,
    fit: Sequence[tuple[Admitted, int]],
    registry: Registry,
    run: RunFolder,
    lines: Mapping[str, dict[str, Any]],
) -> list[Admitted | LeftOut]:
    """Updates, heads and receipts on the disk, in this order, before the updates count.

    A crash between two of them is made good by asking again: the site answers the same bytes, whose head the
    registry may hold already.

    Args:
        fit: what was admitted, each with the node that it came from.
        lines: key id -> the line that receipts.jsonl has of this round already.
    """
    if not fit:
        return []
    run.save_updates(number, {verdict.key_id: verdict.data for verdict, _ in fit})
    anchors = registry.accept_all(
        [Extension(verdict.chain, verdict.receipt.entries[-1].seq, node) for verdict, node in fit]
    )
    taken: list[Admitted | LeftOut] = []
    new = []
    for (verdict, _), anchor in zip(fit, anchors, strict=True):
        if isinstance(anchor, ReceiptError):  # another process took in another history of this site meanwhile
            said = "the site's chain is not the one that was verified"
            taken.append(LeftOut(anchor.reason, said, site=verdict.site))
            continue
        taken.append(verdict)
        if verdict.key_id not in lines:
            new.append(_line(verdict, anchor))
    if new:
        append_lines(run.receipts_file, new)
    return taken


def _line(verdict: Admitted, anchor: Countersignature) -> dict[str, Any]:
    reserve = verdict.receipt.reserve
    return {
        "run": reserve.run,
        "round": reserve.round,
        "site": verdict.site,
        "key_id": verdict.key_id,
        "delta": verdict.chain.genesis.delta,
        "event": event_to_fields(reserve.event),
        "receipt": verdict.receipt.to_bytes().decode("ascii"),
        "anchor": anchor.to_bytes().decode("ascii"),
    }


def _is_whole(line: Mapping[str, Any], run: RunFolder) -> bool:
    """Whether the update of a receipt's line is there; where it is not, its site is asked again."""
    return run.update_file(int(line["round"]), str(line["key_id"])).is_file()


def _admitted_before(
    line: Mapping[str, Any], request: Request, plan: Plan, registry: Registry, run: RunFolder
) -> Admitted:
    """What was admitted to this round before a crash.

    Raises:
        RunError: the receipt does not belong to this run, or the registry is older than the run.
    """
    try:
        receipt = Receipt.from_bytes(str(line["receipt"]).encode())
        key_id, nonce = receipt.genesis.key_id, receipt.reserve.nonce
        update = run.update_file(request.round, key_id).read_bytes()
        site = registry.site(key_id)
        if site is None or nonce != nonce_of(registry, request.run, request.round, key_id):
            raise RegistryError("its key is not enrolled, or it was not asked for")
        chain = check_receipt(receipt, update, _asked(plan, request, nonce), registry.chain(key_id))
        registry.accept(chain, seq=receipt.entries[-1].seq)
    except (ReceiptError, RegistryError, OSError) as error:
        raise RunError(
            f"a receipt of round {request.round} in {run.receipts_file} does not fit run or registry ({error}): "
            "restore the newest copies of both, then start the run again"
        ) from error
    return Admitted(site.name, key_id, decoded(state_from_bytes(update)), update, chain, receipt)


def _asked(plan: Plan, request: Request, nonce: str) -> Asked:
    return Asked(
        run=request.run,
        round=request.round,
        nonce=nonce,
        plan_hash=plan.digest(),
        model_hash=request.model_digest,
        attempt=request.attempt,
    )


def _expectation(plan: Plan, request: Request, exchange: Exchange, catalog: int) -> Expectation:
    stated = plan.stated(exchange.phase)
    return Expectation(
        request=_asked(plan, request, request.nonce),
        shapes=expected_shapes(plan, request, catalog),
        norm_bound=plan.server.update_norm_bound,
        event=exchange.event,
        clip_norm=stated.clip_norm,
        normaliser=stated.normaliser,
        learning_rate=stated.learning_rate,
        content=exchange.phase.content,
        precision=plan.precision(exchange.phase),
    )
