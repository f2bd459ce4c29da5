"""The server's certificates: told apart, watched, renewed; and a new authority that cuts off no site on the way.

What sites take is seen in handshakes over sockets, by gRPC (as a SuperNode does) and by Python's ssl.
"""

from __future__ import annotations

import datetime
import logging
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner

from common.daily import Daily
from server.certificates import (
    authorities,
    certificate_ends,
    check_certificates,
    loaded,
    names_of,
    new_authority,
    new_server_certificate,
    warn_of_ends,
)
from server.cli import app
from server.deployment import Deployment, DeploymentError, NotRunningError, open_locked
from server.monitoring import ServerCollector
from server.overview import overview
from server.renewal import begin_authority, drop_authority, renew_certificate, switch_authority
from server.setup import make_server
from tests.server.dated_certificates import Dated, dated, shown, takes


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    server = Deployment(tmp_path_factory.mktemp("server") / "here", "fedtide.example.org")
    make_server(server)
    return server


@pytest.fixture
def server(kept: Deployment, tmp_path: Path) -> Deployment:
    """A copy, to be broken."""
    shutil.copytree(kept.folder, tmp_path / "copy")
    return Deployment.load(tmp_path / "copy")


def put(server: Deployment, authority: Dated, own: Dated | None = None) -> None:
    authority.put(server.authority, server.authority_key)
    if own is not None:
        own.put(server.certificate, server.key)


def accepted(server: Deployment, ca: bytes) -> bool:
    """Whether a site that was given this ca.crt takes what the server would show now."""
    return takes(ca, server.certificate, server.key)


def test_expired_foreign_misnamed_and_mismatched_certificates_are_told_apart(server: Deployment) -> None:
    authority, key = server.authority.read_bytes(), server.authority_key.read_bytes()
    own_key = server.key.read_bytes()

    def show(certificate: bytes, its_key: bytes) -> None:
        server.certificate.write_bytes(certificate)
        server.key.write_bytes(its_key)

    show(*new_server_certificate(authority, key, server.host, days=-1))
    with pytest.raises(DeploymentError, match=r"server\.crt expired: .*fedtide server renew .*copy`"):
        check_certificates(server)
    show(*new_server_certificate(*new_authority(), server.host))
    with pytest.raises(DeploymentError, match=r"was not signed by ca\.crt"):
        check_certificates(server)
    show(*new_server_certificate(authority, key, "other.example.org"))
    with pytest.raises(DeploymentError, match=r"is not for fedtide\.example\.org"):
        check_certificates(server)
    show(new_server_certificate(authority, key, server.host)[0], own_key)
    with pytest.raises(DeploymentError, match=r"is not the key of server\.crt"):
        check_certificates(server)
    server.certificate.write_text("nothing")
    with pytest.raises(DeploymentError, match="holds no certificate that can be read"):
        check_certificates(server)
    assert "holds no certificate" in certificate_ends(server).warnings[0]


@pytest.mark.parametrize(
    ("authority_days", "own_days", "said"),
    [
        (400, 31.5, ""),
        (400, 29.5, r"^the server's certificate ends on .*, in 29 days: `fedtide server renew .*copy`"),
        (29.5, 29.5, r"^the authority in .*ca\.crt ends on .*, in 29 days.*renew .*copy --authority`"),
        (20, 700, r"^the authority in .*ca\.crt ends on .*, in 19 days.*renew .*copy --authority`"),
        (20, 10, r"^the authority in .*in 19 days"),  # a new certificate would not help for long
    ],
)
def test_the_end_that_is_near_is_said_in_status_log_and_gauge(
    server: Deployment,
    caplog: pytest.LogCaptureFixture,
    authority_days: float,
    own_days: float,
    said: str,
) -> None:
    authority = dated(-1, authority_days)
    put(server, authority, dated(-1, own_days, authority))
    warnings = check_certificates(server)
    assert len(warnings) == bool(said)
    now = [0.0]
    watch = Daily(lambda: warn_of_ends(server), lambda: now[0])
    with caplog.at_level(logging.WARNING):
        for now[0] in (0.0, 86_399.0, 86_400.0, 86_401.0, 172_799.0, 172_801.0):
            watch.look()
    assert [record.getMessage() for record in caplog.records] == 2 * warnings  # once a day
    assert overview(server).certificates.warnings == warnings
    status = CliRunner().invoke(app, ["status", str(server.folder)]).output
    assert ("Certificates: " in status) == bool(said)
    registry = CollectorRegistry()
    registry.register(ServerCollector(server))
    lines = generate_latest(registry).decode().splitlines()
    for name, certificate in (("server", server.certificate), ("authority", server.authority)):
        (line,) = (each for each in lines if f'_end_seconds{{certificate="{name}"}}' in each)
        assert float(line.split()[1]) == loaded(certificate).not_valid_after_utc.timestamp()
    if said:
        import re

        assert re.search(said, warnings[0])


