"""The ClientApp: whatever happens at a site, its reply has the form of an answer, and no exception's text leaves."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from common.wire import Reason, Refusal, Request, Update, answer_from_records
from simulations.inline import over_the_wire
from tests.asking import content_for
from tests.tiny import tiny_run


def asked(content: RecordDict, site: Path) -> Message:
    """The app's reply to this content, over the wire and back."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(content, dst_node_id=2, message_type="train")
    message.metadata.__dict__["_message_id"] = "asked"
    context = Context(run_id=1, node_id=2, node_config={"site": str(site)}, state=RecordDict(), run_config={})
    return over_the_wire(app(over_the_wire(message), context))


def test_a_site_that_cannot_be_opened_says_one_word_and_sends_no_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = tiny_run(tmp_path, baseline_epochs=0)
    site = outcome.sites[0].folder
    state = outcome.run.round_state(0)
    request = Request(
        run="another", round=1, attempt=1, nonce="0" * 32, plan=outcome.plan.model_dump_json(), state=state
    )
    content = content_for(site, request)
    (site / "ledger").rename(site / "alice-was-here")
    with caplog.at_level(logging.DEBUG):
        reply = asked(content, site)
    assert reply.has_content()
    assert answer_from_records(reply.content) == Refusal(Reason.FAILED)
    assert str(site) not in caplog.text
    assert "alice" not in caplog.text


def test_a_ledger_behind_its_mark_answers_one_word_and_its_log_says_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = tiny_run(tmp_path, baseline_epochs=0, site_budget=20.0)
    site = outcome.sites[0].folder
    state = outcome.run.round_state(0)
    request = Request(
        run="another", round=1, attempt=1, nonce="0" * 32, plan=outcome.plan.model_dump_json(), state=state
    )
    ledger = site / "ledger"
    shutil.copytree(ledger, tmp_path / "backup")
    assert isinstance(answer_from_records(asked(content_for(site, request), site).content), Update)
    shutil.copy2(tmp_path / "backup" / "ledger.sqlite", ledger / "ledger.sqlite")
    before = {path.name: path.read_bytes() for path in ledger.iterdir() if path.is_file()}
    again = replace(request, run="a-third", nonce="1" * 32)
    assert answer_from_records(asked(content_for(site, again), site).content) == Refusal(Reason.FAILED)
    assert "its high-water mark says that it held entry" in caplog.text
    assert "put the newest whole copy of the ledger's folder back" in caplog.text
    assert {path.name: path.read_bytes() for path in ledger.iterdir() if path.is_file()} == before


def test_a_message_of_another_form_is_refused_by_its_origin(tmp_path: Path) -> None:
    reply = asked(RecordDict(), tmp_path)
    assert answer_from_records(reply.content) == Refusal(Reason.ORIGIN)
