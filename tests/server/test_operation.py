"""`fedtide server up`, `enroll` and `status` with the real SuperLink: started, hurt, told of sites, ended by pid."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from client.ledger import Ledger
from common.privacy.enrolment import enrolment_to_bytes
from common.privacy.entries import Entry
from common.privacy.mechanisms import GaussianSum
from server import nodes as server_nodes
from server.certificates import new_server_certificate
from server.cli import app
from server.control import control
from server.deployment import Deployment, DeploymentError, NotRunningError, open_locked
from server.nodes import enrolled_keys, keep_node_key, known_nodes, pending_changes, site_names
from server.operation import check_startable
from server.overview import overview
from server.registry import RegistryError
from server.setup import make_server


def free_ports() -> dict[str, int]:
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for each in (one, two, three):
            each.bind(("127.0.0.1", 0))
        names = ("fleet_port", "control_port", "metrics_port")
        return dict(zip(names, (each.getsockname()[1] for each in (one, two, three)), strict=True))


@pytest.fixture
def server(tmp_path: Path) -> Deployment:
    made = Deployment(tmp_path / "server", "127.0.0.1", **free_ports())
    make_server(made)
    return made


def node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture(scope="module")
def genesis(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Entry]:
    """Makes a new ledger's genesis."""

    def make() -> Entry:
        folder = tmp_path_factory.mktemp("ledger") / "ledger"
        with Ledger.create(folder, epsilon=4.0, delta=1e-6, typical_plan=[GaussianSum(8.0)]) as ledger:
            return ledger.entries()[0]

    return make


def enroll(server: Deployment, name: str, data: bytes) -> dict[str, str]:
    file = server.folder.parent / f"{name}.json"
    file.write_bytes(data)
    done = CliRunner().invoke(
        app, ["enroll", str(file), "--server", str(server.folder), "--name", name, "--json"]
    )
    if done.exception is not None:
        raise done.exception
    said: dict[str, str] = json.loads(done.output)
    return said


@contextmanager
def up(server: Deployment, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "common.cli", "server", "up", str(server.folder), "--log-json"],
            stderr=file,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def until(so: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + 120
    while not so():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def said(log: Path) -> list[str]:
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line)["message"] for line in lines if line.endswith("\n")]


