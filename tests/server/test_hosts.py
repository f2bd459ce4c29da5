"""A server is made for a host that sites can reach, or refused in a sentence of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.deployment import Deployment, DeploymentError
from server.hosts import checked_host


@pytest.mark.parametrize(
    ("host", "is_"),
    [
        ("fedtide.example.org", "fedtide.example.org"),
        ("Fedtide.Example.ORG", "fedtide.example.org"),
        ("fedtide.example.org.", "fedtide.example.org"),
        ("localhost", "localhost"),
        ("192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("2001:0DB8:0:0::7", "2001:db8::7"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("my_server", "my_server"),
    ],
)
def test_names_and_addresses_are_taken_as_certificates_hold_them(host: str, is_: str) -> None:
    assert checked_host(host) == is_


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("0.0.0.0", "stands for every address of this machine"),
        ("::", "stands for every address of this machine"),
        ("[::]", "stands for every address of this machine"),
        ("224.0.0.1", "is a multicast address"),
        ("ff02::1", "is a multicast address"),
        ("255.255.255.255", "is the broadcast address"),
        ("169.254.1.1", "is link-local"),
        ("fe80::1", "is link-local"),
        ("fe80::1%eth0", "names an interface of this machine alone"),
        ("", "--host is empty"),
        ("  ", "--host is empty"),
        ("https://fedtide.example.org", "is a URL or a path"),
        ("fedtide.example.org/x", "is a URL or a path"),
        ("fedtide.example.org:9092", "has a port: give that as --port"),
        ("192.0.2.7:9092", "has a port: give that as --port"),
        ("*.example.org", "is no host's name"),
        ("two words", "is no host's name"),
        ("-dash.example", "is no host's name"),
        ("a..b", "is no host's name"),
        ("a" * 64 + ".example", "is no host's name"),
        ("999.1.1.1", "is no whole address of four numbers"),
        ("192.0.2", "is no whole address of four numbers"),
        ("0x7f000001", "is no whole address of four numbers"),
    ],
)
def test_what_no_site_can_reach_is_refused(host: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="give") as refused:
        checked_host(host)
    assert said in str(refused.value)
    folder = tmp_path / "server"
    done = CliRunner().invoke(app, ["init", str(folder), f"--host={host}"])
    assert said in str(done.exception)
    assert not folder.exists()


def test_a_new_host_is_held_to_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    assert CliRunner().invoke(app, ["init", str(folder), "--host", "127.0.0.1"]).exit_code == 0
    before = (folder / "tls" / "server.crt").read_bytes()
    done = CliRunner().invoke(app, ["renew", str(folder), "--host", "0.0.0.0"])
    assert "stands for every address" in str(done.exception)
    assert (folder / "tls" / "server.crt").read_bytes() == before
    assert Deployment.load(folder).host == "127.0.0.1"
