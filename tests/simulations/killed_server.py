"""A federation whose process is killed at a chosen line of the server's own code; `test_resume.py` kills it.

Run as a program with a folder, it builds the model. Then for each line on its standard input, which holds a run's
folder, a count and seconds, it forks a child that runs, or goes on with, the run in that folder. The child kills
itself with SIGKILL at so many lines of code in `server/`, or is killed after so long (0: never). Its exit code is
printed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import client.app
import client.site
import server.rounds
from client.app import SITES_FOLDER
from client.policy import Performance
from common.config import read_plan
from common.events.catalog import Catalog
from server.app import NODES_EXPECTED
from server.app import app as server_app
from simulations import inline
from simulations.sites import registry_folder

NODES = 2
_SERVER = str(Path(server.rounds.__file__).parent)


class Executioner:
    """A trace function that ends the process at a line of the server's code."""

    def __init__(self, lines: int) -> None:
        self._left = lines

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_SERVER) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._left -= event == "line"
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._line


def work(folder: Path, run: Path, lines: int) -> None:
    """Runs, or goes on with, one run over the sites in the folder."""
    sites = folder / "sites"
    os.environ.update({SITES_FOLDER: str(sites), NODES_EXPECTED: str(NODES)})
    configs = {node: {"partition-id": node - 2} for node in range(2, 2 + NODES)}
    config = {"run-dir": str(run), "registry-dir": str(registry_folder(sites))}
    if lines:
        sys.settrace(Executioner(lines))
    inline.run_inline(server_app, client.app.app, configs, config)
    sys.settrace(None)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    plan, catalog = read_plan(folder / "plan.json"), Catalog.load(folder / "sites" / "catalog.jsonl")
    client.site.site_model(plan, catalog, Performance(), offline=True)
    print("ready", flush=True)
    for line in sys.stdin:
        run, lines, seconds = line.split()
        pid = os.fork()
        if pid == 0:
            log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                work(folder, Path(run), int(lines))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(3)
            os._exit(0)
        end = time.monotonic() + float(seconds)
        while float(seconds) and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
