"""What a site's SuperNode tells the server beside a reply: not how long the work took."""

import inspect
import re

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supernode import start_client_internal as flower

from client.supernode import Looking, without_runtime
from common.supervision import Pulse


def test_the_run_time_is_left_out() -> None:
    told = {"clientapp_runtime_list": [12.5]}
    assert list(PushMessagesRequest(**told).clientapp_runtime_list) == [12.5]  # what Flower would send
    assert not without_runtime(PushMessagesRequest)(**told).clientapp_runtime_list


def test_a_flower_without_that_field_is_noticed() -> None:
    with pytest.raises(KeyError):
        without_runtime(PushMessagesRequest)()


def test_flower_looks_and_waits_by_names_that_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("client.supernode.time.sleep", waited.append)
    clock = iter([0.0, 59.0, 61.0])
    monkeypatch.setattr("client.supernode.time.monotonic", lambda: next(clock))
    came = iter([7, None, None])
    looking = Looking(lambda **_: next(came), Pulse())
    monkeypatch.setattr(flower, "_pull_and_store_message", looking.look)
    assert flower._pull_and_store_message() == 7
    assert flower._pull_and_store_message() is None  # at 0, the message being answered by now
    for _ in range(2):
        looking.sleep(3)
    assert waited == [0.5, 3]


def test_flower_waits_with_nothing_of_its_clock_but_sleep() -> None:
    source = inspect.getsource(flower)
    assert source.count("time.sleep(3)") == 1
    assert set(re.findall(r"\btime\.(\w+)", source)) == {"sleep"}
