"""What reading a log costs: `python -m simulations.benchmarks.ingestion` prints a table and puts it on the page.

A made-up log is written in pieces to a temporary folder, and a fresh process reads, cleans, de-identifies and
binds it into a site's folder of histories, which it maps: wall time, CPU time and peak memory of all that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, clean_to
from common.events.readers import scan_log
from simulations.benchmarks.table import Row, add_to_document, as_table, machine

Kind = Literal["parquet", "csv"]

ITEMS, EVENTS_A_USER = 50_000, 100
_KINDS = ("view", "click", "cart", "purchase")
_PIECE = 1_000_000
_BYTES_AN_EVENT = 110  # of disk: the log, what is put down meanwhile, the histories
_RATE, _MEMORY = 1e6, 2 * 2**30


@dataclass(frozen=True)
class Ingested:
    """One reading in a process of its own: seconds of wall and of CPU, bytes at the peak."""

    events: int
    wall: float
    cpu: float
    peak: int


def made_up_log(folder: Path, format: Kind, events: int, users: int) -> Path:
    """A folder of parts in order of time: few items have most events, one in a hundred is in no catalog."""
    chance = np.random.default_rng(events)
    folder.mkdir()
    for part, first in enumerate(range(0, events, _PIECE)):
        count = min(_PIECE, events - first)
        items = np.minimum(chance.pareto(1.2, count) * 50, ITEMS - 1).astype(np.int64)
        items[chance.random(count) < 0.01] += ITEMS
        table = pl.DataFrame(
            {
                "user": chance.integers(0, users, count),
                "item": items,
                "time": 1_600_000_000 + np.sort(chance.integers(first, first + count, count)) // 4,
                "kind": chance.choice(len(_KINDS), count, p=(0.8, 0.12, 0.05, 0.03)),
            }
        ).with_columns(
            pl.format("user-{}", "user").alias("user"),
            pl.format("item-{}", "item").alias("item"),
            pl.col("kind").replace_strict(list(range(len(_KINDS))), list(_KINDS)),
        )
        path = folder / f"part-{part:04d}.{format}"
        table.write_parquet(path) if format == "parquet" else table.write_csv(path)
    return folder


def ingest(log: Path, work: Path) -> Ingested:
    """Reads a log into a folder of histories that is opened and then removed."""
    ids = tuple(f"item-{row}" for row in range(ITEMS))
    catalog = Catalog(ids, ids, ((),) * ITEMS)
    began, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        histories, report = clean_to(
            Path(folder) / "histories", scan_log(log), catalog, CleaningPolicy(), bytes(32)
        )
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        assert len(histories) == report.users_kept
        assert histories.events == report.events_kept > 0.9 * report.events_read
    return Ingested(report.events_read, wall, cpu, _peak())


def _peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def in_fresh_process(log: Path, work: Path) -> Ingested:
    """`ingest` where nothing was read before, so that the peak is its own; it starts no process itself."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as process:
        return process.submit(ingest, log, work).result()


def measure(work: Path, events: int, repeats: int) -> dict[tuple[Kind, int], list[Ingested]]:
    """Readings of three sizes from Parquet and of the middle one from CSV; the largest is read once."""
    middle = events // 10
    cases: list[tuple[Kind, int]] = [
        ("parquet", events // 100),
        ("parquet", middle),
        ("csv", middle),
        ("parquet", events),
    ]
    found: dict[tuple[Kind, int], list[Ingested]] = {case: [] for case in cases}
    logs = {
        case: made_up_log(work / f"{case[0]}-{case[1]}", *case, max(1, case[1] // EVENTS_A_USER))
        for case in cases[:-1]
    }
    for _ in range(repeats):
        for case, log in logs.items():
            found[case].append(in_fresh_process(log, work))
    for log in logs.values():
        shutil.rmtree(log)
    largest = made_up_log(work / "largest", "parquet", events, max(1, events // EVENTS_A_USER))
    found[cases[-1]].append(in_fresh_process(largest, work))
    return found


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The x of cost ~ size^x, by least squares in the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def table(found: dict[tuple[Kind, int], list[Ingested]]) -> list[Row]:
    """The rows, with medians where there are several readings."""
    rows = []
    for (format, events), readings in found.items():
        wall = statistics.median(each.wall for each in readings)
        cpu = statistics.median(each.cpu for each in readings)
        rate, users = events / wall, events // EVENTS_A_USER
        name = {"parquet": "Parquet", "csv": "CSV"}[format]
        large = format == "parquet" and events >= 10**7  # of small logs, what is done once is most
        target = (">= 1,000,000", rate >= _RATE) if large else (None, None)
        rows.append(
            Row(
                f"events a second from {name}: {events:,} events of {users:,} users, wall "
                f"(median of {len(readings)})",
                f"{rate:,.0f} (CPU: {cpu / events * 1e6:.2f} s a million)",
                *target,
            )
        )
    parquet = {events: readings for (format, events), readings in found.items() if format == "parquet"}
    sizes = sorted(parquet)
    peaks = [max(each.peak for each in parquet[size]) for size in sizes]
    for size, peak in zip(sizes, peaks, strict=True):
        whole = size >= 10**8
        limit = ("< 2 GiB", peak < _MEMORY) if whole else (None, None)
        rows.append(Row(f"peak memory (VmHWM), {size:,} events", f"{peak / 2**20:,.0f} MiB", *limit))
    cpus = [statistics.median(each.cpu for each in parquet[size]) for size in sizes]
    rows.append(Row("CPU time grows as events to the power of", f"{exponent(sizes, cpus):.2f}"))
    rows.append(
        Row(
            "peak memory grows as events to the power of", f"{exponent(sizes, [float(p) for p in peaks]):.2f}"
        )
    )
    return rows


def main() -> None:
    """Measures, prints the table, and puts it on the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10**8, help="of the largest log; at least 100,000")
    parser.add_argument("--repeats", type=int, default=5, help="of the smaller sizes")
    parser.add_argument("--folder", type=Path, default=None, help="where there is room; else the system's")
    parser.add_argument("--no-document", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.events < 100_000 or arguments.repeats < 1:
        parser.error("--events must be at least 100,000 and --repeats at least 1")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        free, needed = shutil.disk_usage(folder).free, arguments.events * _BYTES_AN_EVENT
        if free < needed:
            parser.error(
                f"{folder} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed: name another "
                "with --folder"
            )
        rows = table(measure(Path(folder), arguments.events, arguments.repeats))
    heading = [
        "## Reading logs",
        "",
        f"`python -m simulations.benchmarks.ingestion`, {machine()}, polars {pl.__version__}, numpy {np.__version__}. "
        "From files to a folder of histories that is mapped: read, cleaned, de-identified, bound, synced. The "
        f"machine's load (one minute's) was {load:.1f} before and {os.getloadavg()[0]:.1f} after, this work's own "
        "in the second, where 1 a core is full: on a quiet machine wall times are shorter.",
        "",
    ]
    lines = [*heading, *as_table(rows), ""]
    print("\n".join(lines))
    if not arguments.no_document:
        add_to_document("\n".join(lines))


if __name__ == "__main__":
    main()
