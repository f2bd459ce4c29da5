"""Requests that no server signed, brought to real sites over real sockets: they charge nothing.

SuperLink is Flower's own here, without the guard that keeps most of them from ever arriving. Each is shown to charge
where a site does not look at the signature.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from client import origin
from client.app import SITES_FOLDER, answered
from client.ledger import Ledger
from common.privacy.anchors import Countersignature
from common.wire import (
    MESSAGE_TYPES,
    Reason,
    Refusal,
    Request,
    SignedRequest,
    Update,
    answer_from_records,
    request_from_records,
    request_to_records,
)
from server.registry import Registry
from server.rounds import run_rounds
from server.runs import RunFolder
from simulations.sites import site_name
from tests.server.fleet import PLAIN, Fleet, fleet, reply_to
from tests.server.real_link import Nodes, Pushed, real_link
from tests.server.test_rounds import NODES, Sites

ATTACKER = Ed25519PrivateKey.generate()
VICTIM = 1


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Sites]:
    folder = tmp_path_factory.mktemp("forged")
    it = Sites(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(folder / "cache"))
        patch.setenv(SITES_FOLDER, str(folder / "sites"))
        yield it


@contextmanager
def without_a_look_at_signatures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origin, "is_signed", lambda *_: True)
        yield


def victim(sites: Sites) -> Path:
    return sites.folder / "sites" / f"{VICTIM:05d}"


def charged(sites: Sites) -> list[str]:
    """Every run and round that the victim was ever charged for."""
    with Ledger.open(victim(sites) / "ledger") as ledger:
        return [f"{each.reserve.run} {each.reserve.round}" for each in ledger.status().charges]


def from_the_runs_folder(sites: Sites, run: RunFolder, name: str) -> SignedRequest:
    """A request as good as who reads a run's folder can make it: its plan, its parameters, the site's last anchor."""
    lines = [line for line in run.receipts(2) if line["site"] == site_name(VICTIM)]
    asked = Request(
        run=name,
        round=1,
        attempt=1,
        nonce="ab" * 16,
        plan=run.plan().model_dump_json(),
        state=run.round_state(0),
        anchor=str(lines[-1]["anchor"]).encode(),
        site=str(lines[-1]["key_id"]),
    )
    return SignedRequest.of(asked, ATTACKER, expires=math.ceil(time.time()) + 600)


def told(sites: Sites, content: RecordDict) -> Update | Refusal:
    return answer_from_records(answered(lambda: victim(sites), content))


def test_who_has_the_runs_folder_charges_nothing(sites: Sites) -> None:
    before, signed = charged(sites), from_the_runs_folder(sites, sites.first.run, "from-the-folder")
    anchor = Countersignature.from_bytes(signed.anchor or b"")
    for signature in (signed.signature, bytes.fromhex(anchor.signature)):
        content = request_to_records(replace(signed, signature=signature))
        assert told(sites, content) == Refusal(Reason.ORIGIN)
    assert charged(sites) == before
    with without_a_look_at_signatures():
        assert isinstance(told(sites, request_to_records(signed)), Update)
    assert charged(sites) == [*before, "from-the-folder 1"]


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Fleet]:
    """Flower's SuperLink as it is, with TLS and node keys, and two enrolled nodes."""
    with fleet(tmp_path, PLAIN) as made:
        made.c.activate(), made.d.activate()
        yield made


def forged_by_d(made: Fleet, content: RecordDict) -> Message:
    """A message to c that replies to nothing, as SuperLink's own, which d pushes whole."""
    asked = made.send(made.d)
    said = {"src_node_id": SUPERLINK_NODE_ID, "dst_node_id": made.c.node, "reply_to_message_id": ""}
    message = reply_to(asked, made.d, content, message_type="train", **said)
    session = made.d.push(message).session_id
    assert all(each.stored for each in made.d.push_objects(message, made.run, session))
    return message


