"""How admitted updates become one: the mean, or one of Flower's aggregations that withstand bad sites.

Weights are a public constant, the same for every site. What is added here has passed admission.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from common.config import ServerPlan
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
    """The fewest admitted updates for which the plan's aggregation means anything."""
    match plan.aggregation:
        case "krum":
            return max(plan.minimum_sites, 2 * plan.malicious_sites + 3)
        case "trimmed-mean":
            return max(plan.minimum_sites, 2 * plan.malicious_sites + 1)
        case _:
            return plan.minimum_sites


def _with_flower(plan: ServerPlan, updates: Sequence[State]) -> dict[str, Tensor]:
    from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum

    match plan.aggregation:
        case "median":
            strategy = FedMedian(weighted_by_key=_WEIGHT)
        case "trimmed-mean":
            # Flower trims int(beta * n) from each end; the half keeps rounding from losing one.
            beta = math.nextafter((plan.malicious_sites + 0.5) / len(updates), 0)
            strategy = FedTrimmedAvg(weighted_by_key=_WEIGHT, beta=min(beta, 0.499))
        case "krum":
            strategy = Krum(weighted_by_key=_WEIGHT, num_malicious_nodes=plan.malicious_sites)
        case other:
            raise ValueError(f"aggregation {other!r} is unknown")
    replies = [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({name: Array(update[name].numpy()) for name in sorted(update)}),
                    "metrics": MetricRecord({_WEIGHT: 1.0}),
                }
            ),
            dst_node_id=place + 1,
            message_type="train",
        )
        for place, update in enumerate(updates)
    ]
    arrays, _ = strategy.aggregate_train(0, replies)
    return {name: torch.from_numpy(np.array(arrays[name].numpy(), dtype=np.float32)) for name in arrays}
