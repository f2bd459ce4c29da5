"""Looks for the users that move a release by more than C: `python -m simulations.benchmarks.movement`.

One user must move a step's clipped sum by at most C, whatever the server sends. What can break that is rounding that
depends on who else is there, made large by parameters far off. So this searches: cores and widths, parameters that are
random, scaled, near ties, climbed along the gradient and picked for how much they make of a rounding; users around
every multiple of a unit; for steps by both engines, sites trained together, metrics, and adapters. Each in processes of
their own under each family of kernels that the libraries can be told to take, and with 1, 2 and 4 threads. The worst
movement goes into docs/audit.md. Beside it stands what the same search finds where a batch has as many rows as there
are users, which shows that it can find something.

Intel's library takes one family of kernels on other makers' processors, whatever it is told; `--as-intel` builds a
two-line library with `cc` that makes it believe that it runs on an Intel processor, for this search alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.opacus_gradients import UnvouchedLayerError
from client.self_test import Engine, random_histories, rows_of_scores, rows_of_units, sums_by
from client.statistics import metric_sum
from client.training_together import check_sites_apart, clipped_sums_of_units
from common.metrics import ndcg, ranks
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.interface import InterestModel
from common.models.tasks.interest import Interest
from common.models.tasks.next_category import NextCategory
from common.models.tasks.task import Task
from simulations.benchmarks.table import add_to_document, machine

CORES = ("lstm", "gru", "attention", "decay")
WIDTHS = (16, 64, 128, 256, 384, 512, 1024)
ITEMS, EVENTS, WIDTH, CATEGORIES = 100, 12, 16, 3
SMALLEST_CLIP = 1e-4
"""What a site's policy lets a plan ask for, where it says nothing else."""
ROWS = 48
ALLOWED = 1.001
"""Of C: what the noise is drawn wider than stated for."""
OF_TASKS = ("random 1", "random 10", "near ties")
PARAMETERS_OF_WIDE = ("random 3", "random 10", "climbed")
PARAMETERS = ("random 1", "random 3", "random 10", "scaled 30", "near ties", "climbed", "picked")
KERNELS: dict[str, dict[str, str]] = {
    "as the machine is": {},
    "AVX-512": {"MKL_ENABLE_INSTRUCTIONS": "AVX512", "OPENBLAS_CORETYPE": "SkylakeX"},
    "AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell"},
    "SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OPENBLAS_CORETYPE": "Nehalem"},
}
THREADS = (1, 2, 4)


@dataclass(frozen=True)
class Found:
    """The worst movement of one model.

    Attributes:
        worst: in C, over all pairs of users that were tried.
        uneven: the same where a batch has as many rows as users; None where there is no such way.
        rows: of a unit, as the self-test gave them; 0: the model is refused.
        parameters: at which the worst was found.
    """

    what: str
    core: str
    hidden: int
    worst: float
    uneven: float | None
    rows: int
    parameters: str


