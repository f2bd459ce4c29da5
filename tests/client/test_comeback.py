"""A site comes back by itself, whatever a call to its server ends with and whichever of its processes is hurt.

Over real sockets: a Fleet API that fails as it is told to, and the site's own SuperNode, starter and ClientApps.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_to_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree

from client.link import NODE
from simulations.faults.place import below, command_of
from tests.client.fleet import Fleet, Node, node_at, until


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Node]]:
    with node_at(tmp_path_factory.mktemp("comeback")) as both:
        yield both


def answered(fleet: Fleet, node: Node, ttl: float = 600.0) -> None:
    """A message is answered, whole, by the worker."""
    message = fleet.give(ttl)
    until(lambda: fleet.reply_to(message) is not None, what=node.said("supernode")[-3000:])
    reply = fleet.reply_to(message)
    assert reply is not None
    assert not reply.has_error(), node.said("starter")[-3000:]


STATUSES = [
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
]


@pytest.mark.parametrize("code", STATUSES, ids=lambda code: code.name)
def test_whatever_a_look_for_messages_ends_with_the_site_goes_on(
    connected: tuple[Fleet, Node], code: grpc.StatusCode
) -> None:
    fleet, node = connected
    fleet.ends_with("PullMessages", code, times=3)
    answered(fleet, node)
    if code is not grpc.StatusCode.PERMISSION_DENIED:  # which Flower says of runs that are over
        assert code.name in node.said("supernode") or "was refused: as told" in node.said("supernode")


def test_a_server_that_takes_calls_and_answers_none_is_connected_to_anew(
    connected: tuple[Fleet, Node],
) -> None:
    fleet, node = connected
    before = node.ended["supernode"]
    fleet.hangs("PullMessages", times=2)
    answered(fleet, node)
    assert node.ended["supernode"] == before + 1
    assert "the server takes calls and does not answer" in node.said("supernode")


OF_A_MESSAGE = ("GetRun", "GetFab", "PullObject", "ConfirmMessageReceived", "PushMessages", "PushObject")


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAUTHENTICATED])
def test_a_call_about_a_message_is_made_again_and_the_message_answered(
    tmp_path: Path, code: grpc.StatusCode
) -> None:
    def prepare(fleet: Fleet) -> None:
        for method in OF_A_MESSAGE:
            fleet.ends_with(method, code, times=2)
        fleet.ends_with("SendNodeHeartbeat", code, times=3)

    with node_at(tmp_path, prepare) as (fleet, node):
        answered(fleet, node)
        assert not any(fleet.faults.values()), fleet.faults
        assert node.ended["supernode"] == 0
        until(lambda: fleet.calls["SendNodeHeartbeat"] > 3)  # goes on after what it ended with


@pytest.mark.parametrize("method", OF_A_MESSAGE)
def test_where_a_message_or_its_answer_is_refused_the_next_one_is_answered(
    connected: tuple[Fleet, Node], method: str
) -> None:
    fleet, node = connected
    calls = fleet.calls[method]
    if method in ("GetRun", "GetFab"):  # asked once a run: so of a SuperNode that is new
        os.killpg(node.processes["supernode"].pid, signal.SIGKILL)
    fleet.ends_with(method, grpc.StatusCode.FAILED_PRECONDITION)
    fleet.give()
    until(lambda: fleet.calls[method] > calls)
    answered(fleet, node)


def test_a_bundle_that_is_none_ends_nothing(connected: tuple[Fleet, Node]) -> None:
    fleet, node = connected
    os.killpg(node.processes["supernode"].pid, signal.SIGKILL)
    good, fleet.fab = fleet.fab, b"no bundle"
    fleet.give()
    try:
        until(lambda: "A message could not be taken" in node.said("supernode"))
    finally:
        fleet.fab = good
    answered(fleet, node)


def test_a_supernode_that_was_killed_is_back_at_once_as_the_server_is_told(
    connected: tuple[Fleet, Node],
) -> None:
    fleet, node = connected
    before = fleet.calls["DeactivateNode"]
    os.killpg(node.processes["supernode"].pid, signal.SIGKILL)
    answered(fleet, node)
    assert fleet.calls["DeactivateNode"] == before + 1


def test_where_the_node_s_number_cannot_be_kept_the_site_works_all_the_same(tmp_path: Path) -> None:
    def prepare(fleet: Fleet) -> None:
        (tmp_path / "site" / NODE).mkdir(parents=True)  # it can be neither written nor read
        fleet.online = True
        fleet.ends_with("PullMessages", grpc.StatusCode.INTERNAL)

    with node_at(tmp_path, prepare, ready=lambda fleet: fleet.calls["ActivateNode"] > 1) as (fleet, node):
        fleet.online = False  # the server has missed the heartbeats of the one before
        answered(fleet, node)


def test_a_copy_of_a_site_does_not_push_the_other_one_out(connected: tuple[Fleet, Node]) -> None:
    fleet, node = connected
    until((node.folder / NODE).exists)
    before, aside = fleet.calls.copy(), (node.folder / NODE).read_text()
    (node.folder / NODE).unlink()  # as `site up` does when it begins
    os.killpg(node.processes["supernode"].pid, signal.SIGKILL)
    try:
        until(lambda: fleet.calls["ActivateNode"] >= before["ActivateNode"] + 2)
        assert fleet.calls["DeactivateNode"] == before["DeactivateNode"]
        assert "[code: 2004]" in node.said("supernode")
    finally:
        (node.folder / NODE).write_text(aside)
    answered(fleet, node)


@pytest.mark.parametrize("killed", ["the ClientApp", "the starter", "the SuperNode"])
def test_what_is_killed_while_a_message_is_answered_ends_no_site(
    connected: tuple[Fleet, Node], killed: str
) -> None:
    fleet, node = connected
    node.worker.held.clear()
    node.worker.asked.clear()
    message = fleet.give()
    assert node.worker.asked.wait(120), node.said("starter")
    (client_app,) = node.client_apps()
    victim = {"the starter": node.processes["starter"].pid, "the SuperNode": node.processes["supernode"].pid}
    os.kill(victim.get(killed, client_app), signal.SIGKILL)
    if killed == "the ClientApp":  # reported at once, not when its heartbeats have been missed
        until(lambda: fleet.reply_to(message) is not None, what=node.said("supernode")[-3000:])
        reply = fleet.reply_to(message)
        assert reply is not None
        assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
        assert not reply.error.reason
        assert "a ClientApp was killed before its answer" in node.site_log()
    if killed == "the starter":
        until(lambda: not Path(f"/proc/{client_app}").exists())  # with what forked it
    node.worker.held.set()
    answered(fleet, node)


def acquired(node: Node) -> tuple[Any, Any]:
    """A task's token, as who reads the starter's memory would have it, and a client that shows it."""
    client = node.as_executor()
    found: list[Any] = []

    def so() -> bool:
        found.append(client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])))
        return bool(found[-1].token)

    until(so)
    return found[-1].task, node.as_executor(found[-1].token)


@pytest.fixture
def no_starter(connected: tuple[Fleet, Node]) -> Iterator[tuple[Fleet, Node]]:
    """The starter stands still, so that its tasks can be taken by somebody else."""
    _, node = connected
    pid = node.processes["starter"].pid
    os.kill(pid, signal.SIGSTOP)
    yield connected
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("thief", ["takes the input", "takes the message", "sends half an answer"])
def test_a_task_that_came_to_nothing_frees_the_supernode(no_starter: tuple[Fleet, Node], thief: str) -> None:
    fleet, node = no_starter
    message = fleet.give()
    _, client = acquired(node)
    taken = client.PullTaskInput(PullTaskInputRequest())
    if thief != "takes the input":
        client.PullMessages(PullAppMessagesRequest())
    if thief == "sends half an answer":
        half = Message(RecordDict({"x": ConfigRecord({"y": 1})}), reply_to=asked_for(message, fleet))
        half.metadata.__dict__["_message_id"] = half.object_id
        pushed = PushAppMessagesRequest(
            messages_list=[message_to_proto(half)], message_object_trees=[get_object_tree(half)]
        )
        client.PushMessages(pushed)
    assert taken.run.run_id
    client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED))
    until(lambda: fleet.reply_to(message) is not None, what=node.said("supernode")[-3000:])
    reply = fleet.reply_to(message)
    assert reply is not None
    assert reply.has_error()  # nothing that is not whole leaves
    os.kill(node.processes["starter"].pid, signal.SIGCONT)
    answered(fleet, node)


def asked_for(message_id: str, fleet: Fleet) -> Message:
    return fleet.given[message_id]


def test_who_keeps_a_stolen_task_alive_keeps_the_supernode_no_longer_than_the_message_lives(
    connected: tuple[Fleet, Node],
) -> None:
    fleet, node = connected
    node.worker.held.clear()
    message = fleet.give(ttl=5.0)
    until(lambda: fleet.reply_to(message) is not None, what=node.said("supernode")[-3000:])
    reply = fleet.reply_to(message)
    assert reply is not None
    assert reply.has_error()
    (still,) = node.client_apps()
    next_one = fleet.give()
    until(lambda: not Path(f"/proc/{still}").exists())  # nobody awaits it
    node.worker.held.set()
    until(lambda: fleet.reply_to(next_one) is not None)


def secrets_of(pids: set[int]) -> list[str]:
    """Arguments that look like a token, of processes as anybody sees them."""
    return re.findall(r"--token|[0-9a-f]{32,}", " ".join(command_of(pid) for pid in pids))


def test_no_token_stands_in_a_process_list_while_a_message_is_answered(connected: tuple[Fleet, Node]) -> None:
    fleet, node = connected
    node.worker.held.clear()
    node.worker.asked.clear()
    message = fleet.give()
    seen: set[int] = set()
    while not node.worker.asked.wait(0.005):
        for process in node.processes.values():
            seen |= {process.pid} | below(process.pid)
            assert secrets_of({process.pid} | below(process.pid)) == []
    assert node.client_apps() <= seen | node.client_apps()
    assert secrets_of(node.client_apps() | seen) == []
    node.worker.held.set()
    until(lambda: fleet.reply_to(message) is not None)
    script = [sys.executable, "-c", "import time; time.sleep(60)", "--token", "ab" * 32]
    with subprocess.Popen(script) as shown:
        until(lambda: secrets_of({shown.pid}) == ["--token", "ab" * 32])  # the test sees what there is to see
        shown.kill()


def test_what_a_site_never_runs_is_refused_and_frees_the_supernode(tmp_path: Path) -> None:
    with node_at(tmp_path) as (fleet, node):
        fleet.kind = TaskType.AGENT_APP
        message = fleet.give()
        until(lambda: fleet.reply_to(message) is not None, what=node.said("supernode")[-3000:])
        reply = fleet.reply_to(message)
        assert reply is not None
        assert reply.has_error()
        assert "the server asked this site to run flwr-agentapp: refused" in node.site_log()
        assert not shutil.which("flwr-agentapp", path=str(node.folder / "bin"))
