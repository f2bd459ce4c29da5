"""What many sites cost the server: `python -m simulations.benchmarks.nodes` adds it to docs/benchmarks.md.

A server and two sites on loopback, from the commands alone, and beside them light nodes: threads of one process that
call the Fleet API as a SuperNode does, and answer each request with a refusal at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine
from simulations.faults.place import Place
from simulations.faults.tiny import tiny_plan, write_data, write_language_model

SITES = ("east", "north")
STEPS = 10
_TARGET = 8.0
_LOOKS, _OFTEN, _OFTEN_FOR = 3.0, 0.5, 60.0
_IDLE = 20.0
_BEFORE = """Before SuperLink had its guard, which also asks the database for less (`server/superlink.py`), the same
run of the version before it (76d93bd), in turn with the guarded one within half an hour of 2026-12-01 and at the same
load, took 10.2 s a round (9.6 to 15.0 s) and 191 ms of SuperLink's CPU for a node and round; with it, 5.5 s and
100 ms."""


@dataclass(frozen=True)
class Measured:
    """Seconds of each round after two that warm up; of SuperLink, CPU seconds of those rounds and a share while idle.

    Attributes:
        memory: bytes that SuperLink held when the run ended.
    """

    nodes: int
    rounds: tuple[float, ...]
    cpu: float
    idle: float
    memory: int

    @property
    def cpu_of_node(self) -> float:
        """Seconds of SuperLink's CPU for a node and round."""
        return self.cpu / len(self.rounds) / self.nodes


def cpu_seconds(pid: int) -> float:
    """What a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def light_node(address: str, authority: bytes, key: Any, end: threading.Event) -> None:
    """A node that refuses what it is asked; as often at the server as a SuperNode of ours."""
    import grpc  # type: ignore[import-untyped]
    from flwr.app import Message
    from flwr.client.grpc_rere_client.connection import grpc_request_response
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
    )
    from flwr.supercore.inflatable.inflatable_utils import pull_objects
    from flwr.supercore.retry import RetryInvoker, exponential

    from common.wire import Reason, Refusal, answer_to_records

    again = RetryInvoker(exponential, grpc.RpcError, max_tries=None, max_time=None)
    whole = grpc_request_response(
        address, False, again, root_certificates=authority, authentication_keys=(key, key.public_key())
    )
    with whole as (node, receive, send, get_run, get_fab, pull, push, confirm):
        seen, often = set[int](), 0.0
        while not end.wait(_OFTEN if time.monotonic() < often else _LOOKS):
            found = receive()
            if found is None:
                continue
            message, tree = found
            run = message.metadata.run_id
            if run not in seen:
                get_fab(get_run(run).fab_hash, run)
                seen.add(run)
            names = [each.object_id for each in iterate_object_tree(tree)]
            pull_objects(list(names), lambda name, run=run: pull(run, name))
            confirm(run, message.metadata.message_id)
            reply = Message(answer_to_records(Refusal(Reason.POLICY)), reply_to=message)
            vars(reply.metadata).update(_src_node_id=node, _message_id="")
            vars(reply.metadata)["_message_id"] = reply.object_id
            parts = get_all_nested_objects(reply)
            wanted, session = send(reply, get_object_tree(reply), 0.0)
            for name in wanted:
                push(run, session, name, parts[name].deflate())
            often = time.monotonic() + _OFTEN_FOR


def serve_light_nodes(folder: Path, address: str, authority: Path) -> None:
    """The process of all light nodes, whose private keys lie in a folder; until its standard input ends."""
    import flwr.client.grpc_rere_client.connection  # noqa: F401 (Flower's import by two threads at once may fail)
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    end = threading.Event()
    threads = []
    for file in sorted(folder.glob("*.pem")):
        key = load_ssh_private_key(file.read_bytes(), None)
        arguments = (address, authority.read_bytes(), key, end)
        threads.append(threading.Thread(target=light_node, args=arguments, daemon=True))
        threads[-1].start()
        time.sleep(0.1)
    sys.stdin.read()
    end.set()
    for thread in threads:
        thread.join(10)


def register(place: Place, count: int) -> Path:
    """Enrolls light nodes, each with a ledger that nothing is ever charged in; the folder with their private keys.

    Into Flower's database by Flower's own code: a command for each takes seconds.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )
    from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.superlink.federation import NoOpFederationManager

    from client.ledger import Ledger
    from common.privacy.mechanisms import GaussianSum
    from server.deployment import Deployment
    from server.nodes import keep_node_key
    from server.registry import Registry

    folder = place.folder / "light"
    folder.mkdir()
    server = Deployment.load(place.server)
    database, registry = str(server.database), Registry(server.registry)
    state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
    for number in range(count):
        name, key = f"light{number:02}", ec.generate_private_key(ec.SECP384R1())
        ledger = folder / f"{name}-ledger"
        with Ledger.create(ledger, epsilon=20.0, delta=1e-5, typical_plan=[GaussianSum(8.0)]) as made:
            registry.enroll(name, made.entries()[0])
        state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key_to_bytes(key.public_key()), 30.0)
        line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        keep_node_key(server, name, line)
        (folder / f"{name}.pem").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
    return folder


