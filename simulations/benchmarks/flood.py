"""What a stranger's flood costs honest rounds: `python -m simulations.benchmarks.flood` adds it to the benchmarks.

A server, two sites and light nodes on loopback (see `nodes`), and one run, in which rounds alternate, four quiet and
four under a stranger who has nothing but the address: half-open calls, messages of 300 MB without a key, connections
that say two bytes of TLS. All are made again as the server ends them. The stranger yields the processor to the others
(`nice` 19), as if on one of its own; what the server spends on it counts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from simulations.benchmarks.nodes import STEPS, deployed
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine
from simulations.faults.place import Place, Running
from simulations.faults.raw_calls import closed, connect, half_open
from simulations.faults.stranger import CALLS, CONNECTIONS, LARGE, SILENT, send_large
from simulations.faults.tiny import tiny_plan

_LIGHT, _TURN, _LARGE_SENDERS = 10, 4, 2
_SLOWER, _MORE = 1.2, 200e6
_PAUSE = 0.2


@dataclass(frozen=True)
class Measured:
    """Seconds of rounds, quiet and flooded; bytes that SuperLink held before the first flood, and at most after it.

    Attributes:
        made: what the stranger did, by kind, while the flooded rounds ran.
    """

    quiet: tuple[float, ...]
    flooded: tuple[float, ...]
    before: int
    most: int
    made: dict[str, int]


def flood(known: dict[str, Any]) -> None:
    """Floods while standard input says so: a line "on" or "off"; at its end, what was made is said as JSON."""
    os.nice(19)
    on, end, made, lock = threading.Event(), threading.Event(), dict[str, int](), threading.Lock()

    def again(name: str, act: Callable[[], int]) -> None:
        while not end.is_set():
            if not on.wait(_PAUSE):
                continue
            count = 0
            with suppress(OSError):
                count = act()
            with lock:
                made[name] = made.get(name, 0) + count
            time.sleep(_PAUSE)

    def hold_half_open() -> int:
        calls = CALLS // CONNECTIONS
        with connect(known["host"], known["fleet"], Path(known["ca"])) as opened:
            half_open(opened, "PullMessages", calls)
            until = time.monotonic() + 30
            while on.is_set() and time.monotonic() < until and not closed(opened, _PAUSE):
                pass
        return calls

    def hold_silent() -> int:
        silent = [
            socket.create_connection((known["host"], known["fleet"]), timeout=10) for _ in range(SILENT)
        ]
        for each in silent:
            with suppress(OSError):
                each.sendall(b"\x16\x03")
        until = time.monotonic() + 30
        while on.is_set() and time.monotonic() < until and not _ended(silent[-1]):
            pass
        for each in silent:
            each.close()
        return SILENT

    def large() -> int:
        send_large(known)
        return 1

    acts: list[tuple[str, Callable[[], int]]] = [("half-open calls", hold_half_open)] * CONNECTIONS
    acts += [("silent connections", hold_silent), *[("messages of 300 MB", large)] * _LARGE_SENDERS]
    threads = [threading.Thread(target=again, args=each, daemon=True) for each in acts]
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        (on.set if line.strip() == "on" else on.clear)()
    on.clear()
    end.set()
    for thread in threads:
        thread.join(30)
    print(json.dumps(made))


def _ended(connection: socket.socket) -> bool:
    connection.settimeout(_PAUSE)
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True


def measure(folder: Path, rounds: int) -> Measured:
    """One run whose rounds alternate; the round in which the flood begins or ends counts for neither.

    Raises:
        RuntimeError: the run did not end well.
    """
    with deployed(folder, _LIGHT) as place:
        superlink = place.up["server"].part("server.superlink")
        plan = json.loads(
            tiny_plan(
                place.model, "flood", rounds, quorum=None, minimum_sites=2, round_deadline=300.0
            ).to_json()
        )
        plan["training"]["steps_per_round"] = STEPS
        (folder / "flood.json").write_text(json.dumps(plan))
        known = {"host": place.host, "fleet": place.ports[0], "ca": str(place.server / "tls" / "ca.crt")}
        stranger = subprocess.Popen(
            [sys.executable, "-m", "simulations.benchmarks.flood", "--stranger", json.dumps(known)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            run = place.begin("flood", rounds)
            ends, flooded, before, most = _follow(place, run, stranger, superlink)
        finally:
            said, _ = stranger.communicate(timeout=120)
        if run.process.returncode:
            raise RuntimeError(f"the benchmark's run did not end well: {run.said()}")
    spans = [after - now for now, after in pairwise(ends)]
    kinds = [_kind(number, flooded) for number in range(1, len(ends))]
    quiet = tuple(span for span, kind in zip(spans, kinds, strict=True) if kind == "quiet")
    loud = tuple(span for span, kind in zip(spans, kinds, strict=True) if kind == "flooded")
    return Measured(quiet, loud, before, most, json.loads(said))


def _follow(
    place: Place, run: Running, stranger: subprocess.Popen[str], superlink: int
) -> tuple[list[float], list[bool], int, int]:
    """When each round ended, whether the flood was on as the next began; memory before the flood, and the most."""
    ends, on, before, most = list[float](), list[bool](), 0, 0
    assert stranger.stdin is not None
    while run.process.poll() is None:
        with suppress(FileNotFoundError):
            done = len(place.lines("flood", "rounds.jsonl"))
            if done > len(ends):
                ends.append(time.monotonic())
                flooded = done // _TURN % 2 == 1
                if flooded != (on[-1] if on else False):
                    print("on" if flooded else "off", file=stranger.stdin, flush=True)
                on.append(flooded)
        held = _held(superlink)
        before = held if not any(on) else before
        most = max(most, held)
        time.sleep(0.05)
    return ends, on, before, most


def _kind(number: int, on: list[bool]) -> str:
    """Of the round after `number` others: of one kind where the flood was as it is during the round before, too."""
    if number < 2 or on[number - 1] != on[number - 2]:
        return "neither"
    return "flooded" if on[number - 1] else "quiet"


def _held(pid: int) -> int:
    with suppress(OSError):
        return 1024 * int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
    return 0


def as_markdown(found: Measured, load: tuple[float, float]) -> str:
    """A section for the page of benchmarks."""
    quiet, flooded = statistics.median(found.quiet), statistics.median(found.flooded)
    more = found.most - found.before
    rows = [
        Row(f"a quiet round, median of {len(found.quiet)}", f"{quiet:.2f} s"),
        Row(f"a flooded round, median of {len(found.flooded)}", f"{flooded:.2f} s"),
        Row("flooded / quiet", f"{flooded / quiet:.2f}", f"< {_SLOWER:g}", flooded / quiet < _SLOWER),
        Row("SuperLink's memory before the flood", f"{found.before / 1e6:.0f} MB"),
        Row("and more at most afterwards", f"{more / 1e6:.0f} MB", f"< {_MORE / 1e6:.0f} MB", more < _MORE),
        *(Row(f"the stranger: {name}", f"{count:,}") for name, count in sorted(found.made.items())),
    ]
    quiet_range, flooded_range = (
        f"{min(each):.2f} to {max(each):.2f} s" for each in (found.quiet, found.flooded)
    )
    lines = [
        "## A stranger's flood",
        "",
        f"`python -m simulations.benchmarks.flood`, {machine()}; two sites that train for {STEPS} steps, {_LIGHT} "
        f"light nodes, and a stranger who has nothing but the address: {CALLS:,} half-open calls at a time on "
        f"{CONNECTIONS} connections, {SILENT} connections that say two bytes, {_LARGE_SENDERS} messages of "
        f"{LARGE // 1_000_000} MB at a time, all made again as the server ends them. Of one run, {_TURN} rounds quiet "
        f"and {_TURN} flooded in turn; quiet {quiet_range}, flooded {flooded_range}. All of it shares the machine; its "
        f"load (one minute's) was {load[0]:.1f} before and {load[1]:.1f} after.",
        "",
        *as_table(rows),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6 * _TURN)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where it is deployed; else a temporary one"
    )
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    parser.add_argument("--stranger", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stranger:
        flood(json.loads(arguments.stranger))
        return
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder) / "deployed", arguments.rounds)
    section = as_markdown(found, (before, os.getloadavg()[0]))
    print(section)
    if not arguments.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
