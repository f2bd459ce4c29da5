"""What training frees stays with the process while it trains, and goes back to the system after."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from common import memory
from common.memory import memory_kept

PROGRAM = """
import resource, sys
from contextlib import nullcontext
import numpy as np
from common.memory import memory_kept

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = resident()
with memory_kept() if sys.argv[1] == "kept" else nullcontext():
    began = faults()
    for _ in range(10):
        np.ones(40 << 20, dtype=np.uint8)
    found = faults() - began
print(found, resident() - before)
"""


@pytest.mark.skipif(memory._glibc() is None, reason="for glibc")
def test_pages_are_asked_for_once_and_given_back_at_the_end() -> None:
    def found(how: str) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"},
        )
        faults, left = map(int, done.stdout.split())
        return faults, left

    usual, _ = found("usual")
    faults, left = found("kept")
    if usual < 2_000:
        pytest.skip("this system maps large pages, or keeps what is freed by itself")
    assert faults < 0.3 * usual
    assert left < 20 << 20


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory_kept():
        pass
