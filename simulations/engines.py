"""The two ways to run a federation on one machine: Flower's simulation engine with Ray, and one process.

Flower's engine runs in a process group of its own, and nothing of it is left when this returns, is interrupted, or is
killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common.supervision import end_with_parent
from server.app import REGISTRY_FOLDER, RUN_FOLDER
from server.registry import Registry
from server.runs import RunError, RunFolder
from simulations.sites import SimulatedSite, place_sites

_LONGEST_PLACE = 20

_DEATHS = (
    "ray.exceptions.ActorDiedError",
    "ray.exceptions.OutOfMemoryError",
    "ray.exceptions.WorkerCrashedError",
)
"""How lines of Ray's begin where a process of it is gone."""

_MOST_SAID = 160


def run_in_this_process(environment: dict[str, str], sites: list[SimulatedSite]) -> None:
    """Server and sites in this process; many sites answer in one go, in a few workers."""
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.answering import answering
    from simulations.inline import run_inline

    with _environment(environment), answering(len(sites)) as together:
        configs = {number + 2: {"partition-id": number} for number in range(len(sites))}
        registry = Registry(Path(environment[REGISTRY_FOLDER]))
        place_sites(registry, {node: sites[node - 2].name for node in configs})
        run_inline(server_app, client_app, configs, {"run-dir": environment[RUN_FOLDER]}, together)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_with_flower(run: RunFolder, environment: dict[str, str], nodes: int, cpus: int) -> None:
    """Runs Flower's engine in a process group of its own, and leaves none of it behind."""
    command = [
        sys.executable,
        "-m",
        "simulations.flower_engine",
        "--sites",
        str(nodes),
        "--cpus",
        str(cpus),
    ]
    with (run.path / "engine.log").open("wb") as log, _short_folder() as short:
        own = {**os.environ, **environment, "RAY_TMPDIR": short, "TMPDIR": short}
        own.pop("RAY_ADDRESS", None)  # another's cluster, which has not this run's folders
        engine = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=own,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGKILL),  # noqa: PLW1509 (it calls libc, and takes no lock)
        )
        try:
            # Short naps, not one long wait: an interrupt must be seen at once, whichever thread it reaches.
            while (code := engine.poll()) is None:
                time.sleep(0.1)
        finally:
            _end_group(engine)
    if code != 0:
        said = (run.path / "engine.log").read_text(errors="replace").splitlines()
        raise RunError(f"{_why(said, code)}; the run is kept as incomplete in {run.path}, with engine.log")


def _why(log: list[str], code: int) -> str:
    """Why the engine ended, of its log's lines; what a worker's death leads to is not the cause."""
    if death := next((line.strip() for line in log if line.startswith(_DEATHS)), ""):
        return (
            f"a worker of Ray's died while sites computed ({death[:_MOST_SAID].rstrip('. ')}): choose fewer with "
            "--cpus, which takes less memory, or --engine inline"
        )
    ours = [line.removeprefix("error: ") for line in log if line.startswith("error: ")]
    return ours[-1] if ours else f"Flower's engine ended with code {code}"


@contextlib.contextmanager
def _short_folder() -> Iterator[str]:
    """A new folder for Ray's sockets and logs, whose name leaves room in the 107 bytes that a socket's may have.

    Raises:
        RunError: there is no place for one.
    """
    for place in (tempfile.gettempdir(), "/tmp", "/dev/shm", "/var/tmp"):
        if len(os.fsencode(place)) <= _LONGEST_PLACE and os.access(place, os.W_OK | os.X_OK):
            with tempfile.TemporaryDirectory(prefix="ft-", dir=place, ignore_cleanup_errors=True) as folder:
                yield folder
            return
    raise RunError(
        f"Ray needs a folder for its sockets whose name has at most {_LONGEST_PLACE} bytes, and neither TMPDIR, /tmp, "
        "/dev/shm nor /var/tmp can be written: set TMPDIR to a short one, or use --engine inline"
    )


def _end_group(engine: subprocess.Popen[bytes]) -> None:
    """Ends every process of the engine's session: Ray starts daemons that would outlive it."""
    for sent, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        alive = _session_members(engine.pid)
        if not alive:
            break
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        end = time.monotonic() + patience
        while _session_members(engine.pid) and time.monotonic() < end:
            engine.poll()
            time.sleep(0.05)
    engine.wait()


def _session_members(session: int) -> list[int]:
    """Processes of a session, or below one, that still run (Ray's daemons keep the session of who started them)."""
    alive = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    alive.append(int(entry.name))
    return alive