def a_model(core: str, hidden: int, seed: int, task: str = "next-item") -> Recommend:
    """The family `recommend` over made-up items, at its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vectors = torch.nn.functional.normalize(torch.randn(ITEMS, WIDTH), dim=-1)
        member = torch.rand(ITEMS, CATEGORIES) < 0.5
        made: dict[str, Callable[[], Task | None]] = {
            "next-item": lambda: None,
            "interest": lambda: Interest(vectors),
            "next-category": lambda: NextCategory(vectors, member),
        }
        return Recommend(vectors, core=core, hidden_width=hidden, with_times=True, task=made[task]())


@torch.no_grad()
def _set(model: InterestModel, kind: str, everyone: HistoryBatch, seed: int) -> None:
    """Puts the parameters of a model at its start where rounding is made large, or may be."""
    generator = torch.Generator().manual_seed(seed)
    name, _, by = kind.partition(" ")
    for where, parameter in model.trainable().items():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name == "random":
            parameter.add_(float(by) * drawn)
        elif name == "scaled":
            parameter.add_(0.1 * drawn).mul_(float(by))
        elif "prior" in where:  # near ties: huge scores that differ by single roundings
            parameter.fill_(1e4).mul_(1 + 2.0**-22 * drawn.sign())
        else:
            parameter.add_(3 * drawn)
    if name == "climbed":
        _climb(model, everyone)
    if name == "picked":
        _pick(model, everyone, generator)


def _climb(model: InterestModel, everyone: HistoryBatch) -> None:
    """Ten steps up the loss, each coordinate by as much."""
    batch = everyone.first(ROWS).unit(ROWS)
    for _ in range(10):
        with torch.enable_grad():
            learned = [p for p in model.trainable().values() if p.requires_grad]
            grads = torch.autograd.grad(model.per_user_loss(batch).sum(), learned)
        for parameter, grad in zip(learned, grads, strict=True):
            parameter.add_(0.3 * torch.nan_to_num(grad).sign())


def _pick(model: InterestModel, everyone: HistoryBatch, generator: torch.Generator) -> None:
    """Climbs the amplification of a rounding in users' events by picking the best of random steps."""

    def gradient(scale: float) -> Tensor:
        vectors = model.vectors.clone() if isinstance(model, Recommend) else None
        assert vectors is not None
        assert isinstance(model, Recommend)
        model.vectors.mul_(scale)
        try:
            with sums_by("fast", model, ROWS) as clipped, torch.enable_grad():
                return clipped(everyone.first(4), 1.0)
        finally:
            model.vectors.copy_(vectors)

    def amplification() -> float:
        return float((gradient(1.0) - gradient(1.0 + 2.0**-23)).norm())

    best = amplification()
    for _ in range(8):
        before = model.trainable_state()
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        if (found := amplification()) > best:
            best = found
        else:
            model.load_trainable(before)


def pairs_around(rows: int) -> list[int]:
    """Numbers of users n for which n and n + 1 are compared: around multiples of kernels' tiles and of a unit."""
    return sorted({0, 7, 8, 15, 16, rows - 1, rows, rows + 1})


