"""What a run meets that no process does: too few sites, a plan that does not fit the budgets, a site that is barred."""

from __future__ import annotations

import json

from simulations.faults.judging import charges, mark
from simulations.faults.place import OTHERS, SITES, VICTIM, FaultError, Place
from simulations.faults.rows import Fault, Shown, ended_well, found, whole_run
from simulations.faults.tiny import tiny_plan

_PATIENCE = 8.0
_DEAR_ROUNDS, _DEAR_NOISE = 10, 3.0


def _charged(place: Place, name: str) -> list[str]:
    """The sites that a run has charged so far."""
    folder = place.run_folder(name)
    if folder is None:
        return []
    run = folder.name.removesuffix(".incomplete")
    return [site for site in SITES if charges(place.folder / site / "ledger", run)]


def too_few_sites(place: Place) -> Shown:
    """Only one of three sites is up: the run waits, ends in time, and the same command goes on with it."""
    name, before = "waiting", mark(place, "waiting", SITES)
    gone = (VICTIM, OTHERS[0])
    for site in gone:
        place.up[site].end()
    run = place.begin(name, patience=_PATIENCE)
    place.until(lambda: run.process.poll() is not None, "the end of a run that waits")
    waited, ended = (found(run.said(), words) for words in ("waiting for 1 more", "start more sites"))
    rounds, charged = len(place.lines(name, "rounds.jsonl")), _charged(place, name)
    for site in gone:
        place.start_site(site)
    place.wait_online(*SITES)
    ended_well(place, place.begin(name))
    if rounds or charged or not run.process.returncode:
        raise FaultError(f"a run that waited recorded {rounds} rounds, and charged {charged}")
    note = "while it waited no round was recorded, and nobody was charged; the same command went on"
    return Shown(name, before, [_said(waited), _said(ended)], SITES, note)


def too_dear(place: Place) -> Shown:
    """A plan whose rounds no site's budget lasts for is refused before anybody is asked."""
    plan = json.loads(tiny_plan(place.model, "dear", _DEAR_ROUNDS).to_json())
    plan["privacy"].update(epsilon=100.0, noise_multiplier=_DEAR_NOISE)
    (place.folder / "dear.json").write_text(json.dumps(plan))
    run = place.begin("dear")
    place.until(lambda: run.process.poll() is not None, "the end of a run that does not fit")
    said, charged = found(run.said(), "cannot be finished, and is not begun"), _charged(place, "dear")
    if charged or not run.process.returncode:
        raise FaultError(
            f"a run that cannot be finished ended with {run.process.returncode}, charged {charged}"
        )
    before = whole_run(place, "fitting")
    return Shown("fitting", before, [_said(said)], SITES, "nobody was charged for the plan that was refused")


def barred(place: Place) -> Shown:
    """A site is barred in the midst of a run, which goes on without it; then it is let in again, by a next run."""
    name = "barred"
    run = place.begin(name)
    place.until_round(name, 2)
    said = place.well("server", "bar", place.server, VICTIM, "--reason", "its key is suspected")
    before = mark(place, name, SITES)
    ended_well(place, run)
    folder = place.run_folder(name)
    records = [json.loads(line) for line in place.lines(name, "rounds.jsonl")]
    after = [record["round"] for record in records[3:] if VICTIM in record["admitted"]]
    place.well("server", "unbar", place.server, VICTIM)
    place.wait_online(*SITES)
    whole_run(place, "unbarred")
    again = [json.loads(line) for line in place.lines("unbarred", "rounds.jsonl")]
    if after or folder is None or VICTIM not in again[-1]["admitted"]:
        raise FaultError(f"a barred site was in rounds {after}; or was not in a run after it was let in")
    return Shown(
        name, before, [f"`server bar`: {said.strip()}"], OTHERS, "let in again, it was in the next run"
    )


def _said(words: str) -> str:
    return f"`server run`: {words}" if words else ""


FAULTS = (
    Fault("waiting", "too few sites are up as a run begins", too_few_sites),
    Fault("dear", "a plan that no budget lasts for", too_dear),
    Fault("barred", "a site is barred in a run, and let in later", barred),
)
