"""One federation by Fedtide, Flower with Opacus, pfl-research: `python -m simulations.benchmarks.comparison`.

A hundred sites of twenty users each, the family `recommend` on frozen item vectors, twenty rounds. Each contender runs
in a process of its own, one after the other, in turns. pfl-research wants other versions of Fedtide's libraries, so it
gets a virtual environment of its own; without one its rows are left out:

    python -m venv PLACE
    PLACE/bin/pip install pfl torch==YOURS pydantic cryptography
    python -m simulations.benchmarks.comparison --pfl-python PLACE/bin/python
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.assets import home, language_model
from common.config import Plan, make_plan
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.models.build import build_model, item_texts
from common.models.tasks.next_item import NextItem
from common.planning import smallest_budget
from server.registry import Registry
from simulations.benchmarks.comparison_ways import CORES, NOTES
from simulations.benchmarks.comparison_workload import FEDTIDE, FLOWER, PFL, Settings, Times, Workload
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine
from simulations.engines import _end_group
from simulations.sites import enroll_site, make_site

ITEMS, USERS, EVENTS, HIDDEN, STEPS, NEGATIVES, RATE = 1_000, 20, 20, 16, 5, 256, 0.2
_WORDS = ("red", "old", "blue", "small", "green", "tall", "quiet", "warm", "sharp", "soft")
_THINGS = ("lamp", "chair", "story", "river", "coat", "clock", "stone", "bread", "song", "wheel")


@dataclass(frozen=True)
class Size:
    """How much is run: `flower_rounds` are measured of the contender that is slow, and the rest reckoned from them."""

    sites: int
    rounds: int
    flower_rounds: int
    turns: int


def prepare(folder: Path, size: Size) -> Workload:
    """Sites with users and ledgers, and the same public arrays for the others."""
    texts = tuple(
        f"{_WORDS[item % 10]} {_THINGS[item // 10 % 10]} number {item // 100}" for item in range(ITEMS)
    )
    catalog = Catalog(ids=tuple(f"i{item}" for item in range(ITEMS)), texts=texts, categories=((),) * ITEMS)
    plan = _plan(size).for_catalog(catalog.digest())
    catalog.save(folder / "catalog.jsonl")
    (folder / "plan.json").write_text(plan.to_json())
    generator = np.random.default_rng(0)
    shape = (size.sites, USERS, EVENTS)
    items = generator.integers(0, ITEMS, shape)
    times = 1_500_000_000 + generator.integers(1, 1000, shape).cumsum(axis=-1)
    registry = Registry(folder / "registry")
    budget, _ = smallest_budget(plan.events(), plan.privacy.delta)
    for site in range(size.sites):
        place = folder / "sites" / f"{site:05d}"
        own = _histories(site, items[site], times[site])
        make_site(place, f"site-{site}", own, plan, folder / "catalog.jsonl", budget * 5)
        enroll_site(place, f"site-{site}", registry)
    return Workload.save(
        folder, _settings(size, plan), {"items": items, "times": times} | _public(plan, texts)
    )


def _plan(size: Size) -> Plan:
    values = {
        "model": {"negatives": NEGATIVES, "max_events": EVENTS, "hidden_width": HIDDEN},
        "privacy": {"sampling_rate": RATE, "users_per_site": USERS},
        "training": {"rounds": size.rounds, "steps_per_round": STEPS},
        "server": {"expected_sites": size.sites, "minimum_sites": 1},
    }
    return make_plan(values).calibrated()


def _settings(size: Size, plan: Plan) -> Settings:
    noise = plan.privacy.noise_multiplier
    assert noise is not None  # it is calibrated
    return Settings(
        sites=size.sites,
        users=USERS,
        events=EVENTS,
        hidden=plan.model.hidden_width,
        steps=plan.training.steps_per_round,
        sampling_rate=plan.privacy.sampling_rate,
        clip_norm=plan.privacy.clip_norm,
        noise_multiplier=noise,
        learning_rate=plan.training.learning_rate,
        delta=plan.privacy.delta,
    )


def _public(plan: Plan, texts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Fedtide's own item vectors and negatives."""
    read = item_texts(texts, [()] * len(texts))
    built = build_model(plan.model, read, language_model(plan.model.encoder), cache=home() / "item-vectors")
    task = built.model.task
    assert isinstance(task, NextItem)
    assert task.negatives is not None
    return {"vectors": built.vectors.numpy(), "negatives": task.negatives.numpy()}


