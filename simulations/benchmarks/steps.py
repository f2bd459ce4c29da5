"""What a private step costs: `python -m simulations.benchmarks.steps` adds a table to docs/benchmarks.md.

The same family, loss and users in four ways: plain PyTorch (torch's own LSTM or GRU, SGD), Fedtide's step (clip, noise
from the cryptographic generator, descent), and stock Opacus with its DPLSTM or DPGRU, by hooks and by ghost clipping.
Steps of all ways take turns in one process, and ratios are medians over turns, of CPU time; peak memory is of one
process for each way, beyond the built model.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from client.bookkeeping import clipped_sums
from client.training import _descend
from common.assets import language_model
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.history_encoder import HistoryEncoder
from common.models.interface import InterestModel
from common.models.item_vectors import item_vectors
from common.models.language_model import load_language_model
from common.privacy.noise import SecureGaussian, private_sum
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine
from simulations.threads import one_thread

PLAIN, OWN, HOOKS, GHOST = "plain PyTorch", "Fedtide", "Opacus hooks", "Opacus ghost"
STOCK_TURNS = 5
"""Turns of the stock ways, some of which take seconds a step."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """One model on one batch.

    Attributes:
        items: of the catalog.
        negatives: public ones that the loss ranks beside the target; None for the whole catalog.
        lora: whether histories are read by MiniLM with adapters on its top two layers, the lower ones cached.
        most: the largest ratio to plain PyTorch that is wanted, or None.
    """

    core: str
    width: int = 64
    hidden: int = 16
    users: int = 64
    events: int = 32
    items: int = 1682
    negatives: int | None = None
    lora: bool = False
    most: float | None = None

    def __str__(self) -> str:
        read = f"LoRA over cached layers, {self.core}" if self.lora else f"head, {self.core}"
        ranked = "" if self.negatives is None else f", {self.negatives} negatives"
        return f"{read}, {self.width} wide, state {self.hidden}{ranked}"


MOST = {"lstm": 1.20, "gru": 1.20, "attention": 1.35}
SETTINGS = (
    *(Setting(core, most=most) for core, most in MOST.items()),
    *(Setting(core, width=384, hidden=128, most=most) for core, most in MOST.items()),
    Setting("lstm", width=384, hidden=128, negatives=100, most=1.20),
    Setting("lstm", users=32, items=400, lora=True, most=1.10),
)
"""The plan's default sizes; a language model's full width; that with a loss that costs little; adapters."""


class Stock(nn.Module):
    """torch's or Opacus' recurrence as a core."""

    def __init__(self, kind: type[nn.Module], input_width: int, hidden_width: int) -> None:
        super().__init__()
        self.output_width = hidden_width
        self.net = kind(input_width, hidden_width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[users, events, input_width] -> [users, events, hidden_width]."""
        found: Tensor = self.net(x)[0]
        return found


def histories(setting: Setting) -> HistoryBatch:
    """Full histories of random items, a day apart."""
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(setting.items, (setting.users, setting.events), generator=generator)
    times = 1_000_000_000 + 86_400 * torch.arange(setting.events).expand_as(items).contiguous()
    return HistoryBatch(items, times)


def built(setting: Setting, way: str) -> Recommend:
    """The family `recommend` at its start."""
    torch.manual_seed(0)
    encoder = None
    if setting.lora:
        lm = load_language_model(language_model("all-MiniLM-L6-v2"))
        words = ("red", "old", "blue", "small", "lamp", "chair", "story", "river", "coat", "clock")
        texts = [f"{words[i % 10]} {words[i // 10 % 10]} {words[i // 100]}" for i in range(setting.items)]
        public = item_vectors(lm, texts, setting.width)
        encoder = HistoryEncoder(lm, texts, public.projection, most_tokens=160)
        vectors = public.vectors
    else:
        vectors = normalize(torch.randn(setting.items, setting.width), dim=-1)
    negatives = None if setting.negatives is None else torch.arange(setting.negatives)
    model = Recommend(
        vectors,
        core=setting.core,
        hidden_width=setting.hidden,
        encoder=encoder,
        negatives=negatives,
        with_times=True,
    )
    if setting.core != "attention" and way != OWN:
        from opacus.layers import DPGRU, DPLSTM

        stock = {"lstm": (nn.LSTM, DPLSTM), "gru": (nn.GRU, DPGRU)}[setting.core]
        model.core = Stock(stock[way != PLAIN], model.input_width, setting.hidden)
    return model.train()


def stepper(setting: Setting, way: str) -> Step:
    """One step of a way, over all users of the batch."""
    model = built(setting, way)
    batch = model.prepare(histories(setting))
    return {PLAIN: _plain, OWN: _own, HOOKS: _hooks, GHOST: _ghost}[way](model, batch)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def _plain(model: InterestModel, batch: HistoryBatch) -> Step:
    optimiser = _sgd(model)

    def step() -> None:
        optimiser.zero_grad()
        model.per_user_loss(batch).mean().backward()
        optimiser.step()

    return step


