"""What breaks in the middle of a round: processes killed or stopped, the network cut, the disk full."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

from simulations.faults.judging import Mark, charges, mark
from simulations.faults.place import OTHERS, SITES, VICTIM, FaultError, Place, Running, below
from simulations.faults.rows import Fault, Shown, ended_well, found, wait_for

_ROUND = 2
"""The first of training: what breaks, breaks in its steps."""

_CUT_SECONDS, _DOWN_SECONDS, _LOCKED_SECONDS = 60.0, 10.0, 40.0


def _in_training(place: Place, name: str, rounds: int = 3, **server: object) -> tuple[Running, Mark]:
    """A run whose second round the victim is training in, and what stands on the disk then."""
    run = place.begin(name, rounds, **server)
    place.until_training(VICTIM, _ROUND)
    return run, mark(place, name, SITES, [(VICTIM, _ROUND)])


def _server_log(place: Place, name: str, pattern: str) -> str:
    folder = place.run_folder(name)
    said = found((folder / "server.log").read_text(), pattern) if folder else ""
    return f"server: {said}" if said else ""


def site_killed(place: Place) -> Shown:
    """All of the victim's processes at once, as when its machine loses power; started again 5 s later."""
    run, before = _in_training(place, "site-killed", 4)
    place.up[VICTIM].kill()
    time.sleep(5)
    place.start_site(VICTIM)
    ended_well(place, run)
    place.wait_online(VICTIM)
    return Shown(
        "site-killed", before, [_server_log(place, "site-killed", f"{VICTIM} is left out.*site up")], OTHERS
    )


def worker_killed(place: Place) -> Shown:
    """The process that trains, as the kernel does when memory runs out."""
    site = place.up[VICTIM]
    run, before = _in_training(place, "worker-killed")
    os.kill(site.part("client.worker"), signal.SIGKILL)
    said = wait_for(place, site, "worker ended with code -9.*memory.*started again")
    ended_well(place, run)
    at_server = _server_log(place, "worker-killed", f"{VICTIM} is left out")
    return Shown("worker-killed", before, [f"site: {said}" if said else "", at_server])


def client_app_killed(place: Place) -> Shown:
    """The ClientApp that the starter forks for a message; a round later, the starter, and the ClientApp with it."""
    site = place.up[VICTIM]
    run, before = _in_training(place, "clientapp", 3)
    forked = below(site.part("client.starter"))
    if len(forked) != 1:
        raise FaultError(f"{len(forked)} ClientApps run below {VICTIM}'s starter, not one")
    os.kill(forked.pop(), signal.SIGKILL)
    place.until_training(VICTIM, _ROUND + 1)
    os.kill(site.part("client.starter"), signal.SIGKILL)
    before.touched.append((VICTIM, _ROUND + 1))
    ended_well(place, run)
    log = (place.folder / VICTIM / "logs" / "site.log").read_text()
    messages = [
        f"site: {said}" if (said := found(log, pattern)) else ""
        for pattern in ("ClientApp was killed.*memory", "starter ended with code -9.*started again")
    ]
    for number in (_ROUND, _ROUND + 1):
        messages.append(_server_log(place, "clientapp", f"round {number}: {VICTIM} is left out"))
    return Shown("clientapp", before, messages)


def superlink_killed(place: Place) -> Shown:
    """The server's link to all sites; `server up` starts it again."""
    server = place.up["server"]
    run, before = _in_training(place, "superlink-killed")
    os.kill(server.part("server.superlink"), signal.SIGKILL)
    said = wait_for(place, server, "superlink ended with code -9.*started again")
    ended_well(place, run)
    return Shown("superlink-killed", before, [f"`server up`: {said}" if said else ""], SITES)


def server_killed(place: Place) -> Shown:
    """`server up` itself, started again ten seconds later; then the same command goes on with the run."""
    run, before = _in_training(place, "server-killed")
    place.up["server"].process.kill()
    place.up["server"].process.wait()
    time.sleep(_DOWN_SECONDS)
    said = wait_for(place, run, "server went down; start it with .*same command again")
    place.start_server()
    place.wait_online(*SITES)
    place.until(lambda: run.process.poll() is not None, "the end of the run's command")
    ended_well(place, place.begin("server-killed"))
    return Shown("server-killed", before, [f"`server run`: {said}" if said else ""], SITES)


def server_restored(place: Place) -> Shown:
    """The server's machine is lost in a round; a copy that was made while it was up is put in its place."""
    run, before = _in_training(place, "server-restored")
    copy = place.folder / "copy"
    said = place.well("server", "backup", place.server, copy).partition(";")[0]
    place.up["server"].kill()
    place.until(lambda: run.process.poll() is not None, "the end of the run's command")
    shutil.rmtree(place.server)
    shutil.move(copy, place.server)
    place.start_server()
    place.wait_online(*SITES)
    ended_well(place, place.begin("server-restored"))
    return Shown("server-restored", before, [f"`server backup`: {said}"], SITES)


