"""What a stranger does who has nothing but the address, to make the server stand still; part of `intruder`."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simulations.faults.raw_calls import closed, connect, half_open

CALLS, CONNECTIONS = 1100, 2
LARGE, LARGE_COUNT = 300_000_000, 4
SILENT = 500
_PATIENCE = 90.0

Tried = tuple[str, str, bool]


def standing_still(known: dict[str, Any]) -> Iterator[Tried]:
    """Tries to keep the server from answering: each says how long a call takes meanwhile, and what it is told."""
    usual, _ = _call(known)
    opened = [connect(known["host"], known["fleet"], Path(known["ca"])) for _ in range(CONNECTIONS)]
    for each in opened:
        half_open(each, "PullMessages", CALLS // CONNECTIONS)
    time.sleep(1.0)
    took, told = _call(known)
    yield (
        f"begin {CALLS} calls on {CONNECTIONS} connections, and never send them",
        f"another's call is answered meanwhile in {took:.0f} ms ({usual:.0f} before): {', '.join(told)}",
        told == ["UNAUTHENTICATED"],
    )
    for each in opened:
        each.close()
    with ThreadPoolExecutor(LARGE_COUNT) as pool:
        sent = [pool.submit(send_large, known) for _ in range(LARGE_COUNT)]
        took, told = _call(known)
        answers = sorted({each.result() for each in sent})
    yield (
        f"send {LARGE_COUNT} messages of {LARGE // 1_000_000} MB without a key",
        f"{', '.join(answers)}; another's call is answered meanwhile in {took:.0f} ms: {', '.join(told)}",
        set(answers) <= {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"} and told == ["UNAUTHENTICATED"],
    )
    yield _silent(known, usual)


def _silent(known: dict[str, Any], usual: float) -> Tried:
    where = known["host"], known["fleet"]
    silent = [socket.create_connection(where, timeout=10) for _ in range(SILENT)]
    began = time.monotonic()
    for each in silent:
        each.sendall(b"\x16\x03")  # the first bytes of TLS, and no more
    took, told = _call(known)
    ended = _ended(silent[-1]) and all(map(_ended, silent))
    seconds = time.monotonic() - began
    for each in silent:
        each.close()
    with connect(*where, Path(known["ca"])) as idle:
        idle_ended = closed(idle, _PATIENCE)
    what = f"open {SILENT} connections, and say two bytes on each; another, and say nothing after TLS"
    said = (
        f"closed by the server within {seconds:.0f} s; another's call is answered meanwhile in {took:.0f} ms "
        f"({usual:.0f} before): {', '.join(told)}"
    )
    return what, said if ended and idle_ended else "kept open", ended and idle_ended


def _ended(connection: socket.socket) -> bool:
    connection.settimeout(_PATIENCE)
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True


def _call(known: dict[str, Any], times: int = 20) -> tuple[float, list[str]]:
    """Milliseconds of a call without a key, their median, and the statuses that it ended with."""
    import grpc  # type: ignore[import-untyped]
    from flwr.proto import fleet_pb2
    from flwr.proto.fleet_pb2_grpc import FleetStub

    from simulations.faults.intruder import channel

    stub, took, told = FleetStub(channel(known)), [], set()
    for _ in range(times):
        began = time.monotonic()
        try:
            stub.PullMessages(fleet_pb2.PullMessagesRequest(), timeout=30)
        except grpc.RpcError as error:
            told.add(error.code().name)
        took.append(time.monotonic() - began)
        time.sleep(0.05)
    return 1000 * statistics.median(took), sorted(told)


def send_large(known: dict[str, Any]) -> str:
    """The status that a message of `LARGE` bytes ends with, sent without a key."""
    import grpc
    from flwr.proto.message_pb2 import PushObjectRequest

    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(Path(known["ca"]).read_bytes())
    way = grpc.secure_channel(f"{known['host']}:{known['fleet']}", credentials, options=options)
    push = way.unary_unary("/flwr.proto.Fleet/PushObject", PushObjectRequest.SerializeToString)
    try:
        push(PushObjectRequest(object_content=b"x" * LARGE), timeout=120)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "answered"
