"""`fedtide audit certificate`: a real ledger's certificate holds by itself and against a server; each lie is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.ledger import Ledger
from client.ledger_reading import Reservation
from common.cli import UserError
from common.privacy.certificates import ClosingCertificate
from common.privacy.enrolment import fingerprint
from common.privacy.entries import Burnt, Close, Entry, Reserve
from common.privacy.equivocation import EquivocationProof
from common.privacy.mechanisms import GaussianSum
from server.registry import Registry
from simulations.audit.cli import app
from tests.common.privacy.bad_certificates import certificate_of, closed
from tests.common.privacy.honest_chain import Writer

EVENT = GaussianSum(6.0)


def reserve(ledger: Ledger, round_: int) -> Reservation:
    return ledger.reserve(
        run="run-a",
        round=round_,
        attempt=0,
        event=EVENT,
        plan_hash="a" * 64,
        model_hash="b" * 64,
        nonce=f"{round_:032x}",
        clip_norm=1.0,
        normaliser=1.0,
    )


def release(ledger: Ledger, round_: int, registry: Registry | None = None) -> None:
    receipt = ledger.release(reserve(ledger, round_), b"sums")
    if registry is not None:
        registry.accept(registry.chain(ledger.key_id).extended(receipt.entries))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger", epsilon=8, delta=1e-5, typical_plan=[EVENT])


@pytest.fixture
def registry(tmp_path: Path, ledger: Ledger) -> Registry:
    """Of a server that saw two rounds; the site got its countersignature of the first."""
    found = Registry(tmp_path / "registry")
    found.enroll("north", ledger.entries()[0])
    release(ledger, 1, found)
    anchor = found.last_anchor(ledger.key_id)
    assert anchor is not None
    ledger.anchor(anchor)
    release(ledger, 2, found)
    return found


def command(file: Path, *more: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["certificate", str(file), *map(str, more)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def refused(file: Path, *more: object) -> str:
    code, shown = command(file, *more, "--json")
    found = json.loads(shown)
    assert (code, found["verified"]) == (1, False)
    assert command(file, *more)[1].startswith(f"FAULT {found['reason']} in {file.name}: ")
    return str(found["reason"])


def written(folder: Path, certificate: ClosingCertificate) -> Path:
    file = folder / "closing.json"
    file.write_bytes(certificate.to_bytes())
    return file


def test_a_certificate_holds_alone_and_against_the_server(
    tmp_path: Path, ledger: Ledger, registry: Registry
) -> None:
    reserve(ledger, 3)  # burns as the site withdraws, unseen by the server
    file = written(tmp_path, ledger.withdraw())
    code, shown = command(file)
    assert code == 0, shown
    assert fingerprint(ledger.key_id) in shown
    assert "--registry DIR" in shown
    code, shown = command(file, "--registry", tmp_path / "registry")
    assert code == 0, shown
    assert "enrolled this key as north, holds its chain up to entry 5" in shown
    found = json.loads(command(file, "--registry", tmp_path / "registry", "--json")[1])
    status = ledger.status()
    assert (found["spent"], found["cap"]) == (status.spent, status.cap)
    assert (found["site"], found["registry_holds_up_to"], found["closing_entry"]) == ("north", 5, 8)
    assert found["reason"] is None
    registry.accept(
        registry.chain(ledger.key_id).extended(ClosingCertificate.from_bytes(file.read_bytes()).entries)
    )
    assert command(file, "--registry", tmp_path / "registry")[0] == 0  # the server has it by now


def test_words_that_were_changed_are_refused(tmp_path: Path, ledger: Ledger) -> None:
    file = written(tmp_path, ledger.withdraw())
    file.write_text(file.read_text().replace("It spent 0 of", "It spent 1 of"))
    assert refused(file) == "wrong_words"


def _of_another_site(ledger: Ledger) -> ClosingCertificate:
    return certificate_of(closed(), 1)


def _without_what_the_server_saw(ledger: Ledger) -> ClosingCertificate:
    """The site goes back to before its last round and withdraws: its own key signs a smaller total."""
    old = ledger.entries()[:2]
    reserved = old[1].body
    assert isinstance(reserved, Reserve)
    writer = Writer(ledger._key)  # the attacker is the site
    writer.entries, writer.genesis = old, ledger.genesis
    writer.add(Burnt(old[1].hash))
    writer.add(Close(reserved.spent, reserved.day))
    return certificate_of(writer, 1)


def _with_entries_withheld(ledger: Ledger) -> ClosingCertificate:
    reserve(ledger, 3)
    whole = ledger.withdraw()
    return ClosingCertificate(whole.genesis, whole.entries[-1:])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_of_another_site, "unknown_key"),
        (_without_what_the_server_saw, "truncated"),
        (_with_entries_withheld, "detached_segment"),
    ],
)
def test_a_certificate_that_does_not_extend_what_the_server_saw_is_refused(
    tmp_path: Path,
    ledger: Ledger,
    registry: Registry,
    make: Callable[[Ledger], ClosingCertificate],
    reason: str,
) -> None:
    """Each verifies alone: only who holds the chain can tell."""
    file = written(tmp_path, make(ledger))
    assert command(file)[0] == 0
    assert refused(file, "--registry", tmp_path / "registry") == reason


def test_another_history_is_refused_and_so_is_a_key_that_signed_two(
    tmp_path: Path, ledger: Ledger, registry: Registry
) -> None:
    entries = ledger.entries()
    other = Entry.sign(ledger._key, seq=5, prev=entries[4].hash, body=entries[3].body)
    file = written(tmp_path, ledger.withdraw())
    assert command(file, "--registry", tmp_path / "registry")[0] == 0
    registry.bar(ledger.key_id, EquivocationProof(entries[5], other))
    assert refused(file, "--registry", tmp_path / "registry") == "unknown_key"


def test_what_is_no_certificate_is_told_plainly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fedtide site withdraw"):
        CliRunner().invoke(app, ["certificate", str(tmp_path / "none.json")], catch_exceptions=False)
    file = tmp_path / "other.json"
    for data, reason in ((b"\xff", "non_ascii"), (b"[]", "malformed_entry"), (b"{}", "malformed_entry")):
        file.write_bytes(data)
        assert refused(file) == reason
