"""What a stranger does who has ca.crt, a network path and public knowledge: run as another user, with nothing else.

`python -m simulations.faults.intruder FILE` waits for a JSON file with what is known, tries, and prints a list of
[what, what it came to, whether it was kept out].
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from simulations.faults.stranger import standing_still

_APP = """import os
from pathlib import Path
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    Path({proof!r}).write_text(str(os.getuid()))
"""
_PROJECT = """[project]
name = "stranger"
version = "1.0.0"
description = "not asked for"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "stranger"
fab-include = ["stranger.py"]
[tool.flwr.app.components]
serverapp = "stranger:app"
clientapp = "stranger:app"
"""
_SECONDS, _PATIENCE = 60.0, 600.0

Tried = tuple[str, str, bool]


def from_network(known: dict[str, Any]) -> Iterator[Tried]:
    """Tries of another machine."""
    for name in ("control", "metrics"):
        yield _connect(known, name)
    yield from _other_services(known)
    yield from _as_a_node(known)
    yield from standing_still(known)


def _connect(known: dict[str, Any], name: str) -> Tried:
    what = f"open the {name} port from the network"
    try:
        with socket.create_connection((known["host"], known[name]), timeout=5):
            return what, "it opens", False
    except OSError as error:
        return what, error.strerror or type(error).__name__, True


def channel(known: dict[str, Any]) -> Any:
    """A way to the port that sites reach."""
    import grpc  # type: ignore[import-untyped]
    from flwr.supercore.interceptors import RuntimeVersionClientInterceptor

    return grpc.intercept_channel(
        grpc.secure_channel(
            f"{known['host']}:{known['fleet']}",
            grpc.ssl_channel_credentials(Path(known["ca"]).read_bytes()),
            options=[("grpc.enable_http_proxy", 0)],
        ),
        RuntimeVersionClientInterceptor(component_name="SuperNode"),
    )


def answered(call: Any, request: Any, headers: Any = ()) -> tuple[str, bool]:
    """What a question came to, and whether it was refused, or answered with nothing."""
    import grpc

    try:
        answer = call(request, metadata=headers, timeout=10)
    except grpc.RpcError as error:
        return f"{error.code().name}: {str(error.details())[:90]}", True
    size = len(answer) if isinstance(answer, bytes) else answer.ByteSize()
    return f"answered, {size} bytes", not size


def _other_services(known: dict[str, Any]) -> Iterator[Tried]:
    """Control and Runtime methods, on the port that sites reach."""
    from flwr.proto import control_pb2, runtime_pb2

    way, heard, kept_out = channel(known), set(), True
    count = 0
    for module in (control_pb2, runtime_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                said, refused = answered(way.unary_unary(f"/{service.full_name}/{method.name}"), b"")
                heard.add(said)
                kept_out, count = kept_out and refused, count + 1
    what = f"start a run, register a key, fetch a task: all {count} Control and Runtime methods on the fleet port"
    yield what, "; ".join(sorted(heard)), kept_out


def _as_a_node(known: dict[str, Any]) -> Iterator[Tried]:
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
    from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    stub = FleetStub(channel(known))
    own = ec.generate_private_key(ec.SECP384R1())
    public = public_key_to_bytes(own.public_key())
    victim_key, victim, run = bytes.fromhex(known["victim_key"]), known["victim"], known["run"]

    def headers(shown: bytes) -> list[tuple[str, Any]]:
        stamp = datetime.now(UTC).isoformat()
        return [
            (PUBLIC_KEY_HEADER, shown),
            (TIMESTAMP_HEADER, stamp),
            (SIGNATURE_HEADER, sign_message(own, stamp.encode("ascii"))),
        ]

    node = Node(node_id=victim)
    pull = fleet_pb2.PullMessagesRequest(node=node)
    others = fleet_pb2.ActivateNodeRequest(public_key=victim_key, heartbeat_interval=1800.0)
    yield "activate a site's node, to keep its place", *answered(stub.ActivateNode, others, headers(public))
    yield (
        "register an own key at the Fleet API",
        *answered(stub.RegisterNode, fleet_pb2.RegisterNodeFleetRequest(public_key=public), headers(public)),
    )
    activate = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=30.0)
    yield (
        "connect as a node with an own, unregistered key",
        *answered(stub.ActivateNode, activate, headers(public)),
    )
    yield "pull a site's messages without a key", *answered(stub.PullMessages, pull)
    yield "pull a site's messages with an own key", *answered(stub.PullMessages, pull, headers(public))
    nobody = fleet_pb2.PullMessagesRequest(node=Node(node_id=0))
    yield "pull messages as node 0 with an own key", *answered(stub.PullMessages, nobody, headers(public))
    yield (
        "pull a site's messages with its public key and an own signature",
        *answered(stub.PullMessages, pull, headers(victim_key)),
    )
    fab = fab_pb2.GetFabRequest(node=node, hash_str=known["bundle"], run_id=run)
    yield "fetch the bundle of a run, its hash known", *answered(stub.GetFab, fab, headers(public))
    yield (
        "ask about a run",
        *answered(stub.GetRun, run_pb2.GetRunRequest(node=node, run_id=run), headers(public)),
    )
    for number, name in enumerate(known["objects"]):
        update = message_pb2.PullObjectRequest(node=node, run_id=run, object_id=name)
        yield (
            f"read a site's update, its id known ({number + 1})",
            *answered(stub.PullObject, update, headers(public)),
        )
    push = fleet_pb2.PushMessagesRequest(node=node)
    yield "push a message as a site", *answered(stub.PushMessages, push, headers(public))
    beat = heartbeat_pb2.SendNodeHeartbeatRequest(node=node, heartbeat_interval=30.0)
    yield "send a heartbeat as a site", *answered(stub.SendNodeHeartbeat, beat, headers(public))
    stale = [
        (name, bytes.fromhex(value) if name != TIMESTAMP_HEADER else value) for name, value in known["stale"]
    ]
    yield "replay a site's own signed header of ten minutes ago", *answered(stub.PullMessages, pull, stale)
    forged = [(name, value) for name, value in stale if name != TIMESTAMP_HEADER]
    forged.append((TIMESTAMP_HEADER, (datetime.now(UTC) - timedelta(seconds=1)).isoformat()))
    yield "replay that header under a time of now", *answered(stub.PullMessages, pull, forged)


def on_the_machine(known: dict[str, Any]) -> Iterator[Tried]:
    """Tries of another account on the server's own machine."""
    server = Path(known["server"])
    for name in ("tls/ca.key", "superexec.secret", "state.db", "registry", "runs"):
        path = server / name
        try:
            found = os.listdir(path) if path.is_dir() else path.read_bytes()
            yield f"read the server's {name}", f"{len(found)} read", False
        except OSError as error:
            yield f"read the server's {name}", error.strerror or type(error).__name__, True
    yield from _tasks(known)
    with tempfile.TemporaryDirectory(prefix="stranger-") as aside:
        folder = Path(aside)
        folder.chmod(0o755)
        yield from _control(known, folder)