@contextmanager
def deployed(folder: Path, light: int) -> Iterator[Place]:
    """Two sites and light nodes that are up and connected; ended afterwards."""
    environment = {
        **os.environ, "FEDTIDE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    folder.mkdir(parents=True)
    place = Place(folder, environment, own_network=False)
    nodes = None
    try:
        write_language_model(place.model)
        write_data(folder / "data")
        (folder / "typical.json").write_text(tiny_plan(place.model, "typical").to_json())
        place.well(
            "server", "init", place.server, "--host", place.host, "--port", place.ports[0],
            "--control-port", place.ports[1], "--metrics-port", place.ports[2],
        )  # fmt: skip
        place.start_server()
        for name in SITES:
            place.make_site(name)
            place.enroll(name)
            place.start_site(name)
        place.wait_online(*SITES)
        keys = register(place, light)
        nodes = subprocess.Popen(
            [
                *(sys.executable, "-m", "simulations.benchmarks.nodes", "--serve", str(keys)),
                *("--address", f"{place.host}:{place.ports[0]}"),
                *("--authority", str(place.server / "tls" / "ca.crt")),
            ],
            env=environment, stdin=subprocess.PIPE, stderr=(folder / "light.log").open("wb"),
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        place.until(lambda: _online(place) >= light + len(SITES), "all nodes online", 2.0)
        yield place
    finally:
        if nodes is not None:
            nodes.communicate(timeout=60)
        for running in reversed(place.up.values()):
            running.end()


def _online(place: Place) -> int:
    from server.deployment import Deployment
    from server.nodes import known_nodes

    return sum(node.online for node in known_nodes(Deployment.load(place.server)))


def measure(folder: Path, light: int, rounds: int) -> Measured:
    """One run of two sites and light nodes.

    Raises:
        RuntimeError: the run did not end well.
    """
    with deployed(folder, light) as place:
        superlink = place.up["server"].part("server.superlink")
        before = cpu_seconds(superlink)
        time.sleep(_IDLE)
        idle = (cpu_seconds(superlink) - before) / _IDLE
        plan = json.loads(
            tiny_plan(
                place.model, "bench", rounds, quorum=None, minimum_sites=2, round_deadline=300.0
            ).to_json()
        )
        plan["training"]["steps_per_round"] = STEPS
        (folder / "bench.json").write_text(json.dumps(plan))
        run = place.begin("bench", rounds)
        taken: list[tuple[float, float]] = []
        while run.process.poll() is None:
            with suppress(FileNotFoundError):
                done = len(place.lines("bench", "rounds.jsonl"))
                if done > len(taken):
                    taken.append((time.monotonic(), cpu_seconds(superlink)))
            time.sleep(0.05)
        if run.process.returncode:
            raise RuntimeError(f"the benchmark's run did not end well: {run.said()}")
        memory = 1024 * int(Path(f"/proc/{superlink}/status").read_text().split("VmRSS:")[1].split()[0])
    spans = [after[0] - now[0] for now, after in pairwise(taken[1:])]
    return Measured(light + len(SITES), tuple(spans), taken[-1][1] - taken[1][1], idle, memory)


def as_markdown(found: Measured, load: tuple[float, float]) -> str:
    """A section for the page of benchmarks."""
    median = statistics.median(found.rounds)
    rows = [
        Row(
            f"a round of {found.nodes} nodes, median", f"{median:.2f} s", f"< {_TARGET:g} s", median < _TARGET
        ),
        Row("the longest and the shortest", f"{max(found.rounds):.2f} s and {min(found.rounds):.2f} s"),
        Row("SuperLink's CPU, for a node and round", f"{1000 * found.cpu_of_node:.0f} ms"),
        Row("SuperLink's CPU with no run, of a core", f"{found.idle:.1%}"),
        Row("SuperLink's memory after the run", f"{found.memory / 1e6:.0f} MB"),
    ]
    lines = [
        "## Many nodes at one server",
        "",
        f"`python -m simulations.benchmarks.nodes`, {machine()}; two sites that train for {STEPS} steps, and "
        f"{found.nodes - len(SITES)} light nodes that refuse at once; {len(found.rounds)} rounds after two that warm "
        f"up. All of it shares the machine; its load (one minute's) was {load[0]:.1f} before and {load[1]:.1f} after.",
        "",
        *as_table(rows),
    ]
    return "\n".join([*lines, "", _BEFORE, ""])


def main() -> None:
    """Prints the table, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--light", type=int, default=30)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where it is deployed; else a temporary one"
    )
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--authority", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_light_nodes(arguments.serve, arguments.address, arguments.authority)
        return
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder) / "deployed", arguments.light, arguments.rounds)
    section = as_markdown(found, (before, os.getloadavg()[0]))
    print(section)
    if not arguments.no_document:
        add_to_document(section)


if __name__ == "__main__":
    main()
