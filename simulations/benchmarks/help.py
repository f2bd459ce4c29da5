"""How long `--help` of each command takes: `python -m simulations.benchmarks.help` adds it to docs/benchmarks.md."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from common.cli import COMMANDS
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine

_TARGET = 1.0


def seconds(arguments: list[str], repeats: int) -> float:
    """The median wall time of a new process."""
    took = []
    for _ in range(repeats):
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "common.cli", *arguments, "--help"], check=True, stdout=subprocess.DEVNULL
        )
        took.append(time.monotonic() - began)
    return statistics.median(took)


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    given = parser.parse_args()
    rows = []
    for name in ("", *COMMANDS):
        took = seconds([name] if name else [], given.repeats)
        rows.append(
            Row(f"`fedtide {name}`".replace(" `", "`"), f"{took:.2f} s", f"< {_TARGET:g} s", took < _TARGET)
        )
    section = "\n".join(
        [
            "## Help",
            "",
            f"`python -m simulations.benchmarks.help`, {machine()}: `--help` in a new process, median of "
            f"{given.repeats}.",
            "",
            *as_table(rows),
            "",
        ]
    )
    print(section)
    if not given.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
