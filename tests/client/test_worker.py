"""The resident worker: the same answers as in the ClientApp's own process, for its own user only, none uncharged."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import kept, worker
from client import site as site_module
from client.app import answered, app, content_from_bytes, content_to_bytes
from client.generators import Generators
from client.kept import kept_histories
from client.ledger import Ledger
from client.metrics import SiteMetrics, coarse
from client.policy import Limits
from client.site_folder import Site
from client.worker import SOCKET, WorkerError, ask, listen, serve_one
from common.events.histories import Histories
from common.supervision import Pulse
from common.wire import (
    Reason,
    Refusal,
    Request,
    Update,
    answer_from_records,
    state_to_bytes,
)
from tests.asking import content_for
from tests.client.test_site import CATALOG, some_histories
from tests.tiny import tiny_language_model, tiny_plan

NONCE = "ab" * 16


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("shared")
    tiny_language_model(folder / "language-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(folder / "home"))
        yield folder


@pytest.fixture
def request_(shared: Path) -> Request:
    from common.models.build import build_model, item_texts

    plan = tiny_plan(
        shared / "language-model",
        privacy={"users_per_site": 10},
        training={"rounds": 9, "steps_per_round": 2},
    )
    texts = item_texts(CATALOG.texts, CATALOG.categories)
    witness = plan.privacy.witness_places
    built = build_model(plan.model, texts, Path(plan.model.encoder), witness_places=witness)
    state = built.model.trainable_state()
    return Request(run="run-a", round=1, attempt=1, nonce=NONCE, plan=plan.model_dump_json(), state=state)


def made_site(folder: Path, request: Request) -> Site:
    from common.config import Plan

    folder.mkdir(mode=0o700)
    CATALOG.save(folder.parent / "catalog.jsonl")
    site = Site(
        folder=folder,
        name="here",
        catalog=folder.parent / "catalog.jsonl",
        users_at_least=10,
        limits=Limits(steps_per_round=5000),
    )
    site.save()
    some_histories().save(site.histories_folder)
    events = Plan.model_validate_json(request.plan).events()
    Ledger.create(site.ledger_folder, epsilon=20, delta=1e-5, typical_plan=events).disconnect()
    return site


def outcomes(site: Site) -> list[str]:
    with Ledger.open(site.ledger_folder) as ledger:
        ledger.verify()
        return [charge.outcome for charge in ledger.status().charges]


@pytest.fixture
def running(
    tmp_path: Path, request_: Request
) -> Iterator[tuple[Site, Callable[[], subprocess.Popen[bytes]]]]:
    """A site, and a way to start real workers of it; they are ended by pid."""
    site = made_site(tmp_path / "site", request_)
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-m", "client.worker", str(site.folder)]))
        return started[-1]

    yield site, start
    for each in started:
        if each.poll() is None:
            each.kill()
        each.wait()


def replied(site: Site, content: RecordDict, ttl: float = 600.0) -> Update | Refusal:
    """The ClientApp's answer, with the worker in the node's configuration."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(content, dst_node_id=2, message_type="train", ttl=ttl)
    message.metadata.__dict__["_message_id"] = "asked"
    node = {"site": str(site.folder), "worker": str(site.folder / SOCKET)}
    context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={})
    return answer_from_records(app(message, context).content)


