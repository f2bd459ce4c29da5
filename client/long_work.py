"""Work that may take long: a bar on standard error once it does, and an orderly end when it is told to stop."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from common.events.cleaning import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_LONG = 2.0
_ENDED = 128 + signal.SIGTERM


@contextmanager
def long_work(after: float = _LONG, console: Console | None = None) -> Iterator[Progress]:
    """Yields what to tell of the work's progress; the bar shows once the work has taken `after` seconds.

    SIGTERM ends the work as Ctrl-C does: what it had begun to write is removed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    shown = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=(console := console or Console(stderr=True)),
        transient=True,
        disable=not console.is_terminal,
    )
    began = time.monotonic()
    tasks: dict[str, TaskID] = {}
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED))
            stack.callback(signal.signal, signal.SIGTERM, before)

        def tell(what: str, done: int, of: int | None) -> None:
            if not tasks:
                if time.monotonic() - began < after:
                    return
                stack.enter_context(shown)
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=of)
            shown.update(tasks[what], completed=done, total=of)

        yield tell
