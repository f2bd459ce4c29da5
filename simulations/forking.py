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


def begin_importing(sites: int) -> None:
    """Starts the server where so many sites will get workers: it imports while this process does other things."""
    if sites >= WORKERS_FROM and (os.cpu_count() or 1) > 1:
        worker_context()
        forkserver.ensure_running()
