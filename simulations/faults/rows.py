"""A fault as a row of the table: what was done, what was said, and what code found of it afterwards."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from simulations.faults.judging import MESSAGE, Mark, account, as_json, judge, mark
from simulations.faults.place import OTHERS, SITES, FaultError, Place, Running

_SECONDS = 300.0


@dataclass
class Shown:
    """What a fault left to be judged.

    Attributes:
        run: the run's name.
        before: what stood on the disk when the fault came.
        messages: what was said of it; an empty one is a message that did not come.
        others: sites that must be in every round after it.
        note: for the table.
    """

    run: str
    before: Mark
    messages: list[str]
    others: tuple[str, ...] = OTHERS
    note: str = ""


@dataclass
class Row:
    """A row of the table: `faults` are what does not hold, by check; `None` there is a check that was not made."""

    fault: str
    came_to: str
    message: str
    faults: dict[str, list[str]]
    seconds: float

    @property
    def holds(self) -> bool:
        return not any(self.faults.values())


@dataclass(frozen=True)
class Fault:
    """One fault: its short name, what it is, and what injects it into a deployment that is up."""

    name: str
    title: str
    inject: Callable[[Place], Shown]


def judged(place: Place, fault: Fault) -> Row:
    """Injects a fault and judges what it left."""
    began = time.monotonic()
    try:
        shown = fault.inject(place)
        faults = judge(place, shown.run, shown.before, shown.others, SITES)
    except FaultError as error:
        return Row(fault.title, "", "", {"the fault's injection": [str(error)]}, time.monotonic() - began)
    missing = [place for place, each in enumerate(shown.messages) if not each]
    faults[MESSAGE] = [f"message {number + 1} did not come" for number in missing]
    parts = [account(place, shown.run, SITES), shown.note]
    said = " … ".join(each for each in shown.messages if each)
    return Row(fault.title, "; ".join(part for part in parts if part), said, faults, time.monotonic() - began)


def found(text: str | Iterable[str], pattern: str) -> str:
    """The first message of a log, or line of a text, that says something; empty where none does."""
    whole = text if isinstance(text, str) else "\n".join(text)
    messages = [str(each["message"]) for each in as_json(whole)] or []
    flat = " ".join(whole.split())
    for each in messages:
        if re.search(pattern, each):
            return each
    match = re.search(rf"[^.:│┃]*{pattern}[^│┃]*", flat) if not messages else None
    return match.group().strip()[:400] if match else ""


def wait_for(place: Place, running: Running, pattern: str) -> str:
    """Waits until a command says something; the message, or nothing where it does not come."""
    try:
        place.until(lambda: found(running.said(), pattern), pattern, 0.3)
    except FaultError:
        return ""
    return found(running.said(), pattern)


def ended_well(place: Place, run: Running) -> None:
    """Waits for the end of a run that is followed.

    Raises:
        FaultError: it did not end well.
    """
    place.until(lambda: run.process.poll() is not None, f"the end of `{run.log.stem}`", 0.3)
    if run.process.returncode:
        raise FaultError(f"`{run.log.stem}` ended with {run.process.returncode}: {run.said()[-600:]}")


def whole_run(place: Place, name: str, rounds: int = 1) -> Mark:
    """A run from beginning to end, beside a fault that is there all the time; what stood before it."""
    before = mark(place, name, SITES)
    ended_well(place, place.begin(name, rounds))
    return before
