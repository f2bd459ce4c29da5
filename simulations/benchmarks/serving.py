"""Time to score one user, and a batch of users, over a catalog: `python -m simulations.benchmarks.serving`.

Item vectors are random; the model is what `fedtide recommend` runs, on one thread, after loading.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from common.config import make_plan
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from simulations.threads import one_thread


def median_milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after three that warm up."""
    times = []
    for number in range(repeats + 3):
        began = time.perf_counter()
        work()
        if number >= 3:
            times.append(1000 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def measure(items: int, repeats: int, batch: int) -> dict[str, float]:
    """Milliseconds to score, and to score and pick ten, for one user; and for each user of a batch."""
    plan = make_plan({}).model
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(items, plan.width, generator=generator), dim=-1)
    model = Recommend(
        vectors, core=plan.core, hidden_width=plan.hidden_width, with_times=plan.time_features
    ).eval()
    rows = torch.randint(0, items, (batch, plan.max_events), generator=generator)
    one = HistoryBatch(items=rows[:1], times=torch.zeros_like(rows[:1]))
    many = HistoryBatch(items=rows, times=torch.zeros_like(rows))

    def ten_best() -> torch.Tensor:
        scores = model.scores(one)[0]
        scores[one.items[0]] = float("-inf")
        return scores.topk(10).indices

    return {
        "items": float(items),
        "score one user, ms": median_milliseconds(lambda: model.scores(one), repeats),
        "ten best of one user, ms": median_milliseconds(ten_best, repeats),
        f"each user of a batch of {batch}, ms": median_milliseconds(lambda: model.scores(many), 10) / batch,
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    one_thread()
    print(json.dumps(measure(arguments.items, arguments.repeats, arguments.batch)))


if __name__ == "__main__":
    main()
