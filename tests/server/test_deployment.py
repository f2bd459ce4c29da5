"""A whole deployment on loopback from the commands alone: a server, three sites, TLS and node keys, three rounds.

With FEDTIDE_FAULTS=1 the ServerApp is also killed in a run, which Flower takes a minute to notice.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import Message, PushObjectRequest
from flwr.proto.message_pb2 import Metadata as MessageMetadata
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from simulations.faults.place import below, command_of
from tests.server.recording_proxy import Call, RecordingProxy
from tests.server.test_operation import free_ports
from tests.tiny import USERS, tiny_files, tiny_language_model, tiny_plan

SITES = ("east", "north", "west")
FAULTS = os.environ.get("FEDTIDE_FAULTS") == "1"


@dataclass
class Place:
    """A machine's folders and the commands that are up on it."""

    folder: Path
    environment: dict[str, str]
    proxy: RecordingProxy
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    began: float = field(default_factory=time.time)

    @property
    def server(self) -> Path:
        return self.folder / "server"

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "common.cli", *(str(each) for each in arguments)]

    def fedtide(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, check=False
        )

    def well(self, *arguments: object) -> str:
        done = self.fedtide(*arguments)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def up(self, kind: str, folder: Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{folder.name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(kind, "up", folder, "--log-json"), env=self.environment, stdout=log, stderr=log
            )
        self.started.append(process)
        return process

    def nodes(self) -> dict[str, str]:
        found = json.loads(self.well("server", "status", self.server, "--json"))
        return {site["name"]: site["node"] for site in found["sites"]}

    def logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*/logs/*.log")]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def until(self, so: Callable[[], bool]) -> None:
        end = time.monotonic() + 180
        while not so():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.5)

    def end(self) -> list[int]:
        """Ends what is up, the sites first, by pid; the exit codes."""
        for process in reversed(self.started):
            process.send_signal(signal.SIGTERM)
        codes = []
        for process in self.started:
            try:
                codes.append(process.wait(90))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        return codes


@contextmanager
def deployed(folder: Path) -> Iterator[Place]:
    """A server and three sites that are up and connected; ended afterwards, whatever happens."""
    environment = {**os.environ, "FEDTIDE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    model = tiny_language_model(folder / "model")
    log, catalog = tiny_files(folder / "data")
    plan = tiny_plan(model, statistics={"popularity_share": 0.2}, privacy={"users_per_site": USERS - 20})
    (folder / "plan.json").write_text(plan.to_json())
    ports = free_ports()
    fleet = free_ports()["fleet_port"]  # sites come in by the proxy
    place = Place(folder, environment, RecordingProxy(fleet, ports["fleet_port"]))
    place.well(
        "server", "init", place.server, "--host", "127.0.0.1", "--port", ports["fleet_port"],
        "--control-port", ports["control_port"], "--metrics-port", ports["metrics_port"],
    )  # fmt: skip
    place.proxy.start(place.server / "tls")
    try:
        place.up("server", place.server)
        for name in SITES:
            place.well(
                "site", "init", folder / name, "--server", f"127.0.0.1:{fleet}",
                "--ca", place.server / "tls" / "ca.crt", "--logs", log, "--catalog", catalog,
                "--epsilon", 20, "--delta", 1e-5, "--users-at-least", USERS - 20,
                "--typical-plan", folder / "plan.json", "--language-model", f"{model}={model}",
            )  # fmt: skip
            enrolment = folder / name / "enrolment.json"
            place.well("server", "enroll", enrolment, "--server", place.server, "--name", name)
            place.up("site", folder / name)
        place.until(lambda: place.nodes() == dict.fromkeys(SITES, "online"))
        yield place
    finally:
        place.end()
        place.proxy.stop()


Fields = dict[str, object]


def pushed(calls: list[Call]) -> dict[bytes, list[tuple[Fields, Fields]]]:
    """What each node pushed: of each reply all fields but what was released, and those of the request it answers.

    Every byte that a site sends about a round is in one of: the message's metadata, the tree of its objects (names and
    digests), the objects themselves, and Flower's fields beside them.
    """
    requests: dict[str, Message] = {}
    found: dict[bytes, list[tuple[Fields, Fields]]] = {}
    for call in calls:
        if call.method == "PullMessages":
            for message in PullMessagesResponse.FromString(call.response).messages_list:
                requests[message.metadata.message_id] = message
        if call.method == "PushMessages":
            request = PushMessagesRequest.FromString(call.request)
            for message in request.messages_list:
                reply = fields_of(message.metadata)
                reply["beside"] = {
                    name.name: value
                    for name, value in request.ListFields()
                    if name.name not in ("node", "messages_list", "message_object_trees")
                }
                asked = fields_of(requests[message.metadata.reply_to_message_id].metadata)
                found.setdefault(call.node, []).append((reply, asked))
    return found


def fields_of(message: ProtoMessage) -> Fields:
    """Every field of a message that is set, by name; what this Flower does not know is kept, too."""
    assert not list(UnknownFieldSet(message))
    return {field.name: value for field, value in message.ListFields()}


OWN = {"message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "src_task_id", "dst_task_id"}
"""Of metadata: who talks to whom, and the digest of all that is sent."""
VARY = OWN | {"created_at", "ttl"}
"""What differs from request to request, and is compared with the request's own."""


def check_no_clock(place: Place) -> None:
    """What two sites push beside their releases is the same, and a function of the request; no number is a time."""
    by_node = pushed(place.proxy.calls)
    assert len(by_node) == len(SITES)
    assert {len(each) for each in by_node.values()} == {3}
    rounds = list(zip(*by_node.values(), strict=True))
    for replies in rounds:
        alike = {repr({n: v for n, v in reply.items() if n not in VARY}) for reply, _ in replies}
        assert len(alike) == 1
        for reply, asked in replies:
            assert reply["created_at"] == asked["created_at"]
            assert reply["ttl"] == asked["ttl"]
            assert reply["beside"] == {}
    forms = [sorted(objects(place.proxy.calls, node)) for node in by_node]
    assert forms[0] == forms[1] == forms[2]
    assert len(forms[0]) > 3 * len(SITES)
    for call in place.proxy.calls:
        if call.method in ("PushMessages", "PushObject"):
            assert not times_in(call.request, place.began, known(by_node))


def objects(calls: list[Call], node: bytes) -> Iterator[tuple[str, int]]:
    """Kind and length of every object that a node pushed, but of messages themselves, whose metadata hold ids."""
    for call in calls:
        if call.method == "PushObject" and call.node == node:
            content = PushObjectRequest.FromString(call.request).object_content
            kind, _, _ = content.partition(b" ")
            if kind != b"Message":
                yield kind.decode(), len(content)


def known(by_node: dict[bytes, list[tuple[Fields, Fields]]]) -> set[float]:
    return {float(str(asked["created_at"])) for each in by_node.values() for _, asked in each}


def times_in(data: bytes, began: float, known: set[float]) -> list[float]:
    """Numbers of eight bytes anywhere in a message, at whatever offset, that would be times since this test began."""
    found = []
    for form in ("<d", ">d"):
        for offset in range(min(len(data), 4096) - 7):
            (value,) = struct.unpack_from(form, data, offset)
            if began - 1 <= value <= began + 3600 and value not in known:
                found.append(value)
    return found


def test_a_time_in_a_message_would_be_found() -> None:
    now = time.time()
    reply = MessageMetadata(message_type="train", created_at=now)
    assert times_in(b"abc" + reply.SerializeToString(), now - 10, set()) == [now]
    assert times_in(b"abc" + reply.SerializeToString(), now - 10, {now}) == []


def run_command(place: Place) -> list[str]:
    plan, catalog = place.folder / "plan.json", place.folder / "data" / "catalog.csv"
    return place.command("server", "run", place.server, plan, "--catalog", catalog, "--json")


def flower_statuses(place: Place) -> list[str]:
    with sqlite3.connect(place.server / "state.db") as db:
        return [row[0] for row in db.execute("SELECT sub_status FROM task ORDER BY pending_at")]


def told_run_times(place: Place) -> list[float]:
    """Seconds of each run that sites told Flower they worked."""
    with sqlite3.connect(place.server / "state.db") as db:
        return [row[0] for row in db.execute("SELECT clientapp_runtime FROM run")]


def check_whole(place: Place, said: str) -> None:
    """Three rounds, each once, every release admitted; what the receipts prove; every site charged three times."""
    summary = json.loads(said)
    run = Path(summary["run"])
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2, 3]
    assert all(sorted(record["admitted"]) == list(SITES) and record["aggregated"] for record in records), (
        records
    )
    assert summary["admitted"] == 9
    place.well("audit", "receipts", run, "--registry", place.server / "registry")
    for name in SITES:
        status = json.loads(place.well("site", "status", place.folder / name, "--json"))
        assert status["open"] == 0


@pytest.mark.timeout(900)
def test_three_sites_train_three_rounds_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with deployed(tmp_path) as place:
        done = subprocess.run(
            run_command(place), env=place.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{done.stderr}\n{place.logs()}"
        check_whole(place, done.stdout)
        check_no_clock(place)
        assert "completed" in flower_statuses(place)
        assert told_run_times(place) == [0.0]
        everything = set().union(*(below(process.pid) for process in place.started))
        assert sum("client.supernode" in command_of(pid) for pid in everything) == 3
        assert place.end() == [0, 0, 0, 0], place.logs()
        assert not [
            command_of(pid) for pid in everything if "fedtide" in command_of(pid) or "flwr" in command_of(pid)
        ]
        found = json.loads(place.well("server", "status", place.server, "--json"))
        assert found["up"] is False
        assert [run["state"] for run in found["runs"]] == ["completed"]


@pytest.mark.skipif(not FAULTS, reason="takes minutes: FEDTIDE_FAULTS=1 runs it")
@pytest.mark.timeout(1200)
def test_a_killed_server_app_is_said_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with deployed(tmp_path) as place:
        first = subprocess.Popen(
            run_command(place),
            env=place.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs = place.server / "runs"
        place.until(lambda: any(file.stat().st_size for file in runs.glob("*/rounds.jsonl")))
        for pid in below(place.started[0].pid):
            if "flwr-serverapp" in command_of(pid):
                os.kill(pid, signal.SIGKILL)
        _, said = first.communicate(timeout=300)
        assert first.returncode == 2
        assert "cut off after 1 of 3 rounds" in " ".join(said.split())
        assert "the same command goes on" in " ".join(said.split())
        again = subprocess.run(
            run_command(place), env=place.environment, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, f"{again.stderr}\n{place.logs()}"
        check_whole(place, again.stdout)
