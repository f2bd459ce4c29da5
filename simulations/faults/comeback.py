"""Every process of a site killed, stopped, or stopped for a while, in every phase: how long until it is admitted again.

One long run; each hurt begins when the site has come back from the one before. Nobody does anything by hand, but that
`site up` itself, where it is killed, is started again as a service manager does.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.config import make_plan
from server.runs import RunFolder
from simulations.faults.judging import Mark, applied_twice, uncharged
from simulations.faults.place import SITES, VICTIM, FaultError, Place, below
from simulations.faults.tiny import tiny_plan

NAME = "comeback"
KILLED, STOPPED, PAUSED = "killed", "stopped for good", "stopped for 20 s"
TRAINING, BETWEEN = "in its training", "between two rounds"
SITE_UP = "`site up`"
_PARTS = {"SuperNode": "client.supernode", "starter": "client.starter", "worker": "client.worker"}
PROCESSES = (*_PARTS, "ClientApp", SITE_UP)
_PAUSE, _AGAIN = 20.0, 5.0
_ROUNDS = 400


@dataclass
class Hurt:
    """What was done to a process, and what came of it.

    Attributes:
        seconds: from then until an answer of the site to a later round was admitted; None where none was in time.
        rounds: that were over meanwhile without the site.
    """

    process: str
    way: str
    phase: str
    seconds: float | None
    rounds: int


def cases() -> Iterator[tuple[str, str, str]]:
    """Process, way and phase of each hurt. A ClientApp lives in a round alone; `site up` does nothing in one."""
    for phase in (TRAINING, BETWEEN):
        for process in PROCESSES:
            for way in (KILLED, STOPPED, PAUSED):
                if (process, phase) != ("ClientApp", BETWEEN):
                    yield process, way, phase


def _plan(place: Place) -> Path:
    """So much noise that the budget lasts for all rounds; a round waits for the third site for a moment."""
    values = json.loads(tiny_plan(place.model, NAME, _ROUNDS, grace=10.0, round_deadline=60.0).to_json())
    values["privacy"] |= {"noise_multiplier": 400.0}
    values["training"] |= {"steps_per_round": 60}
    file = place.folder / f"{NAME}.json"
    file.write_text(make_plan(values).to_json())
    return file


def _pid(place: Place, process: str) -> int | None:
    site = place.up[VICTIM]
    if process == SITE_UP:
        return site.process.pid
    if process == "ClientApp":
        return min(below(site.part(_PARTS["starter"])), default=None)
    return site.part(_PARTS[process])


def _admitted(place: Place, after: int) -> tuple[bool, int]:
    """Whether the victim is in a round that began when so many were over, and in how many since then it is not.

    The one that was going on then may be answered by what was not hurt.
    """
    lines = [json.loads(line) for line in place.lines(NAME, "rounds.jsonl")[after:]]
    missed = [VICTIM not in line["admitted"] for line in lines]
    return not all(missed[1:]), sum(missed)


def hurt(place: Place, process: str, way: str, phase: str) -> Hurt:
    """Hurts one process, and waits until the site is admitted again."""
    pid: int | None = None
    while pid is None:  # a round may be over before its ClientApp is found
        if phase == TRAINING:
            _until_any_training(place)
        else:
            _until_a_round_ends(place)
        pid = _pid(place, process)
    after, began = len(place.lines(NAME, "rounds.jsonl")), time.monotonic()
    os.kill(pid, signal.SIGKILL if way == KILLED else signal.SIGSTOP)
    if way == PAUSED:
        time.sleep(_PAUSE)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    if (process, way) == (SITE_UP, KILLED):
        place.up[VICTIM].process.wait()
        time.sleep(_AGAIN)
        place.start_site(VICTIM)
    try:
        place.until(lambda: _admitted(place, after)[0], f"{VICTIM} after its {process} was {way}", 0.1)
        seconds: float | None = time.monotonic() - began
    except FaultError:
        seconds = None
    finally:
        if (process, way) == (SITE_UP, STOPPED):
            os.kill(pid, signal.SIGCONT)
    return Hurt(process, way, phase, seconds, _admitted(place, after)[1])


def _until_any_training(place: Place) -> None:
    progress = place.folder / VICTIM / "progress"
    progress.unlink(missing_ok=True)

    def so() -> bool:
        with suppress(FileNotFoundError):
            words = progress.read_text().split()
            return len(words) == 3 and 2 <= int(words[1]) < int(words[2]) - 5
        return False

    place.until(so, f"training at {VICTIM}", 0.01)


def _until_a_round_ends(place: Place) -> None:
    done = len(place.lines(NAME, "rounds.jsonl"))
    place.until(lambda: len(place.lines(NAME, "rounds.jsonl")) > done, "a round's end", 0.01)


def hurts(place: Place, told: Callable[[Hurt], None], chosen: list[tuple[str, str, str]]) -> list[str]:
    """All hurts, one after another; what the run's records do not bear out afterwards."""
    _plan(place)
    run = place.begin(NAME)
    place.until_round(NAME, 2)
    try:
        for case in chosen:
            told(hurt(place, *case))
    finally:
        run.end()
        place.up["server"].end()  # the ServerApp would go on with the run
    folder = place.run_folder(NAME)
    if folder is None:
        return ["there is no run"]
    ledgers = {site: place.folder / site / "ledger" for site in SITES}
    faults = uncharged(RunFolder(folder), ledgers, Mark({}, {}))
    faults += applied_twice(RunFolder(folder), ledgers)
    done = place.fedtide("site", "verify", place.folder / VICTIM, "--json")
    place.start_server()
    place.wait_online(*SITES)
    return faults + ([f"`fedtide site verify`: {done.stderr.strip()[-300:]}"] if done.returncode else [])