def worst_of(sum_of: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> float:
    """How far one user more moves a sum, at most, in C; the new one stands last, or first."""
    worst = 0.0
    for users in sizes:
        before = sum_of(torch.arange(1, users + 1))
        for more in (torch.arange(1, users + 2), torch.arange(users + 1)):
            worst = max(worst, float((sum_of(more) - before).norm()))
    return worst


def steps(
    model: InterestModel, everyone: HistoryBatch, engine: Engine, clip_norm: float = 1.0
) -> tuple[float, float, int]:
    """The worst movement of a step's sum; the same by batches of as many rows as users; rows of a unit."""
    rows = rows_of_units(model, ROWS, EVENTS, engine)
    even, uneven = 0.0, 0.0
    with sums_by(engine, model, rows) as clipped:
        even = worst_of(
            lambda index: (
                torch.stack([clipped(everyone.rows(u), clip_norm) for u in index.split(rows)]).sum(dim=0)
                / clip_norm
            ),
            pairs_around(rows if rows > 1 else 8),
        )
    with sums_by(engine, model, None) as clipped:
        uneven = worst_of(
            lambda index: clipped(everyone.rows(index), clip_norm) / clip_norm, (1, 2, 3, 7, 8, 9, 16, 24, 32)
        )
    return even, uneven, rows


def together(model: InterestModel, everyone: HistoryBatch) -> tuple[float, None, int]:
    """The worst movement of a site's sum among two others' of other parameters, and of theirs."""
    from client.training_together import _joined, _sums

    unit = check_sites_apart(model, ROWS, EVENTS)
    own = torch.cat([p.detach().flatten() for p in model.trainable().values()])
    parameters = torch.stack([own, own + 0.1, own - 0.1])
    joined = _joined([everyone])[0]
    with clipped_sums_of_units(model) as add:

        def sums(index: Tensor) -> Tensor:
            taken = [index, torch.arange(3, 8), torch.arange(20, 31)]
            return _sums(add, parameters, joined, taken, 1.0, ROWS, unit).flatten()

        return worst_of(sums, (0, 1, 2, 7, 8, ROWS - 1, ROWS)), None, unit


@torch.no_grad()
def metrics(model: InterestModel, everyone: HistoryBatch) -> tuple[float, float, int]:
    """The worst movement of the sum of users, hits and gains; the same with uneven batches."""
    rows = rows_of_scores(model, ROWS, EVENTS)
    held_out = np.random.default_rng(1).integers(0, ITEMS, len(everyone))

    def sum_of(at_once: int | None) -> Callable[[Tensor], Tensor]:
        def summed(index: Tensor) -> Tensor:
            scores = np.concatenate(
                [
                    model.scores(everyone.rows(unit).unit(at_once or len(unit)))[: len(unit)].double().numpy()
                    for unit in index.split(at_once or max(1, len(index)))
                ]
            )
            if not len(index):
                return torch.zeros(3, dtype=torch.float64)
            finite = np.nan_to_num(scores, nan=-1e30, posinf=1e30, neginf=-1e30)
            found = ranks(finite, held_out[index.numpy()], np.zeros(finite.shape, dtype=bool))
            return metric_sum((found <= 10).astype(np.float64), ndcg(found, 10))

        return summed

    even = worst_of(sum_of(rows), pairs_around(rows if rows > 1 else 8))
    return even, worst_of(sum_of(None), (1, 2, 3, 7, 8, 9, 16, 24, 32)), rows


def adapters(seed: int) -> Iterator[tuple[InterestModel, HistoryBatch]]:
    """Models with adapters on a small random language model, at parameters off their start."""
    from simulations.audit.conformance.subjects import a_subject, some_users

    with tempfile.TemporaryDirectory() as folder:
        for family in ("recommend", "classifier"):
            subject = a_subject(Path(folder), family, "lora", "cpu", off_start=3.0)
            yield subject.rewound(), subject.batch(some_users(110, subject.items, seed=seed), EVENTS + 1)


def search(widths: Sequence[int], seed: int) -> Iterator[Found]:
    """The worst of each model that is tried."""
    everyone = random_histories(ITEMS, 2 * ROWS + 8, EVENTS)
    for core in CORES:
        for hidden in widths:
            kinds = PARAMETERS if hidden <= 128 else PARAMETERS_OF_WIDE if hidden <= 512 else PARAMETERS[1:2]
            yield _worst("step", core, hidden, kinds, everyone, seed, lambda m, e: steps(m, e, "fast"))
            for task in ("interest", "next-category") if hidden == 16 else ():
                for clip_norm in (1.0, SMALLEST_CLIP):
                    measure = partial(steps, engine="fast", clip_norm=clip_norm)
                    what = f"step, {task}, C {clip_norm:g}"
                    yield _worst(what, core, hidden, OF_TASKS, everyone, seed, measure, task)
            if hidden in (64, 384):
                few = PARAMETERS[1:3]
                yield _worst(
                    "step, opacus", core, hidden, few[:1], everyone, seed, lambda m, e: steps(m, e, "opacus")
                )
                yield _worst("together", core, hidden, few, everyone, seed, together)
                yield _worst("metrics", core, hidden, PARAMETERS[:5], everyone, seed, metrics)
    for model, rows in adapters(seed):
        even, uneven, unit = steps(model, rows, "fast")
        yield Found("adapters", type(model).__name__.lower(), 16, even, uneven, unit, "random 3")


Measure = Callable[[InterestModel, HistoryBatch], tuple[float, float | None, int]]


def _worst(
    what: str,
    core: str,
    hidden: int,
    kinds: Sequence[str],
    everyone: HistoryBatch,
    seed: int,
    measure: Measure,
    task: str = "next-item",
) -> Found:
    worst = Found(what, core, hidden, 0.0, None, 0, "")
    for kind in kinds:
        model = a_model(core, hidden, seed, task)
        try:
            if kind in ("climbed", "picked"):
                rows_of_units(model, ROWS, EVENTS)  # refused models are not climbed
            _set(model, kind, everyone, seed + 1)
            even, uneven, rows = measure(model, everyone)
        except UnvouchedLayerError as error:
            return Found(what, core, hidden, worst.worst, worst.uneven, 0, str(error)[:60])
        odd = max(uneven, worst.uneven or 0.0) if uneven is not None else None
        if even >= worst.worst:
            worst = Found(what, core, hidden, even, odd, rows, kind)
        else:
            worst = Found(what, core, hidden, worst.worst, odd, worst.rows, worst.parameters)
    return worst


_SHIM = "int mkl_serv_intel_cpu_true(void){return 1;} int mkl_serv_intel_cpu(void){return 1;}\n"


def _as_intel(folder: Path) -> dict[str, str]:
    """What makes Intel's library take the kernels that it is told to, on another maker's processor."""
    (folder / "shim.c").write_text(_SHIM, encoding="ascii")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)
    return {"LD_PRELOAD": str(folder / "shim.so")}


