"""What a round costs beside its training: `python -m simulations.benchmarks.deployment` adds it to docs/benchmarks.md.

A server and three sites on loopback, from the commands alone, with warm workers. Each round is taken apart
along the site that answered last, by times that the processes leave themselves (`tracing/sitecustomize.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine
from simulations.faults.place import Place
from simulations.faults.tiny import tiny_plan, write_data, write_language_model

SITES = ("east", "north", "south")
TRACING = Path(__file__).with_name("tracing")
PARTS = (
    "the SuperNode looks for messages",
    "it fetches the message, while a process starts",
    "the process goes on starting",
    "it takes the message over",
    "at the site beside the training",
    "the reply goes to the SuperNode and on to the server",
    "the server looks for replies, admits, countersigns",
    "it aggregates, and begins the next round",
)
_TRAINING = ("train_round", "release_statistics")


@dataclass(frozen=True)
class Round:
    """Seconds of one round: the parts in order, the training itself, and CPU of all ClientApps' processes."""

    parts: tuple[float, ...]
    training: float
    cpu: float

    @property
    def overhead(self) -> float:
        return sum(self.parts)


def rounds_of(lines: list[dict[str, Any]]) -> list[Round]:
    """The rounds that a trace tells of, without the last, which nothing follows, and the first two, which warm up.

    The first is one of statistics; in the second each worker builds the model.
    """
    asked = sorted((each for each in lines if each["what"] == "ask_sites"), key=lambda each: each["began"])
    found = []
    for now, following in pairwise(asked[2:]):
        within = [each for each in lines if now["began"] <= each["began"] <= now["ended"] and each is not now]
        sites = {each["folder"] for each in within}
        last = max(sites, key=lambda site: _one(within, site, "_push_messages")["ended"])
        found.append(_taken_apart(now, following["began"], within, last))
    return found


def _one(lines: list[dict[str, Any]], site: str, *what: str) -> dict[str, Any]:
    (found,) = [each for each in lines if each["folder"] == site and each["what"] in what]
    return found


def _taken_apart(asked: dict[str, Any], following: float, lines: list[dict[str, Any]], site: str) -> Round:
    pulled, taken, answered, pushed = (
        _one(lines, site, what)
        for what in ("_pull_and_store_message", "pull_task_input", "_answered", "_push_messages")
    )
    trained = _one(lines, site, *_TRAINING)
    training = trained["ended"] - trained["began"]
    times = (
        asked["began"],
        pulled["began"],
        pulled["ended"],
        max(pulled["ended"], taken["began"]),
        answered["began"],
        answered["ended"],
        pushed["ended"],
        asked["ended"],
        following,
    )
    parts = [after - before for before, after in pairwise(times)]
    parts[4] -= training
    cpu = sum(each["cpu"] for each in lines if each["what"] == "push_message")
    return Round(tuple(parts), training, cpu)


@contextmanager
def deployed(folder: Path) -> Iterator[Place]:
    """Three sites that are up and enrolled, and leave a trace; ended afterwards."""
    path = [str(TRACING), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "FEDTIDE_TRACE": str(folder / "trace"),
        "FEDTIDE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    folder.mkdir(parents=True)
    place = Place(folder, environment, own_network=False)
    try:
        write_language_model(place.model)
        write_data(folder / "data")
        (folder / "typical.json").write_text(tiny_plan(place.model, "typical").to_json())
        place.well(
            "server", "init", place.server, "--host", place.host, "--port", place.ports[0],
            "--control-port", place.ports[1], "--metrics-port", place.ports[2],
        )  # fmt: skip
        place.start_server()
        for name in SITES:
            place.make_site(name)
            place.enroll(name)
            place.start_site(name)
        place.wait_online(*SITES)
        yield place
    finally:
        for running in reversed(place.up.values()):
            running.end()


def measure(folder: Path, rounds: int) -> list[Round]:
    """The rounds of one run of three sites.

    Raises:
        RuntimeError: the run did not end well.
    """
    with deployed(folder) as place:
        plan = {"quorum": None, "minimum_sites": len(SITES), "round_deadline": 300.0}
        run = place.begin("bench", rounds, **plan)
        if run.process.wait():
            raise RuntimeError(f"the benchmark's run did not end well: {run.said()}")
    return rounds_of([json.loads(line) for line in (folder / "trace").read_text().splitlines()])


def as_markdown(rounds: list[Round], load: tuple[float, float]) -> str:
    """A section for the page of benchmarks."""
    overheads = [each.overhead for each in rounds]
    median, whole = statistics.median(overheads), statistics.mean(overheads)
    cpu, training = (
        statistics.mean(each) for each in zip(*((r.cpu, r.training) for r in rounds), strict=True)
    )
    rows = [
        Row("a round beside its training, three sites, median", f"{median:.2f} s", "< 4 s", median < 4),
        Row("CPU of the three ClientApps' processes in a round", f"{cpu:.2f} s"),
        Row("the training of the site that answers last", f"{training:.2f} s"),
    ]
    lines = [
        "## Rounds between organisations",
        "",
        f"`python -m simulations.benchmarks.deployment`, {machine()}; "
        f"{len(rounds)} rounds after two that warm up. Server and sites share the "
        f"machine; its load (one minute's) was {load[0]:.1f} before and {load[1]:.1f} after, where 1 a core is full: "
        "what is CPU took longer by as much. Parts along the site that answered last:",
        "",
        *as_table(rows),
        "",
        "| part of a round, mean | seconds | share |",
        "|---|---|---|",
    ]
    for number, name in enumerate(PARTS):
        seconds = statistics.mean(each.parts[number] for each in rounds)
        lines.append(f"| {name} | {seconds:.2f} | {seconds / whole:.0%} |")
    return "\n".join([*lines, f"| all of them | {whole:.2f} | 100% |", ""])


def main() -> None:
    """Prints the tables, and adds them to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where it is deployed; else a temporary one"
    )
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rounds = measure(Path(folder) / "deployed", arguments.rounds)
    section = as_markdown(rounds, (before, os.getloadavg()[0]))
    print(section)
    if not arguments.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
