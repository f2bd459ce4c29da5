"""An update larger than any: `python -m simulations.benchmarks.large_update` adds a table to docs/benchmarks.md.

No release of Fedtide is longer than 992,309 numbers (`common.privacy.noise.LARGEST_DIMENSION`), 4 MB in float32. This
sends 27 times as much from a ClientApp through Flower's own SuperNode and SuperLink to a ServerApp, as `common.wire`
writes it, and holds what arrives against what was sent. Flower cuts arrays into chunks of 5 MiB, each a call of its
own, so that gRPC's limit on a message is never met; a federation is not begun for this, and nothing is signed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine

NUMBERS = 27_000_000
_LIMIT = 240.0
_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "large"
version = "1.0.0"
description = "One large update"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedtide"
[tool.flwr.app.components]
serverapp = "large.app:server"
clientapp = "large.app:client"
[tool.flwr.app.config]
out = ""
numbers = 1
"""
_APP = """\
import json
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


def state(context):
    import torch

    numbers = int(context.run_config["numbers"])
    return {"w": torch.randn(numbers, generator=torch.Generator().manual_seed(1))}


@client.train()
def train(message: Message, context: Context) -> Message:
    from common.wire import Update, answer_to_records

    return Message(answer_to_records(Update.of(state(context), b"receipt")), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    from common.wire import Reason, Refusal, answer_from_records, answer_to_records, state_digest

    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    asked = Message(answer_to_records(Refusal(Reason.PLAN)), dst_node_id=nodes[0], message_type="train")
    begun = time.monotonic()
    numbers = list(grid.push_messages([asked]))
    while not (replies := list(grid.pull_messages(numbers))):
        time.sleep(0.2)
    seconds = time.monotonic() - begun
    sent = answer_from_records(replies[0].content).state
    whole = state_digest(sent) == state_digest(state(context))
    with open(str(context.run_config["out"]), "w") as file:
        json.dump({"whole": whole, "bytes": sent["w"].nbytes, "seconds": seconds}, file)
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def _running(commands: Sequence[Sequence[str]], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Processes, ended afterwards with all that they started."""
    begun = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"{number}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            begun.append(process)
        yield
    finally:
        for process in begun:
            process.terminate()
        for process in begun:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def measure(folder: Path) -> dict[str, float]:
    """Whether the update arrived whole, its bytes, and seconds from the question to the answer.

    Raises:
        RuntimeError: it did not arrive in time.
    """
    fleet, control, node = _free_ports(3)
    app, home, out = folder / "app", folder / "home", folder / "out.json"
    (app / "large").mkdir(parents=True)
    home.mkdir()
    (app / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    (app / "large" / "__init__.py").touch()
    (app / "large" / "app.py").write_text(_APP, encoding="utf-8")
    connection = (
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
    )
    (home / "config.toml").write_text(connection, encoding="utf-8")
    commands = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }
    link = [
        *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(control)),
        *("--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"),
    ]
    supernode = [
        *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{fleet}"),
        *("--host", "127.0.0.1", "--port", str(node)),
    ]
    end = time.monotonic() + _LIMIT
    with _running([link, supernode], folder, environment):
        config = f'out="{out}" numbers={NUMBERS}'
        begin = ["flwr", "run", "app", "here", "--run-config", config]
        while subprocess.run(begin, cwd=folder, env=environment, check=False, capture_output=True).returncode:
            _wait(end, "Flower took no run")
        while not out.is_file() or not out.read_bytes().endswith(b"}"):
            _wait(end, "no update came")
    found: dict[str, float] = json.loads(out.read_text())
    return found


def _wait(end: float, what: str) -> None:
    if time.monotonic() > end:
        raise RuntimeError(f"{what} within {_LIMIT:g} s: see what else this machine does, then try again")
    time.sleep(0.5)


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    import flwr

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    chunks = math.ceil(found["bytes"] / FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)
    rows = [
        Row(
            f"{found['bytes'] / 1e6:.0f} MB from ClientApp to ServerApp, {chunks} chunks of "
            f"{FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE / 2**20:g} MiB at most",
            "as it was sent" if found["whole"] else "not as it was sent",
            "arrives whole",
            bool(found["whole"]),
        ),
        Row(
            "from the question to the answer, wall time, processes' start included",
            f"{found['seconds']:.1f} s",
        ),
    ]
    command = "python -m simulations.benchmarks.large_update"
    section = "\n".join(
        [
            "## A large update",
            "",
            f"`{command}`, {machine()}, Flower {flwr.__version__}, SuperLink and SuperNode on loopback. No release of "
            "Fedtide is larger than 4 MB, as the noise vouches for 992,309 numbers in one; Flower cuts what is "
            "larger, so nothing of ours has to.",
            "",
            *as_table(rows),
            "",
        ]
    )
    print(section)
    if not arguments.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
