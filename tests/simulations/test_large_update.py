"""An update of more than 100 MB, 27 times the largest that can be released: whole, and in pieces that gRPC carries."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from common.privacy.noise import LARGEST_DIMENSION
from common.wire import Reason, Refusal, Update, answer_from_records, answer_to_records
from simulations.inline import InlineGrid

NUMBERS = 27_000_000


@pytest.fixture(scope="module")
def large() -> Update:
    assert NUMBERS > 27 * LARGEST_DIMENSION
    generator = torch.Generator().manual_seed(1)
    return Update.of({"w": torch.randn(NUMBERS, generator=generator)}, b"receipt")


def test_it_comes_whole_through_a_grid(large: Update) -> None:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        return Message(answer_to_records(large), reply_to=message)

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    grid = InlineGrid(app, {5: {}})
    asked = Message(answer_to_records(Refusal(Reason.PLAN)), dst_node_id=5, message_type="train")
    (reply,) = grid.send_and_receive([asked])
    found = answer_from_records(reply.content)
    assert isinstance(found, Update)
    assert found.state["w"].nbytes > 100e6
    assert torch.equal(found.state["w"], large.state["w"])


def test_flower_cuts_it_into_pieces_and_none_may_be_missing(large: Update) -> None:
    """What SuperNode and SuperLink send each other are these objects, one in a call."""
    content = answer_to_records(large)
    sent = {name: each.deflate() for name, each in get_all_nested_objects(content).items()}
    assert len(sent) > NUMBERS * 4 / FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    assert max(map(len, sent.values())) < FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 1000
    found = answer_from_records(inflate_object_from_contents(content.object_id, dict(sent)))
    assert isinstance(found, Update)
    assert torch.equal(found.state["w"], large.state["w"])
    longest = max(sent, key=lambda name: len(sent[name]))
    with pytest.raises((KeyError, ValueError)):
        inflate_object_from_contents(
            content.object_id, {name: data for name, data in sent.items() if name != longest}
        )
