"""Only the server asks: what it did not sign for this site is looked into by nobody, and charges nothing.

Each forgery is shown to charge where the check that refuses it is taken out.
"""

# ruff: noqa: F401, F811 (fixtures of another file)

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import origin, together
from client import site as site_module
from client.app import answered, content_from_bytes, question_to_bytes
from client.ledger import Ledger
from client.origin import OriginError
from client.server_key import SERVER_KEY, NoServerKeyError, trust, trusted_key
from client.site_folder import Site
from client.together import Question, answered_together
from client.worker import SOCKET
from client.worker import ask as ask_worker
from common import wire
from common.phases import Phase
from common.privacy.anchors import Countersignature
from common.privacy.canonical import encode
from common.privacy.entries import public_key_of
from common.privacy.faults import ReceiptError
from common.requests import Statement
from common.sums import POPULARITY, SITES
from common.wire import (
    Reason,
    Refusal,
    Request,
    SignedRequest,
    Update,
    answer_from_records,
    request_to_records,
)
from simulations.asking import KEY, signed_for
from tests.client.test_site import ITEMS, Ask, ask, outcomes, plan, shared, site, start

ATTACKER = Ed25519PrivateKey.generate()


def told(site: Site, signed: SignedRequest, until: float = math.inf) -> Update | Refusal:
    """What a site answers to a message, whoever sent it."""
    return answer_from_records(answered(lambda: site.folder, request_to_records(signed), until=until))


def told_by_all_ways(site: Site, signed: SignedRequest) -> set[Update | Refusal]:
    (many,) = answered_together([Question(site.folder, request_to_records(signed), math.inf)])
    return {told(site, signed), answer_from_records(many)}


@contextmanager
def nothing_looked_up() -> Iterator[None]:
    """Site, policy, ledger, tensors: whoever opens one of them inside does not come to refuse by origin."""

    def opened(*_: object, **__: object) -> Any:
        raise AssertionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "load", opened)
        patch.setattr(Ledger, "open", opened)
        patch.setattr(together.kept_ledgers, "opened", opened)
        patch.setattr(wire, "state_from_bytes", opened)
        yield


def told_unopened(site: Site, signed: SignedRequest) -> set[Update | Refusal]:
    with nothing_looked_up():
        return told_by_all_ways(site, signed)


def other_plan(request: Request) -> str:
    """The same with a step more a round."""
    values = json.loads(request.plan)
    values["training"]["steps_per_round"] += 1
    return json.dumps(values)


def nudged(request: Request) -> dict[str, torch.Tensor]:
    name = next(iter(request.state))
    return {
        **request.state,
        name: torch.nextafter(request.state[name], torch.full_like(request.state[name], 9)),
    }


def another_servers_anchor(site: Site) -> bytes:
    with Ledger.open(site.ledger_folder) as ledger:
        (genesis,) = ledger.entries()
        return Countersignature.sign(ATTACKER, site_key_id=ledger.key_id, seq=0, head=genesis.hash).to_bytes()


