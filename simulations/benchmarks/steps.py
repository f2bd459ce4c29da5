"""What a private step costs: `python -m simulations.benchmarks.steps` adds a table to docs/benchmarks.md.

The same family, loss and users in four ways: plain PyTorch (torch's own LSTM or GRU, SGD), Fedtide's step (clip, noise
from the cryptographic generator, descent), and stock Opacus with its DPLSTM or DPGRU, by hooks and by ghost clipping.
Steps of all ways take turns in one process, and ratios are medians over turns, of CPU time; peak memory is of one
process for each way, beyond the built model. With --device cuda, time is the wall's until the device is done, memory
is the device's, and adapters are trained with the frozen part in bfloat16, too.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from client.self_test import Engine, rows_of_units, sums_by
from client.training import _descend
from common.assets import language_model
from common.memory import memory_kept
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
BY_OPACUS = "Fedtide with engine opacus"
FASTER = 8
"""How many times faster than Opacus' hooks a step is to be, wherever plain PyTorch is."""
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
        precision: of what is frozen in MiniLM.
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
    precision: str = "float32"
    most: float | None = None

    def __str__(self) -> str:
        read = f"LoRA over cached layers, {self.core}" if self.lora else f"head, {self.core}"
        read += "" if self.precision == "float32" else f", frozen part in {self.precision}"
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

IN_BFLOAT16 = Setting("lstm", users=32, items=400, lora=True, precision="bfloat16", most=1.10)


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
        precision = getattr(torch, setting.precision)
        encoder = HistoryEncoder(lm, texts, public.projection, most_tokens=160, precision=precision)
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
    if setting.core != "attention" and way not in (OWN, BY_OPACUS):
        from opacus.layers import DPGRU, DPLSTM

        stock = {"lstm": (nn.LSTM, DPLSTM), "gru": (nn.GRU, DPGRU)}[setting.core]
        model.core = Stock(stock[way != PLAIN], model.input_width, setting.hidden)
    return model.train()


def stepper(setting: Setting, way: str, device: str) -> Step:
    """One step of a way, over all users of the batch."""
    model = built(setting, way).to(device)
    batch = model.prepare(histories(setting).to(device))
    return {PLAIN: _plain, OWN: _own, BY_OPACUS: _by_opacus, HOOKS: _hooks, GHOST: _ghost}[way](model, batch)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def _plain(model: InterestModel, batch: HistoryBatch) -> Step:
    optimiser = _sgd(model)

    def step() -> None:
        optimiser.zero_grad()
        model.per_user_loss(batch).mean().backward()
        optimiser.step()

    return step


def _own(model: InterestModel, batch: HistoryBatch, engine: Engine = "fast") -> Step:
    noise, parameters = SecureGaussian(), list(model.trainable().values())

    def step() -> None:
        with sums_by(engine, model, len(batch)) as clipped:
            total = clipped(batch, 1.0)
        noised = private_sum(total, clip_norm=1.0, noise_multiplier=1.0, noise=noise)
        _descend(parameters, noised / len(batch), 0.1)

    return step


def _by_opacus(model: InterestModel, batch: HistoryBatch) -> Step:
    return _own(model, batch, "opacus")


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