def _own(model: InterestModel, batch: HistoryBatch) -> Step:
    noise, parameters = SecureGaussian(), list(model.trainable().values())

    def step() -> None:
        with clipped_sums(model) as clipped:
            total = clipped(batch, 1.0)
        noised = private_sum(total, clip_norm=1.0, noise_multiplier=1.0, noise=noise)
        _descend(parameters, noised / len(batch), 0.1)

    return step


def _hooks(model: InterestModel, batch: HistoryBatch) -> Step:
    from opacus.grad_sample import GradSampleHooks
    from opacus.optimizers import DPOptimizer

    hooks = GradSampleHooks(model, loss_reduction="mean")
    optimiser = DPOptimizer(
        _sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(batch)
    )

    def step(_keep: object = hooks) -> None:
        optimiser.zero_grad()
        model.per_user_loss(batch).mean().backward()
        optimiser.step()

    return step


def _ghost(model: InterestModel, batch: HistoryBatch) -> Step:
    from opacus.grad_sample import GradSampleHooksFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    hooks = GradSampleHooksFastGradientClipping(model, max_grad_norm=1.0, loss_reduction="mean")
    optimiser = DPOptimizerFastGradientClipping(
        _sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(batch)
    )

    def step() -> None:
        optimiser.zero_grad()
        losses = model.per_user_loss(batch)
        DPTensorFastGradientClipping(hooks, optimiser, losses).backward()
        optimiser.step()

    return step


def ratios(setting: Setting, turns: int, ways: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """Milliseconds of a plain step, and way -> median ratio to it."""
    steps = {way: stepper(setting, way) for way in ways}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, step in steps.items():
            began = time.process_time()
            step()
            if turn:  # the first one warms up
                spent[way].append(time.process_time() - began)
    found = {
        way: statistics.median(own / plain for own, plain in zip(spent[way], spent[PLAIN], strict=True))
        for way in ways
    }
    return 1000 * statistics.median(spent[PLAIN]), found


def _resident(key: str) -> float:
    """Megabytes of this process, now (VmRSS) or at its most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _peak(setting: Setting, way: str, answer: multiprocessing.Queue[float]) -> None:
    one_thread()
    step = stepper(setting, way)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
    before = _resident("VmRSS")
    for _ in range(3):
        step()
    answer.put(_resident("VmHWM") - before)


def peak_megabytes(setting: Setting, way: str) -> float:
    """Growth of the largest resident size over three steps, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=_peak, args=(setting, way, answer))
    process.start()
    found = answer.get(timeout=600)
    process.join()
    return found


def measure(turns: int) -> list[Row]:
    """The rows of the table."""
    rows = []
    for setting in SETTINGS:
        stock = (HOOKS, GHOST) if setting.width == 64 else (HOOKS,)
        ms, found = ratios(setting, turns, (PLAIN, OWN))
        _, found_stock = ratios(setting, STOCK_TURNS, (PLAIN, *stock))
        found = found_stock | found
        wanted = None if setting.most is None else f"<= {setting.most:.2f}"
        met = None if setting.most is None else found[OWN] <= setting.most
        rows.append(Row(f"{setting}: Fedtide / plain ({ms:.0f} ms)", f"{found[OWN]:.2f}", wanted, met))
        rows += [Row(f"{setting}: {way} / plain", f"{found[way]:.2f}") for way in stock]
        if not setting.lora and setting.core == "lstm":
            faster = found[HOOKS] / found[OWN]
            rows.append(Row(f"{setting}: {HOOKS} / Fedtide", f"{faster:.1f}", ">= 8", faster >= 8))
            own, plain, hooks = (peak_megabytes(setting, way) for way in (OWN, PLAIN, HOOKS))
            rows.append(
                Row(
                    f"{setting}: peak memory, Fedtide / plain ({plain:.0f} MB; {HOOKS} {hooks:.0f} MB)",
                    f"{own / plain:.2f}",
                    "<= 1.20",
                    own <= 1.2 * plain,
                )
            )
    return rows


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=27)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    given = parser.parse_args()
    one_thread()
    rows = measure(given.turns)
    text = (
        f"`python -m simulations.benchmarks.steps`, {machine()}; torch {torch.__version__}, opacus "
        f"{version('opacus')}, one thread. Ratios of CPU time, medians of {given.turns} turns "
        f"(Opacus: {STOCK_TURNS}). Steps of 64 users "
        "(LoRA: 32) with 32 events, over 1,682 items (LoRA: 400). Plain: torch's own LSTM or GRU and SGD; Opacus: its "
        "DPLSTM or DPGRU. Where the loss ranks the whole catalog, it is most of a small model's step whichever way, "
        "and no way can be many times faster than another. At a language model's full width, what Fedtide takes beyond "
        "plain is above all the sums' float64 products, which keep one user's clipped gradient that user's own."
    )
    section = "\n".join(["## A private step", "", text, "", *as_table(rows), ""])
    print(section)
    if not given.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
