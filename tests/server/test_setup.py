"""`fedtide server init`: what lies in the folder, what its certificates say, and what it refuses."""

from __future__ import annotations

import datetime
import ipaddress
import json
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from server.certificates import check_certificates
from server.cli import app
from server.deployment import Deployment, DeploymentError
from server.setup import make_server


def made(folder: Path, host: str = "fedtide.example.org", **ports: int) -> Deployment:
    make_server(Deployment(folder, host, **ports))
    return Deployment.load(folder)


def check(server: Deployment) -> list[str]:
    return check_certificates(server)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return made(tmp_path_factory.mktemp("server") / "here")


@pytest.fixture
def server(kept: Deployment, tmp_path: Path) -> Deployment:
    """A copy, to be broken."""
    shutil.copytree(kept.folder, tmp_path / "copy")
    return Deployment.load(tmp_path / "copy")


def test_everything_secret_is_the_owners_alone(kept: Deployment) -> None:
    kept.check_private()
    for path in [kept.folder, *kept.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir() or path.suffix not in (".crt", ".service", ".yaml"):
            assert not mode & 0o077, path
    assert len(kept.secret.read_bytes()) >= 32
    assert not kept.secret.read_bytes().endswith(b"\n")


def test_certificates_are_for_the_host_and_this_machine_and_a_real_handshake_accepts_them(
    kept: Deployment,
) -> None:
    assert check(kept) == []
    authority = x509.load_pem_x509_certificate(kept.authority.read_bytes())
    certificate = x509.load_pem_x509_certificate(kept.certificate.read_bytes())
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"fedtide.example.org", "localhost"}
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]
    days = datetime.timedelta(days=1)
    assert 824 * days < certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC) < 826 * days
    assert authority.not_valid_after_utc - certificate.not_valid_after_utc > 2500 * days

    listening = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    listening.load_cert_chain(kept.certificate, kept.key)
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def serve() -> None:
            for _ in range(3):
                taken, _ = plain.accept()
                try:
                    with listening.wrap_socket(taken, server_side=True) as secure:
                        secure.recv(1)
                except OSError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        calling = ssl.create_default_context(cafile=str(kept.authority))
        for name, accepted in (
            ("fedtide.example.org", True),
            ("127.0.0.1", True),
            ("evil.example.org", False),
        ):
            with socket.create_connection(plain.getsockname()) as raw:
                try:
                    calling.wrap_socket(raw, server_hostname=name).close()
                    assert accepted
                except ssl.SSLCertVerificationError:
                    assert not accepted
        thread.join()


def test_a_host_that_is_an_address_stands_as_one(tmp_path: Path) -> None:
    server = made(tmp_path / "here", "2001:db8::7")
    certificate = x509.load_pem_x509_certificate(server.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address("2001:db8::7") in names.get_values_for_type(x509.IPAddress)
    assert check(server) == []


@pytest.mark.parametrize("name", ["tls/server.key", "tls/ca.key", "superexec.secret", "."])
def test_a_key_that_others_may_read_is_refused_with_the_way_out(server: Deployment, name: str) -> None:
    path = server.folder / name
    path.chmod(0o750 if path.is_dir() else 0o640)
    with pytest.raises(DeploymentError, match=f"chmod {'700' if path.is_dir() else '600'} "):
        server.check_private()


def test_a_missing_key_is_named(server: Deployment) -> None:
    server.key.unlink()
    with pytest.raises(DeploymentError, match=r"server\.key is missing"):
        server.check_private()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "no name"], "is no host's name"),
        (["--host", "host:9092"], "has a port: give that as --port"),
        (["--host", "-x-.org"], "is no host's name"),
        (["--host", "h", "--port", "0"], "fleet port is 0"),
        (["--host", "h", "--port", "70000"], "must be from 1 to 65535"),
        (["--host", "h", "--port", "9093"], "each port must be another one"),
    ],
)
def test_bad_names_and_ports_are_refused_and_leave_nothing(
    tmp_path: Path, options: list[str], said: str
) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "new"), *options])
    assert isinstance(done.exception, DeploymentError)
    assert said in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(kept: Deployment, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (kept.folder, tmp_path, tmp_path / "file"):
        before = sorted(folder.rglob("*"))
        with pytest.raises(DeploymentError, match="is not empty"):
            make_server(Deployment(folder, "h"))
        assert sorted(folder.rglob("*")) == before


def test_init_says_what_comes_next_and_prints_json(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "a"), "--host", "h.example"])
    assert f"fedtide server up {tmp_path / 'a'}" in done.output
    assert "fedtide site init" in done.output
    done = CliRunner().invoke(app, ["init", str(tmp_path / "b"), "--host", "::1", "--port", "4321", "--json"])
    said = json.loads(done.output)
    assert said["server"] == "[::1]:4321"
    assert len(said["units"]) == 2


@pytest.mark.parametrize("name", ["here", "with space", "per%cent"])
def test_systemd_takes_the_unit(tmp_path: Path, name: str) -> None:
    server = made(tmp_path / name)
    unit = server.units / "fedtide-server.service"
    text = unit.read_text()
    assert "Restart=always" in text
    assert {
        "WatchdogSec=120",
        "LimitNOFILE=65536",
        "MemoryMax=8G",
        "TasksMax=4096",
        "ProtectProc=invisible",
    } <= set(text.splitlines())
    verify = shutil.which("systemd-analyze")
    if verify is None:
        sections = [line for line in text.splitlines() if line.startswith("[")]
        assert sections == ["[Unit]", "[Service]", "[Install]"]
        return
    done = subprocess.run(
        [verify, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if unit.name in line]
    assert ours == []


def test_the_compose_file_opens_the_sites_port_alone(kept: Deployment) -> None:
    (service,) = yaml.safe_load((kept.units / "compose.yaml").read_text())["services"].values()
    assert service["ports"] == ["9092:9092"]
    assert service["restart"] == "always"
    assert service["command"][-1] == service["volumes"][0]["target"] == str(kept.folder)


def test_a_damaged_or_absent_configuration_is_named(server: Deployment, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="holds no server: make one"):
        Deployment.load(tmp_path)
    for text in ("host = ", 'host = "h"', 'host = "h"\n[ports]\nfleet = "9"\ncontrol = 2\nmetrics = 3'):
        (server.folder / "server.toml").write_text(text)
        with pytest.raises(DeploymentError, match="is damaged"):
            Deployment.load(server.folder)
