"""Which run a person means: by its folder, its name, or its plan's."""

from __future__ import annotations

import re
from pathlib import Path

from server.runs import DISCARDED, INCOMPLETE, RunError, RunFolder


def run_named(given: str | Path, runs: Path) -> RunFolder:
    """The run of a folder, or of a name under `runs`, with or without the ending of an unfinished one.

    A plan's name will do, where one run alone under `runs` has it.

    Raises:
        RunError: there is none, there are several, or it was put away.
    """
    path = Path(given).expanduser()
    for place in (path, runs / path.name):
        bare = place.with_name(place.name.removesuffix(INCOMPLETE))
        for each in (bare, bare.with_name(bare.name + INCOMPLETE)):
            if (each / "plan.json").is_file():
                if each.name.endswith(DISCARDED):
                    raise RunError(f"the run in {each} was put away for good: begin a new one")
                return RunFolder(each.resolve())
    named = [each for each in runs.glob(f"*-{path.name}*") if _is_run_of(each, path.name)]
    if len(named) == 1:
        return RunFolder(named[0].resolve())
    if named:
        raise RunError(
            f"{len(named)} runs in {runs} are called {path.name}: give one's folder, such as {max(named).name}"
        )
    raise RunError(
        f"there is no run {given}, neither as a folder nor by this name in {runs}: `ls {runs}` shows those that "
        "there are"
    )


def _is_run_of(folder: Path, plan: str) -> bool:
    name = folder.name.removesuffix(INCOMPLETE)
    return (
        bool(re.fullmatch(rf"\d{{8}}-\d{{6}}-{re.escape(plan)}(-\d+)?", name))
        and (folder / "plan.json").is_file()
    )
