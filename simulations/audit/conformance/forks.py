"""A function's result from a copy of this process."""

from __future__ import annotations

import os
import select
import signal
import time
import warnings
from collections.abc import Callable

import numpy as np

from simulations.audit.conformance.checking import Vector

PATIENCE = 60.0


def in_fork(compute: Callable[[], Vector]) -> Vector:
    """A vector of numbers, computed in a fork of this process, which ends there.

    Raises:
        RuntimeError: the copy failed, or did not answer in time.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of threads: the copy starts none and prints nothing
        child = os.fork()
    if child == 0:
        _answer(compute, writing)
    os.close(writing)
    try:
        data = _read(reading, time.monotonic() + PATIENCE)
    finally:
        os.close(reading)
        _end(child)
    if len(data) < 8:
        raise RuntimeError(f"a copy of the process failed, or gave no answer in {PATIENCE:g} s")
    return np.frombuffer(data, dtype=np.float64).copy()


def _answer(compute: Callable[[], Vector], writing: int) -> None:
    try:
        import torch

        torch.set_num_threads(1)
        left = memoryview(np.ascontiguousarray(compute(), dtype=np.float64).tobytes())
        while left:
            left = left[os.write(writing, left) :]
    finally:
        os._exit(0)  # no clean-up of what is the parent's


def _read(reading: int, end: float) -> bytes:
    parts: list[bytes] = []
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return b""


def _end(child: int) -> None:
    with_end = time.monotonic() + 1.0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > with_end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.01)
