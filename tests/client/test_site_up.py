"""A site against a real server on loopback, with TLS and node keys: what `check` finds, and what `up` keeps alive."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from client import check
from client.agent import AgentError, free_port
from client.check import Finding, check_site
from client.connection import Connection
from client.ledger import Ledger
from client.link import Asked, Link, hint, is_connected
from client.probe import Heard, ProbeError, certificate, clock_ahead, fleet, reach
from client.remains import LOOK, remains
from client.site_folder import Site
from common.events.catalog import Catalog
from common.invitation import Invitation
from common.privacy.enrolment import fingerprint
from common.supervision import Supervised
from tests.client.test_connection import authority, init
from tests.tiny import tiny_language_model

FEDTIDE = str(Path(sys.executable).with_name("fedtide"))


def wait_for(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a running server and two sites: `north`, enrolled, and `south`, not."""
    root = tmp_path_factory.mktemp("up")
    ports = [free_port() for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(root / "home"))
        model = tiny_language_model(root / "language-model")
        options = [
            "--host",
            "localhost",
            "--port",
            ports[0],
            "--control-port",
            ports[1],
            "--metrics-port",
            ports[2],
        ]
        run(["server", "init", root / "server", *options])
        for name in ("north", "south"):
            made = init(
                root / name, root / "data",
                "--invitation", root / "server" / "invitation.json",
                "--language-model", f"tiny={model}",
            )  # fmt: skip
            assert made.exit_code == 0, made.output
        with (root / "server.out").open("wb") as out:
            server = subprocess.Popen([FEDTIDE, "server", "up", root / "server"], stdout=out, stderr=out)
        try:
            wait_for(
                lambda: "up: sites reach" in (root / "server.out").read_text() or server.poll() is not None
            )
            run(
                [
                    "server",
                    "enroll",
                    root / "north" / "enrolment.json",
                    "--server",
                    root / "server",
                    "--name",
                    "n",
                ]
            )
            yield root
        finally:
            server.terminate()
            server.wait(60)


def run(arguments: list[object]) -> None:
    subprocess.run([FEDTIDE, *map(str, arguments)], check=True, timeout=120, capture_output=True)


def found(folder: Path) -> dict[str, Finding]:
    return {each.name: each for each in check_site(folder)}


def test_everything_holds_for_an_enrolled_site_and_nothing_is_spent(place: Path) -> None:
    before = entries(place / "north")
    findings = found(place / "north")
    assert [each for each in findings.values() if each.holds is not True] == []
    assert "120 users" in findings["logs"].said
    given = Invitation.from_bytes((place / "server" / "invitation.json").read_bytes())
    assert fingerprint(given.digest) in findings["keys"].said
    assert Catalog.load(Site.load(place / "north").catalog).digest() in findings["catalog"].said
    assert entries(place / "north") == before


def entries(folder: Path) -> int:
    with Ledger.open(folder / "ledger") as ledger:
        return len(ledger.entries())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator here")
def test_a_policy_that_asks_for_an_accelerator_where_there_is_none_is_told_so(place: Path) -> None:
    site = Site.load(place / "north")
    asked = replace(site, performance=site.performance.model_copy(update={"device": "cuda"}))
    with pytest.raises(check._NotInOrderError) as told:
        check._gpu(asked)
    assert told.value.args[0] == "none that torch can use, but device is cuda"
    assert check._gpu(site) == "none: the CPU is used"


def test_a_node_that_is_not_enrolled_is_told_so(place: Path) -> None:
    findings = found(place / "south")
    assert findings["key enrolled"].holds is False
    assert "fedtide server enroll" in findings["key enrolled"].way_out
    assert findings["clock"].holds


@pytest.mark.parametrize("off", [0, 4, 600, -600, 5000])
def test_the_clocks_distance_is_measured(place: Path, off: int) -> None:
    real = fleet(Connection.load(place / "north"))

    def ask(shift: timedelta) -> Heard:
        return real(shift + timedelta(seconds=off))

    now = ask(timedelta())
    assert (now is Heard.WRONG_TIME) == (abs(off) > 300)
    assert clock_ahead(ask, now) == pytest.approx(off, abs=3)


def test_another_authority_another_name_and_no_server_are_told_apart(place: Path, tmp_path: Path) -> None:
    good = Connection.load(place / "north")
    assert certificate(good).year > 2020
    authority(tmp_path / "ca.crt")
    with pytest.raises(ProbeError, match=r"does not come from ca\.crt"):
        certificate(Connection(tmp_path, good.host, good.port))
    with pytest.raises(ProbeError, match=r"for another (name|address)"):
        certificate(replace(good, host="127.0.0.2"))
    with pytest.raises(ProbeError, match="refuses connections: its machine answers"):
        reach(replace(good, port=free_port()))
    with pytest.raises(ProbeError, match="is not known"):
        reach(replace(good, host="no-such-host.invalid"))


def test_a_loose_key_fails_the_check_with_the_way_out(place: Path) -> None:
    key = place / "south" / "node.key"
    key.chmod(0o644)
    try:
        assert "chmod 600" in found(place / "south")["keys"].way_out
    finally:
        key.chmod(0o600)