def server_app_killed(place: Place) -> Shown:
    """The process that leads the rounds; then the same command goes on with the run."""
    run, before = _in_training(place, "serverapp-killed")
    os.kill(place.up["server"].part("flwr-serverapp"), signal.SIGKILL)
    said = wait_for(place, run, "cut off after 1 of 4 rounds.*the same command goes on")
    place.until(lambda: run.process.poll() is not None, "the end of the run's command")
    ended_well(place, place.begin("serverapp-killed"))
    return Shown("serverapp-killed", before, [f"`server run`: {said}" if said else ""], SITES)


def database_locked(place: Place) -> Shown:
    """Another program on the server's machine holds SuperLink's database while a round is trained in."""
    from server.deployment import Deployment

    run, before = _in_training(place, "locked")
    held = sqlite3.connect(Deployment.load(place.server).database, isolation_level=None, timeout=30)
    try:
        held.execute("BEGIN IMMEDIATE")
        time.sleep(_LOCKED_SECONDS)
    finally:
        held.close()
    ended_well(place, run)
    return Shown("locked", before, [], SITES)


def network_cut(place: Place) -> Shown:
    """The victim's cable is out for a minute."""
    if not place.own_network:
        raise FaultError("needs root and the command `ip`: nothing was tried")
    site = place.up[VICTIM]
    run, before = _in_training(place, "network", 4)
    place.link(up=False)
    time.sleep(_CUT_SECONDS)
    place.link(up=True)
    ended_well(place, run)
    place.wait_online(VICTIM)
    folder = place.run_folder("network")
    lines = [line for line in place.lines("network", "rounds.jsonl") if f'"{VICTIM}"' in line]
    note = f"{VICTIM} was in {len(lines)} of 5 rounds" if folder else ""
    messages = [
        _server_log(place, "network", f"{VICTIM} is left out"),
        found(site.said(), "does not answer any more.*site check"),
    ]
    return Shown("network", before, messages, OTHERS, note)


def slow_site(place: Place) -> Shown:
    """The victim's worker stands still from before its round until after the deadline; then it wakes up."""
    worker = place.up[VICTIM].part("client.worker")
    run = place.begin("slow", 3, quorum=None, round_deadline=40.0)
    place.until_round("slow", 1)
    before = mark(place, "slow", SITES)
    os.kill(worker, signal.SIGSTOP)
    try:
        place.until_round("slow", _ROUND)
    finally:
        os.kill(worker, signal.SIGCONT)
    ended_well(place, run)
    folder = place.run_folder("slow")
    spent = [number for number, _ in charges(place.folder / VICTIM / "ledger", folder.name if folder else "")]
    if _ROUND in spent:
        raise FaultError(f"{VICTIM} was charged for round {_ROUND}, whose message had expired")
    said = found((place.folder / VICTIM / "logs" / "site.log").read_text(), "expired|too late")
    messages = [
        _server_log(place, "slow", f"round {_ROUND}: {VICTIM} is left out"),
        f"site: {said}" if said else "",
    ]
    return Shown(
        "slow", before, messages, OTHERS, f"nothing was charged for round {_ROUND}, which had expired"
    )


def disk_full(place: Place) -> Shown:
    """The ledger's file system is full from the steps of one round until the next is over."""
    ledger = place.folder / VICTIM / "ledger"
    if ledger not in place.mounts:
        raise FaultError("needs root, to give the ledger a small file system of its own: nothing was tried")
    run, before = _in_training(place, "disk", 4)
    filler = ledger / "filler"
    _fill(filler)
    try:
        place.until_round("disk", _ROUND + 1)
    finally:
        filler.unlink()
    ended_well(place, run)
    log = (place.folder / VICTIM / "logs" / "site.log").read_text()
    said = found(log, "disk.*full.*free")
    return Shown(
        "disk", before, [f"site: {said}" if said else "", _server_log(place, "disk", f"{VICTIM} is left out")]
    )


def _fill(file: Path) -> None:
    """Writes a file until nothing more fits."""
    with file.open("wb", buffering=0) as out:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while out.write(b"\0" * size) == size:
                    continue
            except OSError:
                continue
    if shutil.disk_usage(file.parent).free:
        raise FaultError(f"{file.parent} is not full")


FAULTS = (
    Fault("worker", "a site's worker killed (-9) in a round, as for want of memory", worker_killed),
    Fault(
        "clientapp",
        "a site's ClientApp killed (-9) in a round, and its starter in the next",
        client_app_killed,
    ),
    Fault("site", "all of a site killed (-9) in a round, started again 5 s later", site_killed),
    Fault("superlink", "SuperLink killed (-9) in a round", superlink_killed),
    Fault("server", "`server up` killed (-9) in a round, started again 10 s later", server_killed),
    Fault("restored", "the server's machine lost in a round, put back from a hot copy", server_restored),
    Fault("serverapp", "ServerApp killed (-9) in a round, run again", server_app_killed),
    Fault("locked", "SuperLink's database held by another program for 40 s", database_locked),
    Fault("network", "network between a site and the server cut for a minute", network_cut),
    Fault("slow", "a site's worker stopped past the deadline, then woken", slow_site),
    Fault("disk", "a site's disk full for two rounds", disk_full),
)
