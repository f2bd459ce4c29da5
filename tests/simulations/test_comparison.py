"""The clock of the benchmark beside other frameworks."""

from __future__ import annotations

import json
import subprocess
import sys

from simulations.benchmarks.comparison_workload import Times

BURNS = "import time; end = time.process_time() + 1.6\nwhile time.process_time() < end: pass"
CLOCKED = f"""
import json, subprocess, sys
from simulations.benchmarks.comparison_workload import Clock
with Clock() as clock:
    subprocess.run([sys.executable, "-c", '''{BURNS}'''], check=True, start_new_session=sys.argv[1] == "apart")
print(json.dumps(clock.times(1, {{}}).total))
"""


def _clocked(where: str) -> tuple[float, float]:
    said = subprocess.run(
        [sys.executable, "-c", CLOCKED, where], check=True, capture_output=True, start_new_session=True
    )
    wall, cpu = json.loads(said.stdout)
    return wall, cpu


def test_cpu_of_processes_that_ended_counts() -> None:
    wall, cpu = _clocked("within")
    assert wall >= 1.6
    assert 0.9 < cpu < 4.0


def test_cpu_of_another_session_does_not_count() -> None:
    _, cpu = _clocked("apart")
    assert cpu < 0.4


def test_rounds_that_were_not_run_are_as_long_as_those_after_the_first() -> None:
    times = Times(
        rounds=3,
        laps=[(1.0, 1.0), (11.0, 6.0), (13.0, 9.0), (15.0, 12.0)],
        total=(16.0, 13.0),
        versions={},
        notes={},
    )
    assert times.of_rounds(3) == (16.0, 13.0)
    assert times.of_rounds(5) == (20.0, 19.0)


def test_the_whole_of_a_process_counts_from_its_start() -> None:
    program = """
import time
time.sleep(1.5)
sum(range(3 * 10**7))
import json
from simulations.benchmarks.comparison_workload import Clock
with Clock(from_start=True) as whole, Clock() as own:
    pass
print(json.dumps([clock.times(1, {}).total for clock in (whole, own)]))
"""
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, start_new_session=True
    )
    (whole_wall, whole_cpu), (wall, cpu) = json.loads(said.stdout)
    assert whole_wall > wall + 1.5
    assert whole_cpu > cpu + 0.1
    assert whole_wall < 60.0
