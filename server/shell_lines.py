"""What a person is told to type: lines for the shell that work as they are printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from server.runs import BEGUN, PRIVATE, RunFolder


def command_line(*words: str | Path) -> str:
    """A line for the shell that calls `fedtide` as this process was called."""
    called, found = Path(sys.argv[0]), shutil.which("fedtide")
    if called.name != "fedtide":
        program = [sys.executable, "-m", "common.cli"]
    elif found is not None and Path(found).resolve() == called.resolve():
        program = ["fedtide"]
    else:
        program = [str(called.absolute())]
    return shlex.join([*program, *map(str, words)])


def resume_line(run: RunFolder) -> str:
    """The command that goes on with an unfinished run."""
    if (run.path / PRIVATE / BEGUN).is_file():
        return command_line("simulate", "--resume", run.path)
    return command_line("server", "run", run.path.parent.parent, "--resume", run.name)
