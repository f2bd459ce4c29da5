"""How admitted updates become one: the mean, or one of Flower's aggregations that withstand bad sites.

Weights are a public constant, the same for every site. What is added here has passed admission.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from torch import Tensor

from common.config import PlanError, ServerPlan
from common.wire import State

Aggregate = Callable[[Sequence[State]], dict[str, Tensor]]

_WEIGHT = "weight"


def mean(updates: Sequence[State]) -> dict[str, Tensor]:
    """The plain mean, summed in float64 in the order given."""
    names = updates[0].keys()
    return {
        name: torch.stack([update[name].double() for update in updates]).mean(dim=0).float() for name in names
    }


def aggregation(plan: ServerPlan) -> Aggregate:
    """The aggregation that a plan names."""
    if plan.aggregation == "mean":
        return mean
    return lambda updates: _with_flower(plan, updates)


def fewest_updates(plan: ServerPlan) -> int:
    """The fewest admitted updates for which the plan's aggregation means anything.

    A median or a trimmed mean withstands f bad sites among 2 f + 1 (Yin et al. 2018, arXiv 1803.01498), Krum
    among 2 f + 3 (Blanchard et al. 2017, arXiv 1703.02757).
    """
    match plan.aggregation:
        case "krum":
            return max(plan.minimum_sites, 2 * plan.malicious_sites + 3)
        case "trimmed-mean" | "median":
            return max(plan.minimum_sites, 2 * plan.malicious_sites + 1)
        case _:
            return plan.minimum_sites


def check_aggregation(plan: ServerPlan, sites: int) -> None:
    """Whether a run with so many sites can be aggregated as the plan says: to be asked before any is charged.

    Raises:
        PlanError: it cannot; the message says what to change.
    """
    bad, kind = plan.malicious_sites, plan.aggregation
    if kind == "mean" and bad:
        raise PlanError(
            f"server.malicious_sites is {bad}, but one bad site moves the mean wherever it wants: "
            "choose aggregation median, trimmed-mean or krum"
        )
    if kind == "trimmed-mean" and not bad:
        raise PlanError(
            "server.malicious_sites is 0, so a trimmed mean trims nothing: say how many sites may be bad"
        )
    needed = fewest_updates(plan)
    if plan.quorum is not None and plan.quorum < needed:
        raise PlanError(
            f"server.quorum is {plan.quorum}, but {kind} with malicious_sites {bad} needs {needed} updates in a round: "
            "raise the quorum, or leave it out to wait for all sites"
        )
    if sites < needed:
        why = f"{kind} with malicious_sites {bad}" if needed > plan.minimum_sites else "server.minimum_sites"
        raise PlanError(
            f"{sites} sites take part, but {why} needs {needed} updates in a round: "
            "add sites, or lower server.malicious_sites or server.minimum_sites"
        )


def _with_flower(plan: ServerPlan, updates: Sequence[State]) -> dict[str, Tensor]:
    from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum

    match plan.aggregation:
        case "median":
            strategy = FedMedian(weighted_by_key=_WEIGHT)
        case "trimmed-mean":
            # Flower trims int(beta * n) from each end; the half keeps rounding from losing one.
            beta = math.nextafter((plan.malicious_sites + 0.5) / len(updates), 0)
            strategy = FedTrimmedAvg(weighted_by_key=_WEIGHT, beta=beta)
        case "krum":
            strategy = Krum(weighted_by_key=_WEIGHT, num_malicious_nodes=plan.malicious_sites)
        case other:
            raise ValueError(f"aggregation {other!r} is unknown")
    arrays, _ = strategy.aggregate_train(0, [_reply(update) for update in updates])
    return {name: torch.from_numpy(np.array(arrays[name].numpy(), dtype=np.float32)) for name in arrays}


def _reply(update: State) -> Message:
    """An update as Flower's strategies take it, in float64: Krum's distances cancel badly in float32.

    The metadata is written out, since a new Message asks for a task's identity, which only a run has.
    """
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(update[name].double().numpy()) for name in sorted(update)}),
            "metrics": MetricRecord({_WEIGHT: 1.0}),
        }
    )
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type="train",
    )
    return Message(content, metadata=metadata)
