"""A site's ca.crt: its own end is seen coming, and of an expired chain it is told which part has expired.

Servers on loopback show certificates of chosen dates; the site's real probe calls them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.authority import authority_end, authority_warning
from client.check import Finding, check_site
from client.cli import app
from client.connection import Connection, ConnectionSetupError
from client.making import SECRET
from client.probe import ProbeError, certificate
from common.events.deidentify import new_secret
from tests.client.test_connection import connected, init, invitation, invited
from tests.server.dated_certificates import Dated, dated, shown

OLD = dated(-3000, 0.9)
OLD_EXPIRED, NEW, COMING = dated(-3000, -1), dated(-1, 3000, name="the new authority"), dated(2, 900)


def site(folder: Path, port: int, *known: Dated) -> Connection:
    folder.mkdir(mode=0o700, exist_ok=True)
    new_secret(folder / SECRET)
    connected(folder, invited(b"".join(each.pem for each in known), "127.0.0.1", port))
    return Connection.load(folder)


@pytest.mark.parametrize(
    ("known", "issuer", "days", "said"),
    [
        ([NEW], NEW, (-1, 300), None),
        ([OLD, NEW], OLD, (-1, 300), None),
        ([OLD, NEW], NEW, (-1, 300), None),
        ([NEW, OLD_EXPIRED], NEW, (-1, 300), None),
        ([NEW], NEW, (-30, -1), r"^the server's certificate expired on .*fedtide server renew`$"),
        ([NEW], NEW, (1, 30), r"^the server's certificate is not valid before .*check this machine's clock"),
        ([OLD_EXPIRED], OLD_EXPIRED, (-30, 30), r"^the authority that signed .* expired on .*--authority`"),
        ([OLD_EXPIRED], OLD_EXPIRED, (-30, -1), r"^the authority that signed .* expired on .*--authority`"),
        ([OLD_EXPIRED, NEW], OLD_EXPIRED, (-30, 30), r"ca\.crt holds the next one.*--switch`"),
        ([COMING], COMING, (-1, 30), r"^the authority in ca\.crt is not valid before .*this machine's clock"),
        ([OLD], NEW, (-1, 300), r"does not come from ca\.crt: .*invitation of today"),
    ],
)
def test_what_has_expired_is_told(
    tmp_path: Path, known: list[Dated], issuer: Dated, days: tuple[float, float], said: str | None
) -> None:
    own = dated(*days, issuer, name="server")
    own.put(tmp_path / "server.crt", tmp_path / "server.key")
    with shown(tmp_path / "server.crt", tmp_path / "server.key") as port:
        connection = site(tmp_path / "site", port, *known)
        if said is None:
            assert certificate(connection) == own.certificate.not_valid_after_utc
            return
        with pytest.raises(ProbeError, match=said):
            certificate(connection)


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([NEW], ""),
        ([dated(-1, 30.5)], ""),
        ([dated(-1, 29.5)], "in 29 days, and no server is trusted then: ask"),
        ([OLD_EXPIRED], "expired on"),
        ([OLD_EXPIRED, NEW], ""),
        ([NEW, dated(-1, 3)], ""),
    ],
)
def test_the_authoritys_own_end_is_said_before_it_comes(
    tmp_path: Path, known: list[Dated], said: str
) -> None:
    connection = site(tmp_path / "site", 1, *known)
    warning = authority_warning(connection.folder)
    assert said in warning
    assert bool(said) == bool(warning)
    latest = max(each.certificate.not_valid_after_utc for each in known)
    assert authority_end(connection.authority) == latest
    (found,) = (each for each in check_site(connection.folder) if each.name == "authority")
    assert found.holds is not bool(said)
    assert bool(found.way_out) == bool(said)


def test_a_site_without_a_server_is_not_warned_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert authority_warning(tmp_path) == ""
    (tmp_path / "ca.crt").write_text("nothing")
    assert "holds no certificate" in authority_warning(tmp_path)
    with pytest.raises(ConnectionSetupError, match="holds no certificate"):
        authority_end(tmp_path / "ca.crt")


def test_check_names_the_expired_authority_and_tests_nothing_behind_it(tmp_path: Path) -> None:
    dated(-30, 30, OLD_EXPIRED).put(tmp_path / "server.crt", tmp_path / "server.key")
    with shown(tmp_path / "server.crt", tmp_path / "server.key") as port:
        connection = site(tmp_path / "site", port, OLD_EXPIRED)
        found: dict[str, Finding] = {each.name: each for each in check_site(connection.folder)}
    assert found["server reached"].holds
    assert "authority that signed" in found["certificate"].said
    assert "--authority" in found["certificate"].way_out
    assert found["clock"].holds is None


def test_status_says_the_authoritys_end(tmp_path: Path) -> None:
    given = invitation(tmp_path / "invitation.json", ca=dated(-1, 9.5).pem)
    made = init(tmp_path / "north", tmp_path / "data", "--invitation", given)
    assert made.exit_code == 0, made.output

    def status(*options: str) -> str:
        return CliRunner().invoke(app, ["status", str(tmp_path / "north"), *options]).output

    assert "Warning: the server's authority in ca.crt ends on" in status()
    (warning,) = json.loads(status("--json"))["warnings"]
    assert "in 9 days" in warning
    (tmp_path / "north" / "ca.crt").write_bytes(NEW.pem)
    assert "Warning" not in status()
    assert json.loads(status("--json"))["warnings"] == []
