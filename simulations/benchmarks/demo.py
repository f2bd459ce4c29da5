"""What a demo takes beside its training: `python -m simulations.benchmarks.demo` adds a table to docs/benchmarks.md.

`fedtide simulate` as `make demo` calls it, in one process and then through Flower's engine with Ray, each in a new
process from its start to its end. Training is what the sites' private steps take, and beside them the training of the
model without privacy that the demo compares with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine

PRIVATE, OPEN, STATISTICS = "private training", "training without privacy", "statistics"


@dataclass(frozen=True)
class Spent:
    """Seconds of wall time: of parts, and of each round of fine-tuning."""

    parts: dict[str, float]
    rounds: list[float]


def inside(arguments: list[str], runs: Path) -> Spent:
    """Runs the demo in this process, and times its training."""
    import client.site
    import simulations.federation
    from simulations.cli import simulate_app

    parts = {PRIVATE: 0.0, OPEN: 0.0, STATISTICS: 0.0}

    def timed(owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def called(*given: Any, **named: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*given, **named)
            finally:
                parts[part] += time.monotonic() - began

        setattr(owner, name, called)

    timed(client.site, "train_round", PRIVATE)
    timed(client.site, "release_statistics", STATISTICS)
    timed(simulations.federation, "without_privacy", OPEN)
    simulate_app(arguments, standalone_mode=False)
    (run,) = (path for path in runs.iterdir() if path.is_dir())
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return Spent(parts, [each["seconds"] for each in records if each["phase"] == "update"])


def demo(engine: str) -> tuple[float, Spent]:
    """The demo in a new process: its wall time, and what it says of itself (through Ray: of rounds alone)."""
    with tempfile.TemporaryDirectory() as folder:
        runs, answer = Path(folder) / "runs", Path(folder) / "spent.json"
        command = [sys.executable, "-m", "simulations.benchmarks.demo", "--inside", engine]
        began = time.monotonic()
        subprocess.run(
            [*command, "--runs", str(runs), "--answer", str(answer)], check=True, stdout=subprocess.DEVNULL
        )
        wall = time.monotonic() - began
        return wall, Spent(**json.loads(answer.read_text()))


def measure() -> list[Row]:
    """The rows of the table."""
    wall, spent = demo("inline")
    private, training = spent.parts[PRIVATE], spent.parts[PRIVATE] + spent.parts[OPEN]
    _, through_ray = demo("flower")
    own, rays = statistics.median(spent.rounds), statistics.median(through_ray.rounds)
    return [
        Row("the demo in one process, from start to end", f"{wall:.1f} s"),
        Row("private training inside it", f"{private:.1f} s"),
        Row("training without privacy inside it", f"{spent.parts[OPEN]:.1f} s"),
        Row("statistics inside it", f"{spent.parts[STATISTICS]:.1f} s"),
        Row("the demo / all training inside it", f"{wall / training:.2f}", "<= 1.30", wall <= 1.3 * training),
        Row("the demo / private training inside it", f"{wall / private:.2f}"),
        Row("a round of ten sites in one process, median", f"{own:.2f} s"),
        Row("a round of ten sites through Flower and Ray, median", f"{rays:.2f} s"),
        Row("a round through Ray / in one process", f"{rays / own:.2f}"),
    ]


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inside", choices=["inline", "flower"], help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    given = parser.parse_args()
    if given.inside is not None:
        arguments = ["--name", "demo", "--engine", given.inside, "--runs", str(given.runs)]
        given.answer.write_text(json.dumps(asdict(inside(arguments, given.runs))))
        return
    before = os.getloadavg()[0]
    rows = measure()
    text = (
        f"`python -m simulations.benchmarks.demo`, {machine()}; load {before:.1f} before. Wall time; data and language "
        "model were fetched before."
    )
    section = "\n".join(["## The demo", "", text, "", *as_table(rows), ""])
    print(section)
    if not given.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