def now(device: str) -> float:
    """Seconds: of this process' CPU time, or until the device has done all that it was given."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ratios(
    setting: Setting, turns: int, ways: tuple[str, ...], device: str
) -> tuple[float, dict[str, float]]:
    """Milliseconds of a plain step, and way -> median ratio to it."""
    steps = {way: stepper(setting, way, device) for way in ways}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, step in steps.items():
            began = now(device)
            step()
            if turn:  # the first one warms up
                spent[way].append(now(device) - began)
    found = {
        way: statistics.median(own / plain for own, plain in zip(spent[way], spent[PLAIN], strict=True))
        for way in ways
    }
    return 1000 * statistics.median(spent[PLAIN]), found


def _resident(key: str) -> float:
    """Megabytes of this process, now (VmRSS) or at its most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _peak(setting: Setting, way: str, device: str, answer: multiprocessing.Queue[float]) -> None:
    one_thread()
    step = stepper(setting, way, device)
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        began = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        answer.put((torch.cuda.max_memory_allocated() - began) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
    before = _resident("VmRSS")
    for _ in range(3):
        step()
    answer.put(_resident("VmHWM") - before)


def peak_megabytes(setting: Setting, way: str, device: str) -> float:
    """Growth of the largest resident size, or of the device's memory, over three steps in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=_peak, args=(setting, way, device, answer))
    process.start()
    found = answer.get(timeout=600)
    process.join()
    return found


def tokens_of(setting: Setting) -> int:
    """Tokens that the top layers read in a step."""
    encoder = built(setting, OWN).encoder
    assert encoder is not None
    return int((encoder.token_sequences(histories(setting).items)[1] >= 0).sum())


def operations_of(setting: Setting, device: str) -> int:
    """Floating-point operations of the matrix products in a plain step, as torch counts them."""
    step = stepper(setting, PLAIN, device)
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def fastest_product(precision: str, device: str) -> float:
    """Floating-point operations a second of one large matrix product, of nine the fastest: what the device can do."""
    size = 1024 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(getattr(torch, precision))
    spent = []
    for _ in range(9):
        began = now(device)
        matrix @ matrix
        spent.append(now(device) - began)
    return 2 * size**3 / min(spent)


def self_test_steps(setting: Setting, device: str, step: float) -> float:
    """Time of what a model shows at each request's parameters, the first request of a process left out, in steps.

    Args:
        step: seconds of one.
    """
    model, spent = built(setting, OWN).to(device), []
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.mul_(1.001)
        began = now(device)
        rows_of_units(model, setting.users, setting.events)
        spent.append(now(device) - began)
    return statistics.median(spent[1:]) / step


def of_tokens(setting: Setting, device: str, plain: float, ratio: float) -> list[Row]:
    """Rows about how fast adapters are trained.

    Args:
        plain: seconds of a plain step.
        ratio: Fedtide's to that.
    """
    tokens = tokens_of(setting)
    share = operations_of(setting, device) / plain / fastest_product(setting.precision, device)
    return [
        Row(
            f"{setting}: tokens a second, {OWN} (plain)",
            f"{tokens / plain / ratio:,.0f} ({tokens / plain:,.0f})",
        ),
        Row(
            f"{setting}: share of what this device's largest products reach, {OWN} (plain)",
            f"{share / ratio:.0%} ({share:.0%})",
        ),
    ]


def measure(turns: int, device: str) -> list[Row]:
    """The rows of the table."""
    rows = []
    for setting in SETTINGS if device == "cpu" else (*SETTINGS, IN_BFLOAT16):
        stock = (HOOKS, GHOST) if setting.width == 64 else (HOOKS,)
        ms, found = ratios(setting, turns, (PLAIN, OWN), device)
        _, found_stock = ratios(setting, STOCK_TURNS, (PLAIN, BY_OPACUS, *stock), device)
        found = found_stock | found
        wanted = None if setting.most is None else f"<= {setting.most:.2f}"
        met = None if setting.most is None else found[OWN] <= setting.most
        rows.append(Row(f"{setting}: Fedtide / plain ({ms:.0f} ms)", f"{found[OWN]:.2f}", wanted, met))
        rows += [Row(f"{setting}: {way} / plain", f"{found[way]:.2f}") for way in (BY_OPACUS, *stock)]
        asked_in = self_test_steps(setting, device, ms * found[OWN] / 1000)
        rows.append(
            Row(f"{setting}: the self-test at a request's parameters, in steps of Fedtide", f"{asked_in:.1f}")
        )
        if setting.lora:
            rows += of_tokens(setting, device, ms / 1000, found[OWN])
        if not setting.lora and setting.core == "lstm":
            faster = found[HOOKS] / found[OWN]
            asked = (
                found[HOOKS] >= FASTER
            )  # plain PyTorch itself is that much faster here: else nothing can be
            wanted, met = (f">= {FASTER}", faster >= FASTER) if asked else (None, None)
            rows.append(Row(f"{setting}: {HOOKS} / Fedtide", f"{faster:.1f}", wanted, met))
            own, plain, hooks = (peak_megabytes(setting, way, device) for way in (OWN, PLAIN, HOOKS))
            rows.append(
                Row(
                    f"{setting}: peak memory, Fedtide / plain ({plain:.0f} MB; {HOOKS} {hooks:.0f} MB)",
                    f"{own / plain:.2f}",
                    "<= 1.20",
                    own <= 1.2 * plain,
                )
            )
    return rows


def kernels() -> str:
    """The vector instructions that torch takes, and the kernels of numpy's BLAS, which may be of another kind."""
    blas = (each for each in threadpool_info() if each["user_api"] == "blas")
    named = {f"{each['internal_api']} {each.get('architecture', '')}".rstrip() for each in blas}
    return f"torch {torch.backends.cpu.get_cpu_capability()}, numpy {', '.join(sorted(named))}"


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=27)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="let glibc keep what is freed, as Fedtide's training does",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU here: leave it out for the CPU")
    one_thread()
    with memory_kept() if given.keep_memory else nullcontext():
        rows = measure(given.turns, given.device)
    gpu = "" if given.device == "cpu" else f", {torch.cuda.get_device_name()}"
    command = "python -m simulations.benchmarks.steps" + (" --device cuda" if gpu else "")
    command += " --keep-memory" if given.keep_memory else ""
    text = (
        f"`{command}`, {machine()}{gpu}, {kernels()}; torch {torch.__version__}, opacus "
        f"{version('opacus')}, one thread. Ratios of {'wall' if gpu else 'CPU'} time, medians of {given.turns} turns "
        f"(Opacus: {STOCK_TURNS}). Steps of 64 users "
        "(LoRA: 32) with 32 events, over 1,682 items (LoRA: 400). Plain: torch's own LSTM or GRU and SGD; Opacus: its "
        f"DPLSTM or DPGRU. That a step is {FASTER} times faster than Opacus' hooks is asked where plain PyTorch is: "
        "where the loss ranks the whole catalog, it is most of a small model's step whichever way, and no way can be "
        "many times faster than another."
    )
    title = (
        "## A private step" + (" on a GPU" if gpu else "") + (", memory kept" if given.keep_memory else "")
    )
    section = "\n".join([title, "", text, "", *as_table(rows), ""])
    print(section)
    if not given.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
