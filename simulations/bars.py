"""How far long work is: a bar on a terminal; elsewhere a line now and then, so that a log is no wall of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class Lines:
    """Says a line of what is going on, once it has taken a while, and then now and then."""

    def __init__(self, say: Callable[[str], None], every: float = _LINE_EVERY) -> None:
        """`say` gets the lines; `every`: seconds between two."""
        self._say, self._every = say, every
        self._said = time.monotonic()

    def tell(self, what: str, done: int, of: int | None) -> None:
        """How much of it is done; often nothing is said."""
        now = time.monotonic()
        if now - self._said >= self._every:
            self._said = now
            self._say(f"{what}: {done:,}" + ("" if of is None else f" of {of:,}"))


@contextmanager
def progress(
    what: str, *, hidden: bool = False, total: int | None = None
) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on the standard error, gone when all is done; yields what tells it how much is done, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    lines = Lines(lambda line: console.print(line, markup=False, highlight=False))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)

        def tell(done: int, of: int | None) -> None:
            bar.update(task, completed=done, total=of)
            if not hidden and not console.is_terminal:
                lines.tell(what, done, total if of is None else of)

        yield tell
