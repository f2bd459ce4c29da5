"""What a site's SuperNode tells the server beside a reply: not how long the work took."""

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest

from client.supernode import without_runtime


def test_the_run_time_is_left_out() -> None:
    told = {"clientapp_runtime_list": [12.5]}
    assert list(PushMessagesRequest(**told).clientapp_runtime_list) == [12.5]  # what Flower would send
    assert not without_runtime(PushMessagesRequest)(**told).clientapp_runtime_list


def test_a_flower_without_that_field_is_noticed() -> None:
    with pytest.raises(KeyError):
        without_runtime(PushMessagesRequest)()
