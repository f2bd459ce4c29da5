"""What goes over the wire: `python -m simulations.benchmarks.message_sizes` adds a table to docs/benchmarks.md.

The request and the reply of a round of private fine-tuning, with a ledger's own receipt, as Flower serialises them;
the model reads MovieLens-100K's catalog with all-MiniLM-L6-v2. Nothing is trained: an update is as large as the
parameters, whatever it says.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from client.ledger import Ledger
from common.assets import home, language_model
from common.config import Plan, make_plan
from common.models.build import build_model, item_texts
from common.phases import Phase
from common.precision import broadcast, decoded, encoded
from common.privacy.anchors import Countersignature
from common.wire import Request, State, Update, answer_to_records, request_to_records, state_to_bytes
from server.registry import Registry
from simulations.benchmarks.precision import PLAIN, WIRES
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine
from simulations.datasets import load_movielens_100k
from simulations.threads import one_thread

_NONCE = "ab" * 16
_EXPIRES = 2**31
_MOST = 0.02


def bytes_of(content: RecordDict) -> int:
    """Bytes of all objects that Flower sends for a message's content."""
    return sum(len(each.deflate()) for each in get_all_nested_objects(content).values())


def round_bytes(plan: Plan, state: State, folder: Path) -> tuple[int, int]:
    """What one round brings to one site, and what it sends: in the second round, when there is an anchor.

    Args:
        plan: calibrated.
        folder: gets a ledger and a registry.
    """
    ledger_folder, registry = folder / "ledger", Registry(folder / "registry")
    Ledger.create(ledger_folder, epsilon=500, delta=1e-5, typical_plan=plan.events()).disconnect()
    anchor: Countersignature | None = None
    with Ledger.open(ledger_folder) as ledger:
        registry.enroll("bench", ledger.entries()[0])
        for number in (1, 2):
            request = Request(
                run="20260101-000000-bench",
                round=number,
                attempt=1,
                nonce=_NONCE,
                plan=plan.model_dump_json(),
                state=broadcast(state, plan.wire.parameters),
                anchor=None if anchor is None else anchor.to_bytes(),
                site=ledger.key_id,
            )
            if anchor is not None:
                ledger.anchor(anchor)
            stated = plan.stated(Phase.UPDATE)
            reservation = ledger.reserve(
                run=request.run,
                round=number,
                attempt=1,
                event=plan.round_event(),
                plan_hash=plan.digest(),
                model_hash=request.model_digest,
                nonce=_NONCE,
                clip_norm=stated.clip_norm,
                normaliser=stated.normaliser,
                learning_rate=stated.learning_rate,
            )
            sent = encoded(state, plan.wire.precision)
            receipt = ledger.release(
                reservation, state_to_bytes(sent), anchored_seq=0 if anchor is None else anchor.seq
            )
            anchor = registry.accept(registry.chain(ledger.key_id).extended(receipt.entries))
    down = bytes_of(request_to_records(registry.signed(request, expires=_EXPIRES)))
    return down, bytes_of(answer_to_records(Update.of(sent, receipt.to_bytes())))


@dataclass(frozen=True)
class Weights:
    """Of one round of one site.

    Attributes:
        down, up: bytes.
        numbers: of the update.
        encoding, decoding: CPU seconds of both ends, medians.
    """

    down: int
    up: int
    numbers: int
    encoding: float
    decoding: float


def measure(mode: str) -> tuple[dict[str, Weights], int]:
    """What a round weighs by what travels how, and the bytes of the language model's own file."""
    data = load_movielens_100k()
    plan = make_plan({"name": "bench", "model": {"mode": mode}, "privacy": {"noise_multiplier": 60.0}})
    plan = plan.for_catalog(data.catalog.digest())
    model_folder = language_model(plan.model.encoder)
    texts = item_texts(data.catalog.texts, data.catalog.categories)
    built = build_model(
        plan.model,
        texts,
        model_folder,
        cache=home() / "item-vectors",
        witness_places=plan.privacy.witness_places,
    )
    # Numbers of no meaning, all different: Flower sends what is alike once.
    state = {name: torch.randn_like(value) for name, value in built.model.trainable_state().items()}
    found: dict[str, Weights] = {}
    for name, wire in WIRES.items():
        rounded, precision = plan.model_copy(update={"wire": wire}), wire.precision
        with tempfile.TemporaryDirectory() as folder:
            down, up = round_bytes(rounded, state, Path(folder))
        encoding = _cpu(lambda precision=precision: encoded(state, precision))  # type: ignore[misc]
        sent = encoded(state, precision)
        decoding = _cpu(lambda sent=sent: decoded(sent))  # type: ignore[misc]
        numbers = sum(value.numel() for value in state.values())
        found[name] = Weights(down, up, numbers, encoding, decoding)
    return found, (model_folder / "model.safetensors").stat().st_size


def _cpu(work: Callable[[], object], often: int = 9) -> float:
    """Median CPU seconds."""
    found = []
    for _ in range(often):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def rows_of(mode: str, weights: dict[str, Weights], whole: int) -> list[Row]:
    """The lines of a mode."""
    plain = weights[PLAIN]
    both = plain.down + plain.up
    rows = []
    for name, each in weights.items():
        value = f"{each.down / 1000:,.0f} + {each.up / 1000:,.0f} kB"
        if name != PLAIN:
            cpu = f"{1000 * each.encoding:.1f} + {1000 * each.decoding:.1f} ms"
            value += f", {(each.down + each.up) / both:.0%}; rounding {each.numbers:,} numbers and reading them {cpu}"
        rows.append(Row(f"{mode}, {name}: down and up, one site and round", value))
    share = both / whole
    what = f"{mode}, {PLAIN}: share of the language model's {whole / 1e6:.1f} MB"
    return [*rows, Row(what, f"{share:.2%}", "< 2 %", share < _MOST)]


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    import flwr

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    arguments = parser.parse_args()
    one_thread()
    rows = [row for mode in ("lora", "vectors") for row in rows_of(mode, *measure(mode))]
    command = "python -m simulations.benchmarks.message_sizes"
    section = "\n".join(
        [
            "## Bytes of a round",
            "",
            f"`{command}`, {machine()}, Flower {flwr.__version__}, torch {torch.__version__}. Objects as Flower sends "
            "them, receipt, witness, and the plan's text included. Rounding and reading: CPU time, medians of nine.",
            "",
            *as_table(rows),
            "",
        ]
    )
    print(section)
    if not arguments.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