def test_an_authority_that_has_expired_gets_its_own_words_and_a_way_out(server: Deployment) -> None:
    authority = dated(-100, -1)
    put(server, authority, dated(-100, 300, authority))
    with pytest.raises(DeploymentError, match=r"^the authority in .* expired: .*renew .*copy --authority`"):
        check_certificates(server)
    with pytest.raises(DeploymentError, match=r"^the authority expired on .*renew .*copy --authority`"):
        renew_certificate(server)  # which used to sign under the expired authority again
    assert not accepted(server, server.authority.read_bytes())
    assert begin_authority(server)  # switched at once: no site was in
    assert check_certificates(server) == []
    assert len(authorities(server.authority)) == 1
    assert accepted(server, server.authority.read_bytes())


def test_a_clock_that_is_behind_is_told_from_an_expired_authority(server: Deployment) -> None:
    authority = dated(2, 400)
    put(server, authority, dated(2, 300, authority))
    with pytest.raises(DeploymentError, match=r"is valid from .*check the clock"):
        check_certificates(server)


def test_a_certificate_never_outlives_its_authority(server: Deployment) -> None:
    authority = dated(-1, 20)
    put(server, authority)
    renew_certificate(server)
    assert loaded(server.certificate).not_valid_after_utc == authority.certificate.not_valid_after_utc
    assert accepted(server, server.authority.read_bytes())
    done = CliRunner().invoke(app, ["renew", str(server.folder)])
    assert f"until {authority.certificate.not_valid_after_utc:%Y-%m-%d}" in done.output
    assert "Note: the authority in" in done.output
    long = dated(-1, 4000)
    put(server, long)
    renew_certificate(server)
    left = loaded(server.certificate).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=824) < left < datetime.timedelta(days=826)


def test_a_new_certificate_keeps_the_authority(server: Deployment) -> None:
    before, authority = server.certificate.read_bytes(), server.authority.read_bytes()
    renew_certificate(server)
    assert server.certificate.read_bytes() != before
    assert server.authority.read_bytes() == authority
    assert check_certificates(server) == []
    server.check_private()


def test_a_new_host_is_in_the_certificate_beside_the_old_one(server: Deployment) -> None:
    config = server.folder / "server.toml"
    config.write_text(config.read_text().replace("fleet = 9092", "fleet = 4092  # ours"))
    done = CliRunner().invoke(app, ["renew", str(server.folder), "--host", "new.example.org"])
    assert done.exit_code == 0, done.exception
    renamed = Deployment.load(server.folder)
    assert (renamed.host, renamed.fleet_port) == ("new.example.org", 4092)
    assert "# ours" in config.read_text()
    assert check_certificates(renamed) == []
    both = {"new.example.org", "fedtide.example.org", "localhost", "127.0.0.1"}
    assert set(names_of(loaded(server.certificate))) == both
    renew_certificate(renamed, "2001:db8::7")
    renew_certificate(Deployment.load(server.folder))
    assert set(names_of(loaded(server.certificate))) == both | {"2001:db8::7"}
    before = config.read_bytes(), server.certificate.read_bytes()
    with pytest.raises(DeploymentError, match="is no name"):
        renew_certificate(server, "no name")
    assert (config.read_bytes(), server.certificate.read_bytes()) == before


def test_a_new_authority_cuts_off_no_site_at_any_step(server: Deployment) -> None:
    """Sites that have the old ca.crt, and sites that have the one of each step, before and after they are given it."""
    old = server.authority.read_bytes()
    assert not begin_authority(server)
    both = server.authority.read_bytes()
    assert len(authorities(server.authority)) == 2
    assert check_certificates(server) == []
    server.check_private()
    assert stat.S_IMODE(server.next_authority_key.stat().st_mode) == 0o600
    renew_certificate(server)  # before the switch a new certificate is one that all sites take
    assert accepted(server, old)
    assert accepted(server, both)
    with pytest.raises(DeploymentError, match=r"was made already: .*--switch"):
        begin_authority(server)
    with pytest.raises(DeploymentError, match=r"under the old authority: .*--switch"):
        drop_authority(server)

    switch_authority(server)
    assert check_certificates(server) == []
    assert not server.next_authority_key.exists()
    assert accepted(server, both)
    assert accepted(server, server.authority.read_bytes())
    assert not accepted(server, old)  # the step that needs every site to have the new ca.crt
    with pytest.raises(DeploymentError, match="no new authority waits"):
        switch_authority(server)
    renew_certificate(server)
    assert accepted(server, both)

    assert drop_authority(server) == 1
    (left,) = authorities(server.authority)
    assert left not in x509.load_pem_x509_certificates(old)
    assert accepted(server, server.authority.read_bytes())
    assert accepted(server, both)
    assert check_certificates(server) == []