def _histories(site: int, items: np.ndarray, times: np.ndarray) -> Histories:
    users, events = items.shape
    return Histories(
        users=np.array([f"{site}-{user}" for user in range(users)]),
        offsets=np.arange(users + 1, dtype=np.int64) * events,
        items=items.ravel().astype(np.int32),
        times=times.ravel().astype(np.int64),
        kinds=np.zeros(items.size, np.int16),
        values=np.full(items.size, np.nan, np.float32),
        kind_names=("view",),
    )


def run(way: str, workload: Workload, rounds: int, python: str) -> Times:
    """One contender in a session of its own, of which nothing is left.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    log, answer = workload.folder / f"{way}.log", workload.folder / f"{way}.json"
    answer.unlink(missing_ok=True)
    module = "simulations.benchmarks.comparison_workload"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [python, "-m", module, way, str(workload.folder), str(rounds)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            _end_group(process)
    if not answer.is_file():
        raise RuntimeError(f"{way} failed:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    return Times.read(answer)


def measure(size: Size, pfl_python: str | None) -> tuple[list[Row], dict[str, str]]:
    """The rows of the table, and versions."""
    pythons = {FEDTIDE: sys.executable, FLOWER: sys.executable}
    if pfl_python is not None:
        pythons[PFL] = pfl_python
    rounds = {way: size.flower_rounds if way == FLOWER else size.rounds for way in pythons}
    found: dict[str, list[Times]] = {way: [] for way in pythons}
    for turn in range(size.turns):
        with tempfile.TemporaryDirectory() as folder:
            workload = prepare(Path(folder), size)  # anew: ledgers and registry keep what was before
            for way, python in pythons.items():
                times = run(way, workload, rounds[way], python)
                found[way].append(times)
                wall, cpu = times.total
                print(
                    f"turn {turn + 1}, {way}: {rounds[way]} rounds, wall {wall:.1f} s, CPU {cpu:.1f} s",
                    flush=True,
                )
    versions = {name: value for each in found.values() for name, value in each[0].versions.items()}
    return rows_of(found, size), versions


def rows_of(found: dict[str, list[Times]], size: Size) -> list[Row]:
    """Seconds of every contender, and ratios to Fedtide's: medians over turns."""
    whole = {way: [each.of_rounds(size.rounds) for each in turns] for way, turns in found.items()}
    rows = [
        Row(f"{_NAMES[way]}: {size.rounds} rounds", _seconds(whole[way], found[way], size)) for way in whole
    ]
    for way, least, wanted in ((FLOWER, 5.0, ">= 5"), (PFL, 1.0, "> 1")):
        for place, kind in enumerate(("wall", "CPU")) if way in whole else ():
            ratio = _ratio([each[place] for each in whole[way]], [each[place] for each in whole[FEDTIDE]])
            met = ratio >= least if way == FLOWER else ratio > least
            rows.append(Row(f"{_NAMES[way]} / Fedtide, {kind} time", f"{ratio:.2f}", wanted, met))
    return rows + _accountant(found, whole, size)


def _accountant(
    found: dict[str, list[Times]], whole: dict[str, list[tuple[float, float]]], size: Size
) -> list[Row]:
    """What the accountant has of Flower's time: most of it is no training."""
    accounting, answering = (statistics.median(t.notes[key] for t in found[FLOWER]) for key in NOTES)
    without = [each[1] - size.rounds * size.sites * accounting for each in whole[FLOWER]]
    ratio = _ratio(without, [each[1] for each in whole[FEDTIDE]])
    return [
        Row(
            "Flower with Opacus: a ClientApp's CPU in the last round, and the accountant's part of it",
            f"{answering:.2f} s, {accounting:.2f} s",
        ),
        Row(f"{_NAMES[FLOWER]}, had it not asked for epsilon / Fedtide, CPU time", f"{ratio:.2f}"),
    ]


def _ratio(others: list[float], own: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(others, own, strict=True))