def children(pid: int) -> dict[str, int]:
    """Program -> pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    found[
                        next(
                            part.decode() for part in command if b"flower-" in part or b"server." in part
                        ).rpartition("/")[2]
                    ] = int(entry.name)
            except (OSError, StopIteration):
                continue
    return found


def status(server: Deployment) -> dict[str, object]:
    done = CliRunner().invoke(app, ["status", str(server.folder), "--json"])
    assert done.exit_code == 0, done.exception
    found: dict[str, object] = json.loads(done.output)
    return found


def nodes(server: Deployment) -> dict[str, str]:
    return {site.name: site.node for site in overview(server).sites}


def test_a_server_lives_through_kills_learns_of_sites_and_ends_with_nothing_left(
    server: Deployment, genesis: Callable[[], Entry], tmp_path: Path
) -> None:
    log = tmp_path / "up.log"
    first, second = genesis(), genesis()
    assert enroll(server, "north", enrolment_to_bytes(first, node_key()))["node"] == "pending"
    assert status(server)["up"] is False
    assert nodes(server) == {"north": "pending"}
    with up(server, log) as process:
        until(lambda: any("up: sites reach" in line for line in said(log)), log)
        until(lambda: nodes(server)["north"] == "never seen", log)
        assert enroll(server, "south", enrolment_to_bytes(second, node_key()))["node"] == "registered"
        assert nodes(server) == {"north": "never seen", "south": "never seen"}
        assert status(server)["up"] is True

        again = CliRunner().invoke(app, ["up", str(server.folder)])
        assert "is up already" in str(again.exception)

        pids = children(process.pid)
        for program in ("server.superlink", "server.superexec"):
            os.kill(pids[program], signal.SIGKILL)
        until(lambda: len(children(process.pid)) == 2 and server.answers(), log)
        assert not set(pids.values()) & set(children(process.pid).values())
        assert any("superlink ended with code -9" in line for line in said(log))

        # A site's second node key takes the first one's place.
        newer = node_key()
        assert enroll(server, "south", enrolment_to_bytes(second, newer))["node"] == "registered"
        assert {node.key for node in known_nodes(server) if node.registered} == set(
            enrolled_keys(server).values()
        )
        assert newer in enrolled_keys(server).values()
        registered = {node.node_id for node in known_nodes(server) if node.registered}
        assert set(site_names(server)) == registered
        assert sorted(site_names(server).values()) == ["north", "south"]

        # A site that is removed is out at once; its node key is not taken again, and a new one is.
        removed = CliRunner().invoke(app, ["remove", str(server.folder), "south", "--reason", "it left"])
        assert "its node may not connect any more" in removed.output
        assert list(site_names(server).values()) == ["north"]
        assert sum(node.registered for node in known_nodes(server)) == 1
        with pytest.raises(DeploymentError, match=r"takes no key twice: .* runs `fedtide site connect`"):
            enroll(server, "south", enrolment_to_bytes(second, newer))
        assert enroll(server, "south", enrolment_to_bytes(second, node_key()))["node"] == "registered"
        assert sorted(site_names(server).values()) == ["north", "south"]

        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as answer:
            assert 'fedtide_sites{node="never_seen"} 2.0' in answer.read().decode()

        last = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in last.values())
    assert status(server)["up"] is False
    assert nodes(server) == {"north": "never seen", "south": "never seen"}
    check_startable(server)  # its ports are free again


QUICK = """
import sys
from pathlib import Path
from common.logs import set_up_logs
from server import operation
from server.deployment import Deployment
operation._SILENT = 6.0
set_up_logs(sys.stderr, json=True)
operation.operate(Deployment.load(Path(sys.argv[1])))
"""
"""`fedtide server up` that loses patience soon."""


def test_what_stands_still_is_started_again_and_systemd_hears_that_all_is_well(
    server: Deployment, tmp_path: Path
) -> None:
    log, notify = tmp_path / "up.log", tmp_path / "notify"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        "NOTIFY_SOCKET": str(notify),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, log.open("wb") as file:
        manager.bind(str(notify))
        manager.setblocking(False)
        process = subprocess.Popen([sys.executable, "-c", QUICK, server.folder], env=environment, stderr=file)
        try:
            until(lambda: any("up: sites reach" in line for line in said(log)), log)
            for program in ("superlink", "superexec"):
                before = children(process.pid)[f"server.{program}"]
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{before}/environ").read_bytes()
                os.kill(before, signal.SIGSTOP)
                until(lambda name=program: f"{name} is started again" in said(log), log)  # type: ignore[misc]
                assert any(
                    f"{program} ended with code -9 (killed, as it gave no" in line for line in said(log)
                )
                until(server.answers, log)
            until(lambda: _told(manager), log)
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.5)
            while _told(manager):
                pass
            time.sleep(2.0)
            assert not _told(manager)  # so that systemd would end it
            os.kill(process.pid, signal.SIGCONT)
            until(lambda: _told(manager), log)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _told(manager: socket.socket) -> bool:
    try:
        return manager.recv(100) == b"WATCHDOG=1"
    except BlockingIOError:
        return False


def test_a_port_in_use_is_named_with_the_way_out(server: Deployment) -> None:
    for name, port in server.ports().items():
        with socket.create_server(("127.0.0.1", port)):
            done = CliRunner().invoke(app, ["up", str(server.folder)])
            assert isinstance(done.exception, DeploymentError)
            assert f"port {port} ({name}) is in use" in str(done.exception)
    check_startable(server)


def test_up_refuses_loose_keys_and_expired_certificates_before_it_starts_anything(server: Deployment) -> None:
    server.key.chmod(0o644)
    assert "chmod 600" in str(CliRunner().invoke(app, ["up", str(server.folder)]).exception)
    server.key.chmod(0o600)
    certificate, key = new_server_certificate(
        server.authority.read_bytes(), server.authority_key.read_bytes(), server.host, days=-1
    )
    server.certificate.write_bytes(certificate)
    server.key.write_bytes(key)
    assert "check the clock" in str(CliRunner().invoke(app, ["up", str(server.folder)]).exception)
    assert list(server.logs.iterdir()) == []


def test_a_superlink_that_ends_at_once_is_said_with_its_log(server: Deployment) -> None:
    server.database.write_bytes(b"no database" * 1000)
    done = CliRunner().invoke(app, ["up", str(server.folder)])
    assert f"read {server.logs}/superlink.log" in str(done.exception)
    with open_locked(server.folder / "up.lock") as free:
        assert free


def test_a_superlink_that_is_down_in_a_server_that_is_up_is_to_be_waited_for(server: Deployment) -> None:
    with control(server) as asked:
        with pytest.raises(NotRunningError, match="start it with"):
            asked.run_says(1)
        with open_locked(server.folder / "up.lock") as mine:
            assert mine
            with pytest.raises(NotRunningError, match="wait a minute"):
                asked.run_says(1)


def test_nodes_are_registered_in_one_process_past_any_proxy_and_flowers_words_are_told(
    server: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dead:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{dead.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        first = {f"early-{number}": node_key() for number in range(30)}
        for name, key in first.items():
            keep_node_key(server, name, key)
        log = tmp_path / "up.log"
        with up(server, log) as process:
            until(lambda: any("up: sites reach" in line for line in said(log)), log)
            until(lambda: not any(pending_changes(server)), log)
            with control(server) as asked:
                with pytest.raises(DeploymentError, match="Flower refused to register a node"):
                    asked.register("again", first["early-0"])
                with pytest.raises(DeploymentError, match="Flower refused to take a node out"):
                    asked.unregister(1)
                with pytest.raises(DeploymentError, match="run"):
                    asked.run_says(1)
                with pytest.raises(DeploymentError, match="run"):
                    asked.stop(1)

            def refused(*_: object, **__: object) -> None:
                raise AssertionError("a process was started")

            monkeypatch.setattr(subprocess, "Popen", refused)
            later = {f"late-{number}": node_key() for number in range(30)}
            with monkeypatch.context() as patched:
                patched.setattr(server_nodes, "pending_changes", lambda _: (later, []))
                assert sorted(server_nodes.register_nodes(server)) == sorted(later)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        known = {node.key for node in known_nodes(server)}
        assert {*first.values(), *later.values()} <= known


def test_two_sites_cannot_share_a_node_key_and_a_failed_enrolment_leaves_nothing(
    server: Deployment, genesis: Callable[[], Entry]
) -> None:
    key = node_key()
    enroll(server, "north", enrolment_to_bytes(genesis(), key))
    other = genesis()
    with pytest.raises(DeploymentError, match="belongs to site 'north'"):
        enroll(server, "south", enrolment_to_bytes(other, key))
    with pytest.raises(DeploymentError, match="belongs to site 'north'"):
        keep_node_key(server, "south", key)
    assert list(nodes(server)) == ["north"]
    assert enroll(server, "south", enrolment_to_bytes(other))["node"] == "none"
    assert nodes(server) == {"north": "pending", "south": "none"}
    with pytest.raises(RegistryError, match="is enrolled already"):
        enroll(server, "north", enrolment_to_bytes(genesis(), node_key()))
    assert enrolled_keys(server) == {"north": key}
    assert pending_changes(server) == ({"north": key}, [])


def test_a_name_that_is_a_path_is_refused(server: Deployment, genesis: Callable[[], Entry]) -> None:
    file = server.folder.parent / "e.json"
    file.write_bytes(enrolment_to_bytes(genesis(), node_key()))
    done = CliRunner().invoke(app, ["enroll", str(file), "--server", str(server.folder), "--name", "../x"])
    assert isinstance(done.exception, RegistryError)
    assert list(server.nodes.iterdir()) == []