def test_the_old_authority_is_kept_while_the_server_that_is_up_shows_a_certificate_of_it(
    server: Deployment, tmp_path: Path
) -> None:
    old = tmp_path / "old.crt", tmp_path / "old.key"
    for source, kept in zip((server.certificate, server.key), old, strict=True):
        shutil.copy(source, kept)
    begin_authority(server)
    switch_authority(server)
    with open_locked(server.folder / "up.lock") as mine:
        assert mine
        with shown(*old) as port, pytest.raises(DeploymentError, match="restart `fedtide server up` first"):
            drop_authority(replace(server, control_port=port))
        with pytest.raises(NotRunningError, match="wait a minute"):
            drop_authority(replace(server, control_port=port))  # nobody listens there any more
        assert len(authorities(server.authority)) == 2
        with shown(server.certificate, server.key) as port:
            assert drop_authority(replace(server, control_port=port)) == 1


def test_the_old_authority_near_its_end_is_said_until_the_switch(server: Deployment) -> None:
    authority = dated(-300, 10)
    put(server, authority, dated(-300, 10, authority))
    assert "--authority`" in check_certificates(server)[0]
    begin_authority(server)
    assert "--switch`" in check_certificates(server)[0]
    switch_authority(server)
    assert check_certificates(server) == []


def test_an_authority_that_expired_before_the_switch_is_switched_from(server: Deployment) -> None:
    authority = dated(-300, -1)
    _, key = new_authority()
    put(server, authority, dated(-300, 10, authority))
    new, key = new_authority()
    server.authority.write_bytes(authority.pem + new)
    server.next_authority_key.write_bytes(key)
    server.next_authority_key.chmod(0o600)
    with pytest.raises(DeploymentError, match="--switch`"):
        renew_certificate(server)
    with pytest.raises(DeploymentError, match="--switch`"):
        check_certificates(server)
    switch_authority(server)
    assert check_certificates(server) == []
    assert accepted(server, new)
    assert server.authority.read_bytes() == new


def test_a_step_that_was_cut_off_can_be_taken_again(
    server: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is ended before each of its writes, and then goes on by the command that its message names."""
    from server import renewal

    real, left = renewal._put, [0]

    def dying(path: Path, data: bytes, mode: int) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, data, mode)

    monkeypatch.setattr(renewal, "_put", dying)
    for writes in range(2):
        left[0] = writes
        with pytest.raises(KeyboardInterrupt):
            begin_authority(server)
        assert check_certificates(server) == []
    left[0] = 99
    begin_authority(server)
    both = server.authority.read_bytes()
    for writes in range(3):
        left[0] = writes
        with pytest.raises(KeyboardInterrupt):
            switch_authority(server)
        left[0] = 99
        if writes == 1:  # the new key beside the old certificate
            with pytest.raises(DeploymentError, match=r"renew .*copy` makes a new one"):
                check_certificates(server)
        renew_certificate(server)
        assert check_certificates(server) == []
        assert accepted(server, both)
        if not server.next_authority_key.exists():
            break
    assert writes == 2
    assert drop_authority(server) == 1


def test_a_key_of_no_authority_is_named(server: Deployment) -> None:
    server.authority_key.write_bytes(new_authority()[1])
    with pytest.raises(DeploymentError, match=r"is the key of no authority in ca\.crt"):
        renew_certificate(server)
    server.authority_key.write_bytes(b"none")
    with pytest.raises(DeploymentError, match="holds no key that can be read"):
        begin_authority(server)


def test_the_commands_say_each_step_and_take_one_at_a_time(server: Deployment) -> None:
    def run(*options: str) -> str:
        done = CliRunner().invoke(app, ["renew", str(server.folder), *options])
        assert done.exit_code == 0, done.exception
        return done.output

    assert f"renew {server.folder} --switch`" in run("--authority")
    assert "is cut off until it has" in run("--switch")
    assert "1 less" in run("--drop")
    both = CliRunner().invoke(app, ["renew", str(server.folder), "--authority", "--switch"])
    assert "give one of them" in str(both.exception)
