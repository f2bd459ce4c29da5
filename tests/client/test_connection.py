"""A site's connection: made whole, private, in the enrolment file; refused when it is loose or wrong."""

from __future__ import annotations

import configparser
import hashlib
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from client.agent import Agent, AgentError, alone
from client.cli import app
from client.connection import (
    Connection,
    ConnectionSetupError,
    invitation_of,
    new_node_key,
    own_network,
    write_connection,
)
from client.private_files import LoosePermissionsError
from client.server_key import SERVER_KEY, NoServerKeyError, trusted_key
from client.site_folder import Site
from common.cli import known_errors
from common.invitation import Invitation
from common.privacy.canonical import encode
from common.privacy.enrolment import enrolment_from_bytes, enrolment_node_key, node_fingerprint
from common.privacy.faults import ReceiptError
from tests.tiny import tiny_files, tiny_language_model, tiny_plan


def authority(file: Path) -> Path:
    """A new certificate authority's certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    file.write_bytes(certificate.public_bytes(Encoding.PEM))
    return file


def invited(ca: bytes, host: str = "localhost", port: int = 9092) -> Invitation:
    """By a new server with this authority."""
    return Invitation(host, port, ca, Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex())


def invitation(file: Path, host: str = "localhost", port: int = 9092, ca: bytes = b"") -> Path:
    """The file of a new server's invitation."""
    ca = ca or authority(file.with_suffix(".crt")).read_bytes()
    file.write_bytes(invited(ca, host, port).to_bytes() + b"\n")
    return file


def connected(folder: Path, given: Invitation) -> None:
    """Gives a folder the connection of a site, and nothing else of one."""
    write_connection(folder, given)
    new_node_key(folder)


def init(folder: Path, data: Path, *more: object) -> Result:
    log, catalog = tiny_files(data)
    plan = data / "plan.json"
    plan.write_text(tiny_plan(data / "no-model-needed").to_json())
    options = ["--logs", log, "--catalog", catalog, "--epsilon", 8, "--delta", 1e-5, "--users-at-least", 100]
    arguments = ["init", folder, *options, "--typical-plan", plan, *more]
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_a_site_with_a_server_is_made_whole(tmp_path: Path) -> None:
    model = tiny_language_model(tmp_path / "language-model")
    file = invitation(tmp_path / "invitation.json", "::1")
    made = init(
        tmp_path / "north", tmp_path / "data",
        "--invitation", file, "--language-model", f"tiny={model}", "--metrics",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    folder = tmp_path / "north"
    connection = Connection.load(folder)
    assert (connection.address, connection.host) == ("[::1]:9092", "::1")
    given = Invitation.from_bytes(file.read_bytes())
    assert connection.authority.read_bytes() == (tmp_path / "invitation.crt").read_bytes()
    assert trusted_key(folder) == given.signing_key
    assert invitation_of(connection) == given
    assert given.digest == hashlib.sha256(file.read_bytes().strip()).hexdigest()
    assert given.digest in made.output.replace(" ", "")
    assert stat.S_IMODE(connection.node_key.stat().st_mode) == 0o600
    assert isinstance(connection.private_key().curve, ec.SECP384R1)
    data = (folder / "enrolment.json").read_bytes()
    key = enrolment_node_key(data)
    assert key == (folder / "node.pub").read_text().strip()
    assert enrolment_from_bytes(data).key_id in made.output.replace(" ", "").replace("\n", "")
    assert node_fingerprint(str(key)).replace(" ", "") in made.output.replace(" ", "").replace("\n", "")
    assert "fedtide site check" in made.output
    site = Site.load(folder)
    assert site.metrics
    assert site.limits.language_models == {"all-MiniLM-L6-v2": "", "tiny": str(model)}
    compose = yaml.safe_load((folder / "units" / "compose.yaml").read_text())
    assert compose["services"]["fedtide-site"]["command"][:3] == ["fedtide", "site", "up"]
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(folder / "units" / "fedtide-site.service")
    assert str(folder) in unit["Service"]["ExecStart"]
    assert unit["Service"]["Restart"] == "always"
    assert unit["Service"]["WatchdogSec"] == "120"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--invitation", "nowhere.json"], "cannot be read"),
        (["--invitation", "KEY"], "holds no invitation"),
        (["--invitation", "CA"], "holds no invitation"),
        (["--language-model", "nameless"], "must read NAME=FOLDER"),
        (["--language-model", "tiny=/nowhere"], "no model folder /nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left(
    tmp_path: Path, more: list[str], says: str
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "KEY").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    authority(tmp_path / "CA")
    given = [str(tmp_path / each) if each in ("CA", "KEY") else each for each in more]
    result = init(tmp_path / "north", tmp_path / "data", *given)
    assert isinstance(result.exception, known_errors()), result.output
    assert says in str(result.exception)
    assert not (tmp_path / "north").exists()
    assert not [each for each in tmp_path.iterdir() if each.name.endswith(".partial")]


def test_a_loose_or_missing_key_is_refused_on_load(tmp_path: Path) -> None:
    options = ["--invitation", invitation(tmp_path / "invitation.json")]
    assert init(tmp_path / "north", tmp_path / "data", *options).exit_code == 0
    key = tmp_path / "north" / "node.key"
    key.chmod(0o640)
    with pytest.raises(LoosePermissionsError, match="chmod 600"):
        Connection.load(tmp_path / "north")
    key.unlink()
    with pytest.raises(ConnectionSetupError, match="restore it"):
        Connection.load(tmp_path / "north")


def test_a_site_without_a_server_says_how_to_get_one(tmp_path: Path) -> None:
    made = init(tmp_path / "north", tmp_path / "data", "--json")
    assert json.loads(made.output)["node_key"] is None
    assert not (tmp_path / "north" / "units").exists()
    with pytest.raises(ConnectionSetupError, match="--invitation FILE"):
        Connection.load(tmp_path / "north")


def connect(folder: Path, *more: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in ("connect", folder, *more)])


