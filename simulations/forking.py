"""The process that a simulation's workers are forks of. Imported before torch is, which it imports itself."""

from __future__ import annotations

import os
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext

WORKERS_FROM = 64
"""So many sites are worth a process for each core, which takes seconds to start."""

_NEEDED = ["client.together", "opacus"]


def worker_context() -> ForkServerContext:
    """One server, which imports what all workers need; each is a fork of it, and none of this process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_NEEDED)
    return context


def workers_of(sites: int) -> int:
    """The processes that so many sites of a simulation train in: one for each core, or this one alone."""
    return os.cpu_count() or 1 if sites >= WORKERS_FROM else 1


def begin_importing(sites: int) -> None:
    """Starts the server where so many sites get workers: it imports while this process does other things."""
    if workers_of(sites) > 1:
        worker_context()
        forkserver.ensure_running()