CHANGES: dict[str, Callable[[Request, Site], dict[str, Any]]] = {
    "run": lambda request, site: {"run": "run-b"},
    "round": lambda request, site: {"round": 2},
    "attempt": lambda request, site: {"attempt": 2},
    "nonce": lambda request, site: {"nonce": "cd" * 16},
    "plan": lambda request, site: {"plan": other_plan(request)},
    "state": lambda request, site: {"state": nudged(request)},
    "released": lambda request, site: {
        "released": {POPULARITY: torch.arange(ITEMS, 0.0, -1), POPULARITY + SITES: torch.ones(1)}
    },
    "anchor": lambda request, site: {"anchor": another_servers_anchor(site)},
    "nothing": lambda request, site: {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_request_under_another_key_charges_nothing_whatever_it_asks(
    change: str, site: Site, ask: Ask
) -> None:
    """Of who has seen the server's requests, and all else of the run, but for its key."""
    asked = replace(ask(), **CHANGES[change](ask(), site))
    forged = signed_for(site.folder, asked, key=ATTACKER)
    assert told_unopened(site, forged) == {Refusal(Reason.ORIGIN)}
    assert told_by_all_ways(site, forged) == {Refusal(Reason.ORIGIN)}
    assert outcomes(site) == []


@pytest.mark.parametrize("change", CHANGES)
def test_it_would_charge_if_nobody_looked_at_the_signature(
    change: str, site: Site, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = signed_for(site.folder, replace(ask(), **CHANGES[change](ask(), site)), key=ATTACKER)
    monkeypatch.setattr(origin, "is_signed", lambda *_: True)
    assert isinstance(told(site, forged), Update)
    assert outcomes(site) == ["released"]


OTHERS: dict[str, Any] = {
    "site": "ee" * 32,
    "expires": 2**33,
    "run": "run-b",
    "round": 7,
    "attempt": 3,
    "nonce": "cd" * 16,
    "phase": Phase.METRICS.value,
    "anchor": "ab" * 32,
    **dict.fromkeys(("plan", "broadcast", "model", "released"), "cd" * 32),
}


@pytest.mark.parametrize("field", [each.name for each in fields(Statement)])
def test_a_statement_with_another_value_under_the_old_signature_is_nothing(
    field: str, site: Site, ask: Ask
) -> None:
    signed = signed_for(site.folder, ask())
    said = replace(signed.said, **{field: OTHERS[field]})
    assert said != signed.said
    assert told_unopened(site, replace(signed, statement=said.to_bytes())) == {Refusal(Reason.ORIGIN)}


def parts(signed: SignedRequest, request: Request) -> dict[str, SignedRequest]:
    """A request that the server signed, each with one thing that came with it replaced."""
    like = replace(signed, broadcast=wire.state_to_bytes(nudged(request)))
    return {
        "plan": replace(signed, plan=other_plan(request)),
        "a plan that says the same": replace(signed, plan=signed.plan + " "),
        "broadcast": like,
        "anchor": replace(signed, anchor=b"no anchor"),
    }


@pytest.mark.parametrize("part", ["plan", "a plan that says the same", "broadcast", "anchor"])
def test_what_the_server_signed_with_something_else_beside_it_is_nothing(
    part: str, site: Site, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = parts(signed_for(site.folder, ask()), ask())[part]
    assert told_unopened(site, forged) == {Refusal(Reason.ORIGIN)}
    assert outcomes(site) == []
    monkeypatch.setattr(SignedRequest, "fits", lambda _: True)
    found = told(site, forged)
    if part in {
        "broadcast",
        "anchor",
    }:  # another check stands behind: the model's own digest, the anchor's form
        assert found == Refusal(Reason.POLICY)
    else:
        assert isinstance(found, Update)


@pytest.mark.parametrize(
    "signature", [b"", b"\0" * 64, b"\xff" * 63, b"\0" * 65], ids=["none", "zeros", "short", "long"]
)
def test_a_signature_that_is_none_is_refused_like_a_wrong_one(signature: bytes, site: Site, ask: Ask) -> None:
    signed = signed_for(site.folder, ask())
    bits = bytes([signed.signature[0] ^ 1]) + signed.signature[1:]
    for wrong in (signature, bits):
        assert told_unopened(site, replace(signed, signature=wrong)) == {Refusal(Reason.ORIGIN)}


def test_something_else_that_the_server_signed_is_no_request(site: Site, ask: Ask) -> None:
    """Its countersignatures are in every run folder, and another spelling of a statement is none of its."""
    signed = signed_for(site.folder, ask())
    anchor = Countersignature.sign(KEY, site_key_id=signed.said.site, seq=0, head="ab" * 32)
    others = [(encode(anchor._statement()), bytes.fromhex(anchor.signature))]
    for spelled in (signed.statement + b" ", signed.statement.replace(b'{"', b'{ "'), b"{}", b"\xff"):
        others.append((spelled, KEY.sign(spelled)))
    for statement, signature in others:
        forged = replace(signed, statement=statement, signature=signature)
        assert told_unopened(site, forged) == {Refusal(Reason.ORIGIN)}


@pytest.fixture
def neighbour(site: Site, tmp_path: Path, plan: Any) -> Site:
    """Another site of the same server, over the same catalog."""
    folder = tmp_path / "neighbour"
    folder.mkdir(mode=0o700)
    made = replace(site, folder=folder, name="there")
    made.save()
    (folder / "histories").symlink_to(site.histories_folder)
    Ledger.create(made.ledger_folder, epsilon=8, delta=1e-5, typical_plan=[plan.round_event()]).disconnect()
    trust(folder, public_key_of(KEY))
    return made


def test_a_request_for_one_site_is_nothing_at_another(
    site: Site, neighbour: Site, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = signed_for(site.folder, ask())
    assert told_by_all_ways(neighbour, signed) == {Refusal(Reason.ORIGIN)}
    monkeypatch.setattr(origin, "_own_key_id", lambda _: signed.said.site)
    assert told(neighbour, signed) == Refusal(Reason.ORIGIN)  # the ledger is asked for its key again
    assert outcomes(neighbour) == []
    monkeypatch.setattr(site_module, "_charge", charged_whoever_is_asked)
    assert isinstance(told(neighbour, signed), Update)
    assert outcomes(neighbour) == ["released"]


real_charge = site_module._charge


def charged_whoever_is_asked(
    site: Site, request: Request, plan: Any, event: Any, ledger: Ledger, until: float
) -> Any:
    asked = replace(request, site=ledger.key_id)
    vars(asked)["model_digest"] = request.model_digest
    return real_charge(site, asked, plan, event, ledger, until)


def test_a_replayed_request_gets_the_same_bytes_until_it_expires_and_nothing_after(
    site: Site, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = signed_for(site.folder, ask(), seconds=600)
    first = told(site, signed)
    assert isinstance(first, Update)
    assert told_by_all_ways(site, signed) == {first}
    assert told(site, signed, until=time.time() - 1) == Refusal(Reason.EXPIRED)  # its message has
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 700)
    assert told_by_all_ways(site, signed) == {Refusal(Reason.EXPIRED)}  # however long its message may live
    assert outcomes(site) == ["released"]


def test_an_expiry_of_the_messages_own_is_no_later_than_the_signed_one(site: Site, ask: Ask) -> None:
    late = signed_for(site.folder, ask(), seconds=-5)
    assert told(site, late, until=math.inf) == Refusal(Reason.EXPIRED)
    assert told(site, late, until=time.time() + 1e6) == Refusal(Reason.EXPIRED)
    assert told(site, late, until=math.nan) == Refusal(
        Reason.EXPIRED
    )  # a message whose own time is no number
    longer = replace(late, statement=replace(late.said, expires=2**33).to_bytes())
    assert told(site, longer) == Refusal(Reason.ORIGIN)
    assert outcomes(site) == []


def test_a_request_that_expires_while_the_model_is_built_is_charged_nothing(
    site: Site, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed, clock = signed_for(site.folder, ask(), seconds=600), time.time
    real = site_module._ready_model

    def slow(*given: Any) -> Any:
        monkeypatch.setattr(time, "time", lambda: clock() + 700)
        return real(*given)

    monkeypatch.setattr(site_module, "_ready_model", slow)
    assert told(site, signed) == Refusal(Reason.EXPIRED)
    assert outcomes(site) == []


def test_a_site_that_knows_no_server_refuses_all_and_names_the_step(
    site: Site, ask: Ask, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = signed_for(site.folder, ask())
    monkeypatch.setattr(origin, "say_seldom", origin._Seldom())
    monkeypatch.setattr(site_module, "say_seldom", origin.say_seldom)
    for known in (None, "", "ab", "ab" * 33, "zz" * 32):
        (site.folder / SERVER_KEY).unlink(missing_ok=True)
        if known is not None:
            (site.folder / SERVER_KEY).write_text(known)
        assert told_by_all_ways(site, signed) == {Refusal(Reason.ORIGIN)}
        with pytest.raises(NoServerKeyError, match=r"site connect .* --invitation FILE"):
            trusted_key(site.folder)
    assert outcomes(site) == []
    assert "fedtide site connect" in caplog.text
    with pytest.raises(ReceiptError):
        trust(site.folder, "no key")
    trust(site.folder, public_key_of(KEY))
    assert isinstance(told(site, signed), Update)


def test_who_forges_much_fills_no_log(
    site: Site, ask: Ask, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_module, "say_seldom", origin._Seldom())
    asked = replace(ask(), run="run-of-evil-words")
    forged = [signed_for(site.folder, replace(asked, round=each), key=ATTACKER) for each in (1, 2, 3)]
    with caplog.at_level(logging.DEBUG):
        for _ in range(50):
            for each in forged:
                assert told(site, each) == Refusal(Reason.ORIGIN)
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("fedtide")]
        assert lines == ["a request is refused: it is not signed by the server that this site knows"]
        monkeypatch.setattr(origin, "_QUIET", 0.0)
        monkeypatch.setattr(site_module.say_seldom, "_silent_until", 0.0)
        told(site, forged[0])
    assert caplog.records[-1].getMessage().endswith("(149 more before)")
    assert "evil" not in caplog.text


def test_errors_of_origin_say_few_words_of_ours(site: Site, ask: Ask) -> None:
    with pytest.raises(OriginError) as caught:
        origin.Asked(site.folder, signed_for(site.folder, ask(), key=ATTACKER), math.inf)
    assert str(caught.value) == "it is not signed by the server that this site knows"


@pytest.fixture
def worker(site: Site) -> Iterator[Site]:
    """A site whose resident worker is up."""
    process = subprocess.Popen([sys.executable, "-m", "client.worker", str(site.folder)])
    yield site
    process.kill()
    process.wait()


def test_who_has_a_task_token_makes_the_worker_charge_nothing(worker: Site, ask: Ask) -> None:
    """What a SuperNode's task is made of reaches the worker through its socket, whoever pulled it or wrote it."""
    site = worker
    honest = signed_for(site.folder, ask())
    contents = [
        request_to_records(signed_for(site.folder, ask(2), key=ATTACKER)),
        request_to_records(replace(honest, plan=other_plan(ask()))),
        request_to_records(replace(honest, statement=replace(honest.said, attempt=2).to_bytes())),
    ]
    for content in contents:
        reply = ask_worker(site.folder / SOCKET, question_to_bytes(content, math.inf))
        assert answer_from_records(content_from_bytes(reply)) == Refusal(Reason.ORIGIN)
    assert outcomes(site) == []
    reply = ask_worker(site.folder / SOCKET, question_to_bytes(request_to_records(honest), math.inf))
    assert isinstance(answer_from_records(content_from_bytes(reply)), Update)
    assert outcomes(site) == ["released"]