def _table(found: dict[tuple[str, int], list[Found]]) -> list[str]:
    """One line for each family of kernels and number of threads."""
    lines = [
        "| kernels | threads | models | refused | largest movement, in C | of | in uneven batches | units |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kernels, threads), each in found.items():
        tried = [one for one in each if one.rows]
        worst = max(tried, key=lambda one: one.worst)
        uneven = max((one.uneven for one in tried if one.uneven is not None), default=0.0)
        units = ", ".join(str(rows) for rows in sorted({one.rows for one in tried if one.what != "together"}))
        lines.append(
            f"| {kernels} | {threads} | {len(tried)} | {len(each) - len(tried)} | {worst.worst:.6f} | {worst.what}, "
            f"{worst.core} {worst.hidden}, {worst.parameters} | {uneven:.2f} | {units} |"
        )
    return lines


def _by_model(found: Sequence[Found]) -> list[str]:
    """The worst over all kernels and threads, a line a core and a column a width."""
    lines = ["| step | " + " | ".join(map(str, WIDTHS)) + " |", "|---|" + "---|" * len(WIDTHS)]
    for core in CORES:
        cells = []
        for hidden in WIDTHS:
            own = [one for one in found if (one.what, one.core, one.hidden) == ("step", core, hidden)]
            tried = [one.worst for one in own if one.rows]
            cells.append(f"{max(tried):.6f}" if tried else "refused")
        lines.append(f"| {core} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Searches, prints what was found, and exits with 1 if a user moved anything by more than ALLOWED."""
    parser = argparse.ArgumentParser(description="How far one user moves a release, at worst.")
    parser.add_argument(
        "--as-intel", action="store_true", help="Also on another maker's processor (needs cc)."
    )
    parser.add_argument("--kernels", nargs="*", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--threads", nargs="*", type=int, default=list(THREADS))
    parser.add_argument("--widths", nargs="*", type=int, default=list(WIDTHS))
    parser.add_argument("--jobs", type=int, default=1, help="Processes at a time.")
    parser.add_argument("--seed", type=int, default=int(np.random.default_rng().integers(2**31)))
    parser.add_argument("--document", type=Path, help="Write the table to this page.")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        torch.set_num_threads(given.worker)
        for found in search(given.widths, given.seed):
            print(json.dumps(asdict(found)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        shim = _as_intel(Path(folder)) if given.as_intel else {}

        def one(place: tuple[str, int]) -> list[Found]:
            kernels, threads = place
            told = {**KERNELS[kernels], **(shim if KERNELS[kernels] else {})}
            environment = {n: v for n, v in os.environ.items() if not n.startswith("OPENBLAS_")} | told
            environment["OMP_NUM_THREADS"] = str(threads)
            arguments = [
                "--worker",
                str(threads),
                "--seed",
                str(given.seed),
                "--widths",
                *map(str, given.widths),
            ]
            command = [sys.executable, "-m", __spec__.name, *arguments]
            printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found = [Found(**json.loads(line)) for line in printed.stdout.splitlines()]
            print(_table({place: found})[-1], flush=True)
            return found

        places = [(kernels, threads) for kernels in given.kernels for threads in given.threads]
        with ThreadPoolExecutor(given.jobs) as pool:
            everything = dict(zip(places, pool.map(one, places), strict=True))
    all_found = [one for each in everything.values() for one in each]
    worst = max(one.worst for one in all_found)
    again = " ".join(
        ["python -m simulations.benchmarks.movement", *(["--as-intel"] if given.as_intel else [])]
    )
    page = [
        "## How far one user moves a release, at worst",
        "",
        f"`{again} --seed {given.seed}` on {machine()}, torch {torch.__version__}, numpy {np.__version__}.",
        "",
        *_table(everything),
        "",
        *_by_model(all_found),
        "",
        f"The worst movement of all is {worst:.6f} C; {ALLOWED} C is what the noise pays for.",
    ]
    print("\n".join(page))
    if given.document is not None:
        add_to_document("\n".join(page), given.document)
    sys.exit(0 if worst <= ALLOWED else 1)


if __name__ == "__main__":
    main()
