"""The server that workers are forks of: started ahead where there will be workers, and found by them there."""

from __future__ import annotations

import subprocess
import sys

import pytest

AHEAD = """
import os, sys
from multiprocessing import forkserver
import simulations.forking
assert "torch" not in sys.modules
os.cpu_count = lambda: int(sys.argv[2])
simulations.forking.begin_importing(int(sys.argv[1]))
server = forkserver._forkserver._forkserver_pid
if server is not None:
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(1, simulations.forking.worker_context()) as pool:
        assert pool.submit(os.getppid).result() == server
        assert pool.submit(eval, "{'opacus', 'client.together'} <= set(__import__('sys').modules)").result()
print(server is not None)
"""


@pytest.mark.parametrize(("sites", "cores", "begun"), [(63, 2, False), (64, 1, False), (64, 2, True)])
def test_it_is_started_ahead_where_workers_will_be_asked_for(sites: int, cores: int, begun: bool) -> None:
    said = subprocess.run(
        [sys.executable, "-c", AHEAD, str(sites), str(cores)], check=True, capture_output=True, text=True
    )
    assert said.stdout.split() == [str(begun)]