def test_up_restarts_its_worker_is_alone_and_leaves_nothing(place: Path) -> None:
    folder = place / "north"
    with (place / "north.out").open("wb") as out:
        site = subprocess.Popen([FEDTIDE, "site", "up", "--log-json", folder], stdout=out, stderr=out)
    said = place / "north.out"
    try:
        wait_for(lambda: "connected to" in said.read_text() and "is ready" in said.read_text())
        second = subprocess.run(
            [FEDTIDE, "site", "up", folder], check=False, capture_output=True, text=True, timeout=60
        )
        assert second.returncode != 0
        assert "is up already" in second.stderr
        lines = [json.loads(line) for line in said.read_text().splitlines()]
        (address,) = [line["message"].split()[-1] for line in lines if "Prometheus" in line["message"]]
        assert "fedtide_site_budget_left 1.0" in metrics_at(address)
        wait_for(lambda: "fedtide_connected 1.0" in metrics_at(address))
        before = below(site.pid)
        worker = next(pid for pid, line in before.items() if "client.worker" in line)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: said.read_text().count("is ready") == 2)
        before |= below(site.pid)
    finally:
        site.terminate()
        code = site.wait(60)
    assert code == 0
    assert len(before) >= 4  # supernode, starter, the worker and the one after it
    assert not [pid for pid in before if alive(pid)]
    assert '"message": "down"' in said.read_text()
    assert not [each.name for each in remains(folder) if each.after == LOOK]


def metrics_at(address: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=30) as told:
        return str(told.read().decode())


def below(parent: int) -> dict[int, str]:
    """Processes that a process started, and theirs: pid -> command line."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    chosen, more = set[int](), {parent}
    while more:
        more = {pid for pid, above in parents.items() if above in more}
        chosen |= more
    return {pid: command(pid) for pid in chosen}


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_taken_metrics_port_is_refused_in_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AgentError, match="is in use by another process"):
            free_port(taken.getsockname()[1])


def test_flowers_words_and_the_servers_become_a_way_out() -> None:
    refused = "[code: 2004] Failed to activate SuperNode"
    assert "fedtide server enroll" in hint(refused, "unknown")
    already = hint(refused, "known")
    assert "connected already" in already
    assert "fedtide site connect" in already
    assert "enroll" not in already  # it is enrolled
    assert "connected already" not in hint("", "known")
    assert "NTP" in hint("details = 'Invalid timestamp'")
    assert "NTP" in hint("", "wrong time")
    assert "ca.crt" in hint("SSL_ERROR_SSL: CERTIFICATE_VERIFY_FAILED")
    assert "site check" in hint("")


def supernode_of(tmp_path: Path, script: str) -> Supervised:
    return Supervised(
        "supernode",
        [sys.executable, "-c", script],
        environment={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        folder=tmp_path,
        log=tmp_path / "supernode.log",
        logger=logging.getLogger("fedtide.site"),
        silence=60.0,
    )


def asking(word: str) -> Asked:
    return Asked([sys.executable, "-c", f"print({word!r})"], dict(os.environ))


@pytest.mark.parametrize(
    ("last", "word", "said"),
    [
        ("", "wrong time", "set them by NTP"),
        ("CERTIFICATE_VERIFY_FAILED", "", "does not fit ca.crt"),
        ("[code: 2004] Failed to activate SuperNode.", "unknown", "does not know this node's key"),
        ("[code: 2004] Failed to activate SuperNode.", "known", "connected already"),
    ],
)
def test_where_a_supernode_ended_its_log_tells_or_the_server_is_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, last: str, word: str, said: str
) -> None:
    supernode = supernode_of(tmp_path, f"print({last!r})")
    link = Link(supernode, "127.0.0.1:9092", tmp_path, lambda: None, lambda: asking(word))
    supernode.start()
    wait_for(lambda: supernode.pid is None)
    logging.getLogger("fedtide.site").propagate = True
    with caplog.at_level(logging.INFO, "fedtide.site"):
        wait_for(lambda: bool(link.look() or caplog.records))
        link.look()
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("the supernode ended")
    assert said in told
    link.end()


def test_a_server_that_stops_answering_is_said_once_and_its_return_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker").mkdir()
    monkeypatch.setattr("client.link._UNANSWERED", 1.0)
    monkeypatch.setattr("client.link._TELL_SECONDS", 3600.0)  # a change is told at once
    script = (
        "import pathlib, time; from common.supervision import ALIVE, ANSWERED, Pulse; pulse = Pulse()\n"
        "while True: pulse.show(ALIVE if pathlib.Path('cut').exists() else ALIVE + ANSWERED); time.sleep(0.1)"
    )
    supernode = supernode_of(tmp_path, script)
    link = Link(supernode, "127.0.0.1:9092", tmp_path, lambda: None, lambda: asking(""))
    supernode.start()
    logging.getLogger("fedtide.site").propagate = True

    def told(connected: bool) -> bool:
        supernode.tend()
        link.look()
        return is_connected(tmp_path) == connected

    try:
        with caplog.at_level(logging.INFO, "fedtide.site"):
            wait_for(lambda: told(True))
            (tmp_path / "cut").touch()
            wait_for(lambda: told(False))
            (tmp_path / "cut").unlink()
            wait_for(lambda: told(True))
    finally:
        supernode.stop()
        link.end()
    said = [record.getMessage() for record in caplog.records]
    assert [each.partition(":")[0].partition(" ")[0] for each in said] == ["connected", "the", "connected"]
    assert "does not answer any more" in said[1]
    assert said[2].endswith("again")
    assert not is_connected(tmp_path)  # the site is down


def test_an_old_word_of_a_connection_counts_no_more(tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    file = tmp_path / "worker" / "connected"
    file.write_text("1")
    assert is_connected(tmp_path)
    os.utime(file, (1_000_000_000, 1_000_000_000))
    assert not is_connected(tmp_path)
