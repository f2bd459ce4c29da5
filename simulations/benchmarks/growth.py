"""How time and bytes grow: `python -m simulations.benchmarks.growth` adds a table of exponents to docs/benchmarks.md.

Each row runs one operation at several sizes, smallest to largest in turns, and fits time ~ size^exponent to the
fastest run of each size by least squares in logarithms. Time is of the processor, with one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from client.ledger import Ledger
from client.statistics import popularity_sum, transition_sum
from client.training import StepSettings, train_round
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.lora import LoraLinear
from common.privacy.mechanisms import PoissonSubsampledGaussian
from common.privacy.noise import SecureGaussian, SecurePoissonSampler
from common.wire import state_to_bytes
from server.aggregation import mean
from simulations.benchmarks.steps import Setting as StepSetting
from simulations.benchmarks.steps import built
from simulations.benchmarks.table import DOCUMENT, add_to_document, machine
from simulations.threads import one_thread

Work = Callable[[], object]


@dataclass(frozen=True)
class Growth:
    """One row: `make` sets a size up and gives what is timed; `weigh` gives bytes instead of time."""

    what: str
    grows: str
    sizes: tuple[int, ...]
    make: Callable[[int], Work] | None = None
    weigh: Callable[[int], int] | None = None


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log(values) over log(sizes)."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)), 1)[0])


def _vectors(items: int, width: int = 64) -> torch.Tensor:
    return normalize(torch.randn(items, width, generator=torch.Generator().manual_seed(0)), dim=-1)


def _batch(users: int, events: int, items: int) -> HistoryBatch:
    drawn = torch.randint(items, (users, events), generator=torch.Generator().manual_seed(1))
    return HistoryBatch(drawn, 1_500_000_000 + 86_400 * torch.arange(events).expand_as(drawn).contiguous())


_SETTINGS = StepSettings(
    sampling_rate=0.25, noise_multiplier=1.0, clip_norm=1.0, normaliser=10.0, steps=1, learning_rate=0.1
)


def _step(
    users: int = 256, events: int = 32, items: int = 2000, core: str = "lstm", negatives: int | None = None
) -> Work:
    chosen = None if negatives is None else torch.arange(negatives)
    model = Recommend(_vectors(items), core=core, hidden_width=16, with_times=True, negatives=chosen)
    batch = _batch(users, events, items)

    def work() -> object:
        return train_round(model, batch, _SETTINGS, sampler=SecurePoissonSampler(), noise=SecureGaussian())

    return work


def _lora(rank: int) -> Recommend:
    setting = StepSetting("lstm", users=16, events=8, items=200, lora=True)
    model = built(setting, "Fedtide")
    for module in model.modules():
        if isinstance(module, LoraLinear):
            inputs, outputs = module.lora_down.in_features, module.lora_up.out_features
            module.lora_down = torch.nn.Linear(inputs, rank, bias=False)
            module.lora_up = torch.nn.Linear(rank, outputs, bias=False)
    return model


def _lora_bytes(rank: int) -> int:
    state = _lora(rank).trainable_state()
    return len(state_to_bytes({name: value for name, value in state.items() if "lora" in name}))


def _histories(users: int, items: int, events: int = 50) -> Histories:
    chance = np.random.default_rng(2)
    total = users * events
    return Histories(
        users=np.array([f"{user:08d}" for user in range(users)]),
        offsets=np.arange(users + 1, dtype=np.int64) * events,
        items=chance.integers(0, items, total).astype(np.int32),
        times=np.arange(total, dtype=np.int64),
        kinds=np.zeros(total, np.int16),
        values=np.full(total, np.nan, np.float32),
        kind_names=("view",),
    )


def _popularity(events: int) -> Work:
    histories = _histories(events // 50, 4000)
    return lambda: popularity_sum(histories, 4000, 50)


def _mean(sites: int) -> Work:
    states = [{"weight": torch.randn(20_000)}] * sites
    return lambda: mean(states)


def _transitions(top: int) -> Work:
    histories, items = _histories(1000, 4000), torch.arange(top)
    return lambda: transition_sum(histories, items, 4000, 50, symmetric=True, gaps=20)


_EVENT = PoissonSubsampledGaussian(0.01, 10.0, 1)


def _ledger(folder: Path, entries: int) -> Ledger:
    ledger = Ledger.create(
        folder / f"{entries}-{time.monotonic_ns()}", epsilon=1000.0, delta=1e-5, typical_plan=[_EVENT]
    )
    for number in range(entries // 2):
        _round(ledger, number)
    return ledger


def _round(ledger: Ledger, number: int) -> None:
    reservation = ledger.reserve(
        run="growth", round=number, attempt=1, event=_EVENT, plan_hash="a" * 64, model_hash="b" * 64,
        nonce="c" * 32, clip_norm=1.0, normaliser=10.0,
    )  # fmt: skip
    # As where a server anchors each round: else a receipt holds the whole chain.
    ledger.release(reservation, b"update", anchored_seq=reservation.entry.seq - 1)


def _reserving(folder: Path) -> Callable[[int], Work]:
    def make(entries: int) -> Work:
        ledger, numbers = _ledger(folder, entries), iter(range(entries, 10**9))

        def work() -> None:
            for _ in range(10):
                _round(ledger, next(numbers))

        return work

    return make


def growths(folder: Path) -> list[Growth]:
    """The rows."""
    return [
        Growth("a private step", "users of a site", (256, 1024, 4096), lambda n: _step(users=n)),
        Growth("a private step, lstm", "events of a history", (16, 32, 64, 128), lambda n: _step(events=n)),
        Growth(
            "a private step, attention",
            "events of a history",
            (32, 64, 128, 256),
            lambda n: _step(events=n, core="attention", users=64),
        ),
        Growth(
            "a private step, loss over all items",
            "items",
            (2000, 8000, 32_000),
            lambda n: _step(items=n, users=64),
        ),
        Growth(
            "a private step, 256 negatives",
            "items",
            (2000, 8000, 32_000),
            lambda n: _step(items=n, users=64, negatives=256),
        ),
        Growth(
            "popularity at a site",
            "events",
            (100_000, 400_000, 1_600_000),
            _popularity,
        ),
        Growth("transitions at a site", "items that have them", (250, 500, 1000, 2000), _transitions),
        Growth(
            "the mean of a round's updates",
            "sites asked",
            (100, 400, 1600),
            _mean,
        ),
        Growth("charging and releasing", "entries of the ledger", (10, 100, 1000), _reserving(folder)),
        Growth(
            "verifying a ledger",
            "entries of the ledger",
            (10, 100, 1000),
            lambda n: _ledger(folder, n).verify,
        ),
        Growth("bytes of an update's adapters", "rank", (2, 4, 8, 16), weigh=_lora_bytes),
    ]


def measured(growth: Growth, turns: int) -> list[float]:
    """Seconds (the fastest of the turns) or bytes, for each size."""
    if growth.weigh is not None:
        return [float(growth.weigh(size)) for size in growth.sizes]
    if growth.make is None:
        raise ValueError(f"{growth.what} is neither timed nor weighed")
    works = [growth.make(size) for size in growth.sizes]
    best = [float("inf")] * len(works)
    for turn in range(turns + 1):
        for place, work in enumerate(works):
            began = time.process_time()
            work()
            if turn:  # the first one warms up
                best[place] = min(best[place], time.process_time() - began)
    return best


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    given = parser.parse_args()
    one_thread()
    lines = ["| what | grows with | sizes | from | to | exponent |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for growth in growths(Path(folder)):
            values = measured(growth, given.turns)
            shown = [f"{value:,.0f} B" if growth.weigh else f"{1000 * value:.3g} ms" for value in values]
            sizes = f"{growth.sizes[0]:,} to {growth.sizes[-1]:,}"
            slope = exponent(growth.sizes, values)
            lines.append(
                f"| {growth.what} | {growth.grows} | {sizes} | {shown[0]} | {shown[-1]} | {slope:.2f} |"
            )
            print(lines[-1], flush=True)
    text = (
        f"`python -m simulations.benchmarks.growth`, {machine()}; torch {torch.__version__}, one thread, CPU time, the "
        f"fastest of {given.turns} turns. [scale.md](scale.md) says what follows from it."
    )
    section = "\n".join(["## Growth", "", text, "", *lines, ""])
    if not given.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
