"""A site's connection: made whole, private, in the enrolment file; refused when it is loose or wrong."""

from __future__ import annotations

import configparser
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
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from client.agent import AgentError, alone
from client.cli import app
from client.connection import Connection, ConnectionSetupError, own_network, parse_server
from client.private_files import LoosePermissionsError
from client.site_folder import Site
from common.cli import known_errors
from common.privacy.enrolment import enrolment_from_bytes, enrolment_node_key, node_fingerprint
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


def init(folder: Path, data: Path, *more: object) -> Result:
    log, catalog = tiny_files(data)
    plan = data / "plan.json"
    plan.write_text(tiny_plan(data / "no-model-needed").to_json())
    options = ["--logs", log, "--catalog", catalog, "--epsilon", 8, "--delta", 1e-5, "--users-at-least", 100]
    arguments = ["init", folder, *options, "--typical-plan", plan, *more]
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_a_site_with_a_server_is_made_whole(tmp_path: Path) -> None:
    model = tiny_language_model(tmp_path / "language-model")
    ca = authority(tmp_path / "ca.crt")
    made = init(
        tmp_path / "north", tmp_path / "data",
        "--server", "[::1]:9092", "--ca", ca, "--language-model", f"tiny={model}", "--metrics",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    folder = tmp_path / "north"
    connection = Connection.load(folder)
    assert (connection.address, connection.host) == ("[::1]:9092", "::1")
    assert connection.authority.read_bytes() == ca.read_bytes()
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


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--server", "here:9092"], "--server and --ca go together"),
        (["--server", "here", "--ca", "CA"], "must read HOST:PORT"),
        (["--server", "here:99999", "--ca", "CA"], "a port is 1 to 65535"),
        (["--server", "here:9092", "--ca", "nowhere.crt"], "cannot be read"),
        (["--server", "here:9092", "--ca", "KEY"], "holds no certificate"),
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
    options = ["--server", "localhost:9092", "--ca", authority(tmp_path / "ca.crt")]
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
    with pytest.raises(ConnectionSetupError, match="--server HOST:PORT"):
        Connection.load(tmp_path / "north")


def test_a_new_node_key_leaves_the_ledger_as_it_is(tmp_path: Path) -> None:
    ca, folder = authority(tmp_path / "ca.crt"), tmp_path / "site"
    assert init(folder, tmp_path / "data", "--server", "one.example:9092", "--ca", ca).exit_code == 0
    before = (folder / "enrolment.json").read_bytes()
    ledger = {file: file.read_bytes() for file in (folder / "ledger").rglob("*.key")}
    said = CliRunner().invoke(app, ["connect", str(folder)])
    assert said.exit_code == 0, said.output
    after = (folder / "enrolment.json").read_bytes()
    old, new = enrolment_node_key(before), enrolment_node_key(after)
    assert old is not None
    assert new is not None
    assert new != old
    assert node_fingerprint(new) in said.output
    assert enrolment_from_bytes(after) == enrolment_from_bytes(before)
    assert {file: file.read_bytes() for file in (folder / "ledger").rglob("*.key")} == ledger
    assert Connection.load(folder).address == "one.example:9092"
    assert stat.S_IMODE((folder / "node.key").stat().st_mode) == 0o600
    other = authority(tmp_path / "other.crt")
    assert (
        CliRunner()
        .invoke(app, ["connect", str(folder), "--server", "two.example:1", "--ca", str(other)])
        .exit_code
        == 0
    )
    assert Connection.load(folder).address == "two.example:1"
    assert (folder / "ca.crt").read_bytes() == other.read_bytes()
    with alone(folder):
        refused = CliRunner().invoke(app, ["connect", str(folder)])
    assert isinstance(refused.exception, AgentError)
    assert Connection.load(folder).address == "two.example:1"


def test_addresses() -> None:
    assert parse_server("fedtide.example.org:9092") == ("fedtide.example.org", 9092)
    for bad in ("", ":9092", "a b:1", "http://here:9092", "here:", "here:x", "here:0"):
        with pytest.raises(ConnectionSetupError):
            parse_server(bad)


def test_a_proxy_never_stands_between_a_site_and_its_server() -> None:
    found = own_network({"NO_PROXY": "internal", "HTTPS_PROXY": "http://proxy"}, "server.example.org")
    for name in ("NO_PROXY", "no_proxy", "no_grpc_proxy"):
        assert {"internal", "127.0.0.1", "server.example.org"} <= set(found[name].split(","))
