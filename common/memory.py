"""Memory that training uses again in each step."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""

_LARGE = 1 << 30
"""Bytes."""


@contextmanager
def memory_kept() -> Iterator[None]:
    """Has glibc keep what is freed inside, up to a GiB, and give it back at the end; with another libc, does nothing.

    A step frees blocks of many megabytes and asks for the same ones again. By default glibc may give each back to the
    system, and every page of the next one is a fault: up to half of a small model's step was seen to go there.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        libc.mallopt(option, _LARGE)
    try:
        yield
    finally:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018
    except (OSError, AttributeError):
        return None
    return libc
