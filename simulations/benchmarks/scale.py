"""Many sites on few cores: `python -m simulations.benchmarks.scale` adds a table to docs/benchmarks.md.

Made-up sites with a few users each, every one with a folder, histories, key and ledger of its own; an inline run in
head mode asks 100 of them in each round, chosen at random, and everything that a run does is done: charges, receipts,
admission, checkpoints. Each number of sites is run in a session of its own; CPU is that of all its processes, and
memory the largest resident size of each, added, so pages that they share count for each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.config import Plan, make_plan
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.planning import smallest_budget
from server.registry import Registry
from simulations.benchmarks.comparison_workload import Clock
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine
from simulations.sites import enroll_site, make_site

ITEMS, EVENTS, ASKED = 1000, 20, 100
WORDS = (
    *("red", "old", "blue", "small", "green", "tall", "quiet", "warm", "sharp", "soft"),
    *("lamp", "chair", "story", "river", "coat", "clock", "stone", "bread", "song", "wheel"),
)


def catalog() -> Catalog:
    """Items with three words each."""
    texts = tuple(f"{WORDS[i % 20]} {WORDS[i // 20 % 20]} {WORDS[i // 400]}" for i in range(ITEMS))
    return Catalog(tuple(f"i{i}" for i in range(ITEMS)), texts, ((),) * ITEMS)


def plan_of(sites: int, users: int, rounds: int) -> Plan:
    """`recommend` on frozen item vectors: five steps a round, each user in one of them on average."""
    return (
        make_plan(
            {
                "name": f"scale-{sites}",
                "model": {"negatives": 256, "max_events": EVENTS},
                "privacy": {"epsilon": 8.0, "delta": 1e-5, "sampling_rate": 0.2, "users_per_site": users},
                "training": {"rounds": rounds, "steps_per_round": 5},
                "server": {"expected_sites": sites, "sites_per_round": min(ASKED, sites)},
            }
        )
        .calibrated()
        .for_catalog(catalog().digest())
    )


def histories(site: int, users: int) -> Histories:
    """Made-up ones."""
    chance = np.random.default_rng(site)
    events = users * EVENTS
    return Histories(
        users=np.array([f"{site}-{user}" for user in range(users)]),
        offsets=np.arange(users + 1, dtype=np.int64) * EVENTS,
        items=chance.integers(0, ITEMS, events).astype(np.int32),
        times=1_500_000_000 + np.cumsum(chance.integers(1, 1000, events)).astype(np.int64),
        kinds=np.zeros(events, np.int16),
        values=np.full(events, np.nan, np.float32),
        kind_names=("view",),
    )


@dataclass(frozen=True)
class _Part:
    root: Path
    numbers: range
    users: int
    plan: str
    budget: float


def _make_part(part: _Part) -> None:
    plan = Plan.model_validate_json(part.plan)
    for number in part.numbers:
        training = histories(number, part.users)
        make_site(
            part.root / f"{number:05d}",
            f"site-{number}",
            training,
            plan,
            part.root / "catalog.jsonl",
            part.budget,
        )


def make_all(root: Path, sites: int, users: int, plan: Plan) -> float:
    """Makes and enrols sites, on all cores; seconds."""
    began = time.monotonic()
    root.mkdir(parents=True)
    catalog().save(root / "catalog.jsonl")
    budget, _ = smallest_budget(plan.events(), plan.privacy.delta)
    workers = os.cpu_count() or 1
    parts = [
        _Part(root, range(first, sites, workers), users, plan.model_dump_json(), budget)
        for first in range(workers)
    ]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_make_part, parts))
    registry = Registry(root / "registry")
    with registry.kept_open():
        for number in range(sites):
            enroll_site(root / f"{number:05d}", f"site-{number}", registry)
    return time.monotonic() - began


@dataclass(frozen=True)
class Found:
    """Of one run: seconds a round in all and of the processors, of each round by its record, and megabytes.

    The first round waits for the workers, which have begun to import when the run began.
    """

    wall: float
    cpu: float
    rounds: list[float]
    peak: float


def run(root: Path, sites: int, users: int, rounds: int) -> Found:
    """A whole inline run over sites that are there; to be called in a process of its own."""
    from client.app import SITES_FOLDER
    from common.assets import home, language_model
    from common.models.build import build_model, item_texts
    from server.app import NODES_EXPECTED, REGISTRY_FOLDER, RUN_FOLDER
    from server.runs import RunFolder
    from simulations.engines import run_in_this_process
    from simulations.sites import SimulatedSite

    plan, items = plan_of(sites, users, rounds), catalog()
    folder = RunFolder.create(root / "runs", plan, items)
    built = build_model(
        plan.model,
        item_texts(items.texts, items.categories),
        language_model(plan.model.encoder),
        cache=home() / "item-vectors",
        categories=items.categories,
        witness_places=plan.privacy.witness_places,
    )
    folder.save_round(0, built.model.trainable_state())
    environment = {
        RUN_FOLDER: str(folder.path),
        SITES_FOLDER: str(root),
        REGISTRY_FOLDER: str(root / "registry"),
        NODES_EXPECTED: str(sites),
    }
    listed = [
        SimulatedSite(f"site-{number}", root / f"{number:05d}", users, users * EVENTS)
        for number in range(sites)
    ]
    clock = Clock()
    with clock:
        run_in_this_process(environment, listed)
        wall, cpu = clock.now()
    records = list(folder.records())
    if any(len(record["admitted"]) != min(ASKED, sites) for record in records):
        raise RuntimeError(f"a round admitted {[len(record['admitted']) for record in records]} updates")
    return Found(
        wall=wall / rounds,
        cpu=cpu / rounds,
        rounds=[float(record["seconds"]) for record in records],
        peak=clock.peak,
    )


def _run_apart(root: Path, sites: int, users: int, rounds: int) -> Found:
    command = [sys.executable, "-m", "simulations.benchmarks.scale", "--run", str(root)]
    options = ["--sites", str(sites), "--users", str(users), "--rounds", str(rounds)]
    # In a session of its own, by which the clock knows its processes.
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, start_new_session=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, many: int, users: int, rounds: int) -> list[Row]:
    """The rows of the table."""
    rows, peaks = [], {}
    for sites in (ASKED, many):
        root = folder / str(sites)
        made = None if root.exists() else make_all(root, sites, users, plan_of(sites, users, rounds))
        found = _run_apart(root, sites, users, rounds)
        seconds = statistics.median(found.rounds)
        peaks[sites] = found.peak
        last = sites == many
        if made is not None:
            rows.append(Row(f"{sites:,} sites: making and enrolling one", f"{1000 * made / sites:.0f} ms"))
        rows.append(
            Row(
                f"{sites:,} sites: a round of {ASKED} of them, median of {rounds}",
                f"{seconds:.2f} s (first: {found.rounds[0]:.1f} s)",
                "< 2 s" if last else None,
                seconds < 2 if last else None,
            )
        )
        rows.append(Row(f"{sites:,} sites: CPU of a round", f"{found.cpu:.2f} s"))
        rows.append(Row(f"{sites:,} sites: peak memory", f"{found.peak:.0f} MB"))
    ratio = peaks[many] / peaks[ASKED]
    rows.append(Row(f"peak memory, {many:,} sites / {ASKED}", f"{ratio:.2f}", "<= 1.20", ratio <= 1.2))
    return rows


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=20, help="of each site")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keeps the sites; else they are removed")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    given = parser.parse_args()
    if given.run is not None:
        print(json.dumps(asdict(run(given.run, given.sites, given.users, given.rounds))))
        return
    if given.sites <= ASKED:
        parser.error(
            f"--sites is {given.sites}, but must be above the {ASKED} that it is compared with: give more"
        )
    folder = given.folder or Path(tempfile.mkdtemp(prefix="fedtide-scale-"))
    before = os.getloadavg()[0]
    try:
        rows = measure(folder, given.sites, given.users, given.rounds)
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    text = (
        f"`python -m simulations.benchmarks.scale`, {machine()}; load {before:.1f} before. Sites of {given.users} "
        f"users with {EVENTS} events each over {ITEMS:,} items, `recommend` on frozen vectors, 5 steps a round at "
        "sampling rate 0.2; all that a run does is in it: charges, receipts, admission, checkpoints."
    )
    section = "\n".join(["## Many sites", "", text, "", *as_table(rows), ""])
    print(section)
    if not given.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
