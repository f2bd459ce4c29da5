"""A site's replies say nothing of when they were made or why they failed, whoever makes them: we or Flower."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR, InMemoryNodeState

from client import replies
from client.replies import keep_replies_timeless, reply_to

AGO = 100.0


@pytest.fixture(autouse=True)
def flowers_own_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts Flower's class back when a test has ended."""
    monkeypatch.setattr(Message, "__init__", Message.__init__)


def asked_before() -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    asked = Message(RecordDict(), dst_node_id=2, message_type="train", ttl=600.0)
    asked.metadata.created_at -= AGO
    asked.metadata.__dict__["_message_id"] = "asked"
    return asked


def tells_nothing(reply: Message, asked: Message) -> bool:
    """Whether its times are the request's, on the wire too, and an error is a number alone."""
    told = message_to_proto(reply)
    times = (told.metadata.created_at, told.metadata.ttl) == (asked.metadata.created_at, asked.metadata.ttl)
    return times and not told.error.reason


def killed(asked: Message) -> Message:
    """What a SuperNode's own state answers for a ClientApp that was killed."""
    state = InMemoryNodeState(ObjectStoreFactory().store())
    state.store_message(asked)
    state.get_messages(run_ids=[asked.metadata.run_id], is_reply=False)
    state.record_message_processing_start("asked")
    state._store_error_replies({asked.metadata.run_id}, CLIENT_APP_CRASHED_ERROR)
    (reply,) = state.get_messages(is_reply=True)
    assert reply.error.code == CLIENT_APP_CRASHED_ERROR.code
    return reply


def failed(asked: Message) -> Message:
    """What Flower's process makes of an exception."""
    return Message(Error(code=2, reason="<class 'KeyError'>:<'alice'>"), reply_to=asked)


def answered(asked: Message) -> Message:
    return Message(RecordDict(), reply_to=asked)


@pytest.mark.parametrize("flowers", [answered, failed, killed])
def test_flowers_own_replies_state_the_requests_times_and_no_text(
    flowers: Callable[[Message], Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_before()
    assert not tells_nothing(flowers(asked), asked)  # Flower as it is
    keep_replies_timeless()
    asked = asked_before()
    assert tells_nothing(flowers(asked), asked)
    monkeypatch.setattr(replies, "timeless", lambda reply, asked: None)
    asked = asked_before()
    assert not tells_nothing(flowers(asked), asked)


def test_an_answer_states_the_requests_times_in_any_process() -> None:
    asked = asked_before()
    assert tells_nothing(reply_to(asked, RecordDict()), asked)
    assert not tells_nothing(answered(asked), asked)


def test_messages_that_answer_nothing_are_flowers_own() -> None:
    keep_replies_timeless()
    before = time.time()
    assert Message(RecordDict(), dst_node_id=2, message_type="train").metadata.created_at >= before


def test_a_flower_that_makes_replies_in_another_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Message, "__init__", lambda self, content: None)
    with pytest.raises(RuntimeError, match="install flwr"):
        keep_replies_timeless()


BEGUN = """
import sys
from flwr.app import Message
whole = Message.__init__
sys.argv = ["command", "folder", "--help"]
try:
    {begin}
finally:
    print("kept" if Message.__init__ is not whole else "Flower's own", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "begin",
    [
        "from client.supernode import main; main()",
        "import flwr.supernode.runtime.run_clientapp as flower; flower.run_clientapp = lambda **_: None; "
        "from pathlib import Path; from client.bundle_guard import guarded_clientapp; "
        "guarded_clientapp(Path(), '127.0.0.1:9', 'x')",
    ],
)
def test_both_processes_that_make_replies_keep_them_so(begin: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGUN.format(begin=begin)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "kept"), done.stderr