def _tasks(known: dict[str, Any]) -> Iterator[Tried]:
    """What a SuperExec asks for first, signed with no secret, and with an own one."""
    import httpx
    from flwr.proto.runtime_pb2 import PullPendingTasksRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    asked = "/flwr.proto.Runtime/PullPendingTasks"
    own = SuperExecAuthHttpInterceptor(master_secret=os.urandom(32), protected_methods=[asked])
    for what, signing in (("without a secret", []), ("with a secret of its own", [own])):
        client = RuntimeHttpClient.from_server_address(
            server_address=f"127.0.0.1:{known['control']}",
            insecure=False,
            root_certificates=Path(known["ca"]).read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *signing],
        )
        try:
            client.PullPendingTasks(PullPendingTasksRequest())
            said, refused = "answered", False
        except httpx.HTTPStatusError as error:
            said, refused = f"{error.response.status_code} {error.response.reason_phrase}", True
        finally:
            client.close()
        yield f"ask for the server's tasks {what}", said, refused


def _control(known: dict[str, Any], folder: Path) -> Iterator[Tried]:
    """Whoever reaches the Control API needs no key; so these are measured, and what holds is said beside."""
    app, proof = folder / "stranger", folder / "proof"
    app.mkdir()
    (app / "stranger.py").write_text(_APP.format(proof=str(proof)))
    (app / "pyproject.toml").write_text(_PROJECT)
    folder.chmod(0o777)
    home = folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "it"\n\n[superlink.it]\naddress = "127.0.0.1:{known["control"]}"\n'
        f'root-certificates = "{known["ca"]}"\n'
    )
    environment = {**_environment(folder), "FLWR_HOME": str(home)}

    def flwr(*arguments: str) -> tuple[str, bool]:
        done = subprocess.run(
            [*_flower("flwr"), *arguments, "--format", "json"],
            env=environment, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr, '"success": true' in done.stdout

    said, allowed = flwr("ls", "it")
    yield "list the runs", "it may" if allowed else " ".join(said.split())[-100:], not allowed
    key = folder / "key.pub"
    key.write_text(_new_key())
    said, allowed = flwr("supernode", "register", str(key), "it", "--name", "stranger")
    yield (
        "register a node key of its own",
        "it may" if allowed else " ".join(said.split())[-100:],
        not allowed,
    )
    said, allowed = flwr("run", str(app), "it")
    yield (
        "start a run with an app of its own",
        "it may" if allowed else " ".join(said.split())[-100:],
        not allowed,
    )
    end = time.monotonic() + _SECONDS
    while not proof.exists() and time.monotonic() < end:
        time.sleep(0.5)
    ran = proof.exists()
    said = f"it ran, as user id {proof.read_text()}" if ran else f"it did not run within {_SECONDS:g} s"
    yield "have its app's code run on the server's machine", said, not ran


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
    }


def _flower(name: str) -> list[str]:
    """One of Flower's commands, by the interpreter itself: a link to it may lie where this user cannot look."""
    run = f"from importlib.metadata import entry_points as e; e(group='console_scripts')[{name!r}].load()()"
    return ["/proc/self/exe", "-c", run]


def _new_key() -> str:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + "\n"


def main() -> int:
    # Imported first, so that the tries are quick once they can begin.
    import grpc  # noqa: F401
    from flwr.proto import control_pb2, fleet_pb2_grpc, runtime_pb2  # noqa: F401

    file, end = Path(sys.argv[1]), time.monotonic() + _PATIENCE
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    known = json.loads(file.read_text())
    tries = from_network if sys.argv[2] == "network" else on_the_machine
    print(json.dumps(list(tries(known))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