def test_a_new_node_key_leaves_the_ledger_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    one = invitation(tmp_path / "one.json", "one.example")
    assert init(folder, tmp_path / "data", "--invitation", one).exit_code == 0
    before = (folder / "enrolment.json").read_bytes()
    ledger = contents(folder / "ledger")
    said = connect(folder)
    assert said.exit_code == 0, said.output
    after = (folder / "enrolment.json").read_bytes()
    old, new = enrolment_node_key(before), enrolment_node_key(after)
    assert old is not None
    assert new is not None
    assert new != old
    assert node_fingerprint(new) in said.output
    assert enrolment_from_bytes(after) == enrolment_from_bytes(before)
    assert contents(folder / "ledger") == ledger
    assert invitation_of(Connection.load(folder)) == Invitation.from_bytes(one.read_bytes())
    assert stat.S_IMODE((folder / "node.key").stat().st_mode) == 0o600
    with alone(folder):
        refused = connect(folder)
    assert isinstance(refused.exception, AgentError)


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the journal's shared memory, which readers write, too."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(("-shm", "-wal"))
    }


def test_another_invitation_changes_where_the_server_is_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    one, two = (invitation(tmp_path / f"{name}.json", f"{name}.example", 7) for name in ("one", "two"))
    assert init(folder, tmp_path / "data", "--invitation", one).exit_code == 0
    before = contents(folder)
    said = connect(folder, "--invitation", two)
    assert said.exit_code == 0, said.output
    given = Invitation.from_bytes(two.read_bytes())
    assert given.digest in said.output.replace(" ", "")
    assert "by telephone" in said.output
    after = contents(folder)
    assert invitation_of(Connection.load(folder)) == given
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"connection.json", "ca.crt", SERVER_KEY, "up.lock"}
    with alone(folder):
        assert isinstance(connect(folder, "--invitation", one).exception, AgentError)
    assert contents(folder) == after


def test_a_folder_from_before_servers_signed_connects_after_that_one_step(tmp_path: Path) -> None:
    folder, file = tmp_path / "site", invitation(tmp_path / "invitation.json")
    assert init(folder, tmp_path / "data", "--invitation", file).exit_code == 0
    whole = contents(folder)
    (folder / SERVER_KEY).unlink()
    for refused in (lambda: Connection.load(folder), lambda: Agent(folder)):
        with pytest.raises(NoServerKeyError, match=r"fedtide site connect .* --invitation FILE"):
            refused()
    assert isinstance(connect(folder).exception, NoServerKeyError)
    assert connect(folder, "--invitation", file).exit_code == 0
    Connection.load(folder)
    Agent(folder)
    assert contents(folder) == whole | {"up.lock": b""}


def test_a_site_that_was_made_without_a_server_gets_a_node_key_with_its_first_invitation(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "site"
    assert init(folder, tmp_path / "data").exit_code == 0
    said = connect(folder, "--invitation", invitation(tmp_path / "invitation.json"))
    assert said.exit_code == 0, said.output
    key = enrolment_node_key((folder / "enrolment.json").read_bytes())
    assert node_fingerprint(str(key)) in said.output
    assert (folder / "units" / "fedtide-site.service").is_file()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", ""),
        ("host", "a b"),
        ("host", "http://here"),
        ("host", 'here" x="'),
        ("port", "0"),
        ("port", "65536"),
        ("port", "x"),
        ("signing_key", "ab"),
        ("signing_key", "Z" * 64),
        ("authority", []),
        ("authority", "AAAA"),
        ("authority", ["AAAA"]),
        ("authority", [["AAAA"]]),
        ("format", "fedtide/invitation/2"),
    ],
)
def test_what_is_no_invitation_is_refused(tmp_path: Path, field: str, value: object) -> None:
    fields = json.loads(invitation(tmp_path / "invitation.json").read_bytes())
    Invitation.from_bytes(encode(fields))
    with pytest.raises(ReceiptError):
        Invitation.from_bytes(encode({**fields, field: value}))
    del fields[field]
    with pytest.raises(ReceiptError):
        Invitation.from_bytes(encode(fields))


def test_a_proxy_never_stands_between_a_site_and_its_server() -> None:
    found = own_network({"NO_PROXY": "internal", "HTTPS_PROXY": "http://proxy"}, "server.example.org")
    for name in ("NO_PROXY", "no_proxy", "no_grpc_proxy"):
        assert {"internal", "127.0.0.1", "server.example.org"} <= set(found[name].split(","))