def arrived_at_c(made: Fleet) -> RecordDict:
    """The content of the next message that c pulls, as its SuperNode puts it together."""
    pulled = made.c.pull()
    (tree,) = pulled.message_object_trees
    contents = {
        each.object_id: made.c.pull_object(each.object_id, made.run).object_content
        for each in iterate_object_tree(tree)
    }
    made.c.confirm(tree.object_id, made.run)
    message: Any = inflate_object_from_contents(tree.object_id, contents)
    return message.content


def test_who_has_a_node_key_makes_another_site_spend_nothing(sites: Sites, plain: Fleet) -> None:
    before, signed = charged(sites), from_the_runs_folder(sites, sites.first.run, "by-a-node")
    for forged in (signed, replace(signed, signature=b"")):
        forged_by_d(plain, request_to_records(forged))
        content = arrived_at_c(plain)
        assert request_from_records(content) == forged  # it came, whole
        assert told(sites, content) == Refusal(Reason.ORIGIN)
    forged_by_d(plain, RecordDict({"round": ConfigRecord({"run": "by-a-node", "round": 1})}))
    assert told(sites, arrived_at_c(plain)) == Refusal(Reason.ORIGIN)  # of the form that servers once sent
    assert charged(sites) == before
    with without_a_look_at_signatures():
        assert isinstance(told(sites, content), Update)
    assert charged(sites) == [*before, "by-a-node 1"]


def test_who_brings_the_servers_own_request_again_gets_the_same_bytes_until_it_expires(
    sites: Sites, plain: Fleet
) -> None:
    request = from_the_runs_folder(sites, sites.first.run, "by-the-server").request()
    registry = Registry(sites.registry)
    whole = registry.signed(request, expires=math.ceil(time.time()) + 600)
    first = told(sites, request_to_records(whole))
    assert isinstance(first, Update)
    before = charged(sites)
    forged_by_d(plain, request_to_records(whole))
    assert told(sites, arrived_at_c(plain)) == first
    expired = registry.signed(request, expires=math.floor(time.time()) - 1)
    forged_by_d(plain, request_to_records(expired))
    assert told(sites, arrived_at_c(plain)) == Refusal(Reason.EXPIRED)
    assert charged(sites) == before


def test_who_has_the_servers_task_token_makes_sites_spend_nothing(sites: Sites, tmp_path: Path) -> None:
    """The token is all that a ServerApp has: the messages are pushed by its own grid, to sites that are up."""
    before = charged(sites)
    run = sites.run()
    shutil.copytree(sites.registry, tmp_path / "registry")
    (tmp_path / "registry" / "server.key").unlink()  # all else of the server's
    with (
        real_link(tmp_path) as link,
        Nodes(link.fleet, dict.fromkeys(range(NODES), Pushed.honest)) as nodes,
    ):
        names = {node: site_name(number) for number, node in nodes.ids.items()}
        signed = from_the_runs_folder(sites, sites.first.run, "by-a-token")
        node = nodes.ids[VICTIM]
        (asked,) = link.grid.push_messages(
            [Message(request_to_records(signed), node, MESSAGE_TYPES[signed.request().phase], ttl=60.0)]
        )
        replies: list[Message] = []
        while not replies:
            replies = list(link.grid.pull_messages([asked]))
            time.sleep(0.05)
        assert answer_from_records(replies[0].content) == Refusal(Reason.ORIGIN)
        rounds = link.grid, run.plan(), run, Registry(tmp_path / "registry"), run.round_state(0)
        with pytest.raises(Exception, match="no round was aggregated"):
            run_rounds(*rounds, nodes_expected=NODES, names=lambda: names)
        assert {each["reason"] for record in run.records() for each in record["left_out"]} == {"origin"}
        assert charged(sites) == before
        honest = sites.run()
        rounds = link.grid, honest.plan(), honest, Registry(sites.registry), honest.round_state(0)
        run_rounds(*rounds, nodes_expected=NODES, names=lambda: names)
    assert charged(sites) == [*before, f"{honest.name} 1", f"{honest.name} 2"]