_NAMES = {
    FEDTIDE: "Fedtide, inline engine, workers",
    FLOWER: "Flower with Opacus, Ray",
    PFL: "pfl-research, one process",
}


def _seconds(whole: list[tuple[float, float]], turns: list[Times], size: Size) -> str:
    wall, cpu = (statistics.median(each[place] for each in whole) for place in (0, 1))
    said = f"wall {wall:.0f} s, CPU {cpu:.0f} s"
    measured = turns[0].rounds
    if measured >= size.rounds:
        return said
    first = statistics.median(each.laps[1][0] for each in turns)
    each_round = statistics.median(turn.a_round()[0] for turn in turns)
    return (
        f"{said}, reckoned from {measured} rounds: the first {first:.0f} s wall, Ray's start-up with it; "
        f"another {each_round:.0f} s"
    )


def _can(python: str) -> bool:
    check = "import pfl.model.pytorch, common.models.families.recommend"
    return subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pfl-python", default=sys.executable, help="the interpreter that has pfl")
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--flower-rounds", type=int, default=2, help="that are measured of Flower, at least 2"
    )
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    given = parser.parse_args()
    for name, least in (("sites", 2), ("rounds", 2), ("flower_rounds", 2), ("turns", 1)):
        if getattr(given, name) < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(given, name)}, but must be at least {least}: give more")
    torch.set_num_threads(1)
    python = given.pfl_python if _can(given.pfl_python) else None
    if python is None:
        print(f"pfl-research is left out: {given.pfl_python} cannot import it; --help says how to install it")
    size = Size(given.sites, given.rounds, given.flower_rounds, given.turns)
    before = os.getloadavg()[0]
    rows, versions = measure(size, python)
    text = _text(size, versions, (before, os.getloadavg()[0]))
    section = "\n".join(["## Beside Flower with Opacus, and pfl-research", "", text, "", *as_table(rows), ""])
    print(section)
    if not given.no_document:
        add_to_document(section)


def _text(size: Size, versions: dict[str, str], load: tuple[float, float]) -> str:
    named = ", ".join(f"{name} {value}" for name, value in versions.items())
    paragraphs = [
        f"`python -m simulations.benchmarks.comparison`, {machine()}; {named}. Medians of {size.turns} turns, in which "
        "each contender runs once, alone, in processes of its own, each with one thread. The load of the machine (one "
        f"minute's) was {load[0]:.1f} before and {load[1]:.1f} after, where 1 a core is full: wall times are the "
        "longer by it. CPU is that of all the contender's processes. The clock holds the whole run, "
        "from the start of the contender's first process, imports and all, but not the making of sites.",
        f"{size.sites} sites of {USERS} users with {EVENTS} events over {ITEMS:,} items; family `recommend`, item "
        f"vectors 64 wide, LSTM state {HIDDEN}, {NEGATIVES} public negatives; {STEPS} steps a round on "
        f"{RATE:.0%} of the users. One model, data, noise multiplier and clip norm, but not one promise:",
        "- **Fedtide** clips each user in every step, adds noise from a cryptographic generator at each site, reserves "
        "in ledgers on disk, signs, checks and countersigns receipts, and writes a checkpoint each round. Its sites "
        "answer in as many workers as there are cores, and train in batches. It builds its model itself; the others "
        "get arrays.",
        "- **Flower with Opacus** does as Flower's example `opacus`: at each message a ClientApp makes its model (with "
        "DPLSTM), wraps it by `PrivacyEngine.make_private`, trains an epoch of Poisson batches and asks for epsilon. "
        "The engine is new each time, so that is the epsilon of one round; noise is torch's. FedAvg; no ledger, no "
        f"receipts. Its unit is a user too, a row each. Ray has {CORES} cores: {CORES} ClientApps train at once.",
        "- **pfl-research** takes a site for its user: plain steps with torch's LSTM, then its Gaussian mechanism, at "
        "the site, clips the whole update and adds noise, once a round. No clipping of users, no ledger, no messages, "
        "no checkpoints: less work, for a promise to a site's update. In one process, as its simulation runs by "
        "default.",
    ]
    return "\n\n".join([*paragraphs[:2], "\n".join(paragraphs[2:])])


if __name__ == "__main__":
    main()
