"""How `fedtide simulate` goes on with an interrupted run: with the options that it was begun with, and what it says."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import typer
from click.core import ParameterSource

from common.cli import InterruptError, UserError
from server.run_names import run_named
from server.runs import RunError, RunFolder
from server.shell_lines import resume_line
from simulations.begun import Begun, is_trained
from simulations.follower import Watcher
from simulations.outcome import Outcome

_OF_NOW = frozenset({"runs", "cpus", "offline", "as_json"})
"""Options that are those of the command that goes on, whatever the one before said."""
_MOVED = frozenset({"data_path", "log", "catalog"})
"""Options that may be given again, where files have moved."""


@dataclass(frozen=True)
class Call:
    """What stands behind a call of the command, besides its options: see `call_of`.

    Attributes:
        unfinished: the run to go on with.
        watcher, on_outcome: of another command that called this one, which then says nothing itself.
    """

    unfinished: RunFolder | None = None
    watcher: Watcher | None = None
    on_outcome: Callable[[Outcome], None] | None = None


def call_of(context: typer.Context) -> Call:
    """What stands behind this call."""
    return context.obj if isinstance(context.obj, Call) else Call()


def to_keep(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run keeps, for whoever goes on with it."""
    return {name: value for name, value in given.items() if name not in _OF_NOW | {"context", "resume"}}


def go_on(context: typer.Context, given: Mapping[str, Any], command: Callable[..., None]) -> RunFolder | None:
    """Calls the command again for an interrupted run, with the options that the run was begun with.

    Args:
        given: the options of now.
        command: `simulate`.

    Returns:
        The run, where it is finished and there is nothing to do.

    Raises:
        UserError: an option is given that the run has already.
        RunError: there is no such run, another version began it, or it does not say with what.
    """
    said = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if odd := sorted(said - _OF_NOW - _MOVED - {"resume"}):
        option = "a plan" if odd[0] == "plan_file" else "--" + odd[0].strip("_").replace("_", "-")
        raise UserError(
            f"--resume goes on with the plan and options that the run was begun with: leave {option} out, or leave "
            "--resume out to begin a new run"
        )
    run = run_named(given["resume"], given["runs"])
    if run.is_whole:
        return run
    begun = Begun.load(run)
    run.check_version()
    if not begun.given:
        raise RunError(
            f"{run.path} was not begun by `fedtide simulate`: what began it goes on with it, or begins a new run"
        )
    again = {name: value for name, value in begun.given.items() if name in given}
    again |= {name: given[name] for name in (_OF_NOW | said) - {"resume"}}
    context.obj = replace(call_of(context), unfinished=run)
    command(context, **again | {"resume": None})
    return None


@contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM, which batch systems send, ends the command as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted(run: RunFolder | None) -> InterruptError:
    """What is said to whoever interrupted the command, and how to go on."""
    if run is None or not run.path.is_dir():
        return InterruptError("nothing was begun yet; the same command begins anew")
    done = (
        f"{len(list(run.records()))} of {len(run.plan().schedule())} rounds are done, and stay so; to go on:"
    )
    return InterruptError(f"{done}\n{resume_line(run)}")


def with_way_out(error: RunError, run: RunFolder | None) -> RunError:
    """The error of a run, with how to go on where that can help."""
    if run is None or not run.path.is_dir():
        return error
    try:
        run.check_version()
    except RunError:  # the code was changed while it ran
        return error
    over = len(list(run.records())) >= len(run.plan().schedule())
    if over and not is_trained(run):  # it would fail again
        return error
    return RunError(f"{error}; `{resume_line(run)}` goes on with it")