def test_a_real_worker_answers_survives_a_kill_and_sends_the_same_bytes_again(
    running: tuple[Site, Callable[[], subprocess.Popen[bytes]]], request_: Request
) -> None:
    site, start = running
    first_worker = start()
    assert replied(site, content_for(site.folder, request_), ttl=1e-6) == Refusal(Reason.EXPIRED)
    assert outcomes(site) == []
    first = replied(site, content_for(site.folder, request_))
    assert isinstance(first, Update)
    path = site.folder / SOCKET
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    first_worker.send_signal(signal.SIGKILL)
    first_worker.wait()
    start()  # as `fedtide site up` does
    second = replied(site, content_for(site.folder, request_))
    assert isinstance(second, Update)
    assert state_to_bytes(second.state) == state_to_bytes(first.state)
    assert second.receipt == first.receipt
    assert outcomes(site) == ["released"]
    assert replied(site, RecordDict()) == Refusal(Reason.ORIGIN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as rude:  # rubbish ends no worker
        rude.connect(str(path))
        rude.sendall(b"\x00" * 7 + b"\x03abc")
    assert isinstance(replied(site, content_for(site.folder, request_)), Update)


def test_a_worker_killed_in_a_round_leaves_it_charged_and_one_word(
    running: tuple[Site, Callable[[], subprocess.Popen[bytes]]], request_: Request
) -> None:
    site, start = running
    values = json.loads(request_.plan)
    values["training"]["steps_per_round"] = 5000
    values["privacy"]["noise_multiplier"] = 1000.0
    long = json.dumps(values)
    victim = start()
    got: list[Update | Refusal] = []
    asking = threading.Thread(
        target=lambda: got.append(replied(site, content_for(site.folder, replace(request_, plan=long))))
    )
    asking.start()
    end = time.monotonic() + 120
    while not (site.folder / "progress").exists() and not got and time.monotonic() < end:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    asking.join(60)
    assert got == [Refusal(Reason.FAILED)]
    start()
    assert isinstance(replied(site, content_for(site.folder, replace(request_, round=2))), Update)
    assert outcomes(site) == ["burnt", "released"]


class SeededNoise:
    """In the place of the cryptographic generators: here two computations must draw alike."""

    def __init__(self) -> None:
        self._chance = np.random.default_rng(3)

    def normal(self, size: int) -> np.ndarray:
        return self._chance.standard_normal(size)

    def sample(self, users: int, rate: float) -> np.ndarray:
        return self._chance.random(users) < rate


def test_what_is_kept_changes_no_result(
    tmp_path: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded = Generators(noise=SeededNoise, sampler=SeededNoise)
    monkeypatch.setattr(site_module, "answer", partial(site_module.answer, generators=seeded))

    def states(folder: Path, *, keep: bool) -> list[bytes]:
        site, found = made_site(folder, request_), []
        for number in (1, 2, 3):
            if not keep:
                kept.forget()
                kept._MODELS.clear()
            content = content_for(site.folder, replace(request_, round=number))
            data = content_to_bytes(
                answered(lambda: site.folder, content_from_bytes(content_to_bytes(content)))
            )
            reply = answer_from_records(content_from_bytes(data))
            assert isinstance(reply, Update)
            found.append(state_to_bytes(reply.state))
        return found

    (tmp_path / "cold").mkdir()
    (tmp_path / "warm").mkdir()
    cold, warm = states(tmp_path / "cold" / "s", keep=False), states(tmp_path / "warm" / "s", keep=True)
    assert cold == warm


def test_histories_that_changed_on_disk_are_read_again(tmp_path: Path) -> None:
    histories = some_histories()
    histories.save(tmp_path / "histories")
    first = kept_histories(tmp_path / "histories")
    assert kept_histories(tmp_path / "histories") is first
    items = tmp_path / "histories" / "items.npy"
    changed = np.load(items)
    changed[0] += 1
    np.save(items, changed)
    again = kept_histories(tmp_path / "histories")
    assert again is not first
    assert isinstance(again, Histories)
    assert again.items[0] == changed[0]


def test_the_log_has_a_line_for_each_charge_and_each_answer(
    tmp_path: Path, request_: Request, caplog: pytest.LogCaptureFixture
) -> None:
    site = made_site(tmp_path / "site", request_)
    logging.getLogger("fedtide.site").propagate = True
    with caplog.at_level(logging.INFO, "fedtide.site"):
        for _ in range(2):
            answered(lambda: site.folder, content_for(site.folder, request_))
        answered(lambda: site.folder, content_for(site.folder, replace(request_, nonce="cd" * 16)))
    said = [each for each in dict.fromkeys(caplog.messages) if each.startswith("run run-a, round 1, ")]
    words = [each.partition(": ")[2] for each in said]
    assert [each.partition(";")[0] for each in words] == [
        "charged",
        "answered with a release",
        "answered with the bytes that it was answered with before",
        "refused: policy",
    ]
    with Ledger.open(site.ledger_folder) as ledger:
        status = ledger.status()
    for each in words[:2]:
        assert str(status.events[0]) in each
        assert f"{100 * (1 - status.share):.3f} % is left" in each


def test_a_worker_that_hangs_gives_no_sign_of_life_and_one_that_computes_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setenv("FEDTIDE_PULSE", str(writing))
    monkeypatch.setattr(worker.Busy, "_LOOK", 0.05)
    monkeypatch.setattr(worker.Busy, "_PATIENCE", 0.5)
    busy = worker.Busy(Pulse())
    busy.watch()

    def signs(doing: Callable[[], object]) -> int:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            doing()
        with suppress(BlockingIOError):
            os.read(reading, 1 << 16)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            doing()
        try:
            return len(os.read(reading, 1 << 16))
        except BlockingIOError:
            return 0

    assert signs(lambda: time.sleep(0.05)) > 0  # it waits for a request
    with busy.answering():
        assert signs(lambda: sum(range(1000))) > 0  # it computes
        assert signs(lambda: time.sleep(0.05)) == 0  # it hangs
    assert signs(lambda: time.sleep(0.05)) > 0


def test_another_users_worker_and_another_users_request_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listening = listen(tmp_path / SOCKET)
    asked: list[bytes] = []

    def answer(data: bytes) -> bytes:
        asked.append(data)
        return b"yes"

    def served() -> None:
        serve_one(listening, answer)

    thread = threading.Thread(target=served)
    thread.start()
    assert ask(tmp_path / SOCKET, b"hello") == b"yes"
    thread.join()
    real = worker.peer
    monkeypatch.setattr(worker, "peer", lambda connection: real(connection) + 1)
    with pytest.raises(WorkerError, match="another user"):
        ask(tmp_path / SOCKET, b"secret")
    with caplog.at_level(logging.ERROR, "fedtide.site"):
        served()
    assert asked == [b"hello"]
    listening.close()


def test_a_worker_about_to_be_started_again_is_asked_again(tmp_path: Path) -> None:
    listening = listen(tmp_path / SOCKET)
    answers = iter([b"", b"now"])

    def served() -> None:
        for _ in range(2):
            serve_one(listening, lambda _: next(answers))

    thread = threading.Thread(target=served)
    thread.start()
    assert ask(tmp_path / SOCKET, b"hello") == b"now"
    thread.join()
    listening.close()


def test_a_long_path_has_a_socket_all_the_same(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    (deep / "worker").mkdir()
    listening = listen(deep / SOCKET)
    thread = threading.Thread(target=serve_one, args=(listening, bytes.upper))
    thread.start()
    assert ask(deep / SOCKET, b"far") == b"FAR"
    thread.join()
    listening.close()


def test_no_worker_is_said_in_time(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="site up"):
        ask(tmp_path / SOCKET, b"", patience=0.2)


def test_metrics_tell_rounds_refusals_and_budget_and_no_exact_time(tmp_path: Path, request_: Request) -> None:
    site = made_site(tmp_path / "site", request_)
    metrics = SiteMetrics(site.folder, site.ledger_folder)
    with metrics.round() as note:
        answered(lambda: site.folder, content_for(site.folder, request_), note)
    with metrics.round() as note:
        answered(lambda: site.folder, content_for(site.folder, replace(request_, plan="no plan")), note)
    told = {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    assert told["fedtide_site_rounds_answered_total", "update"] == 1
    assert told["fedtide_site_refusals_total", "plan"] == 1
    with Ledger.open(site.ledger_folder) as ledger:
        assert told["fedtide_site_budget_left",] == 1 - ledger.status().share
    step = told["fedtide_site_step_seconds",]
    assert step == coarse(step)
    assert np.log2(step) == round(np.log2(step))
    assert {name for name, *_ in told if not name.endswith("_created")} == {
        "fedtide_site_rounds_answered_total",
        "fedtide_site_refusals_total",
        "fedtide_site_budget_left",
        "fedtide_site_step_seconds",
        "fedtide_connected",
    }


def test_the_sockets_user_is_the_kernels_word(tmp_path: Path) -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert worker.peer(left) == os.getuid()
