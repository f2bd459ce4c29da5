"""Whether a site's certificate of withdrawal holds: by itself, and against a server's copy of the site's chain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.privacy.certificates import LONGEST_CERTIFICATE, ClosingCertificate
from common.privacy.enrolment import fingerprint
from common.privacy.entries import Genesis
from common.privacy.faults import ReceiptError, TruncatedError, UnknownKeyError, WrongGenesisError
from server.registry import RegistryReader


@dataclass(frozen=True, slots=True)
class CertificateFinding:
    """What was found.

    Attributes:
        file: its name.
        reason, explanation: of the first fault; None where everything holds.
        certificate: as read; None where it cannot be.
        site: the name under which a registry enrolled the key; None where none was asked.
        held: sequence number of the last entry that the registry holds.
    """

    file: str
    reason: str | None = None
    explanation: str | None = None
    certificate: ClosingCertificate | None = None
    site: str | None = None
    held: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The same in plain values; figures only where the certificate verifies."""
        found: dict[str, Any] = {
            "file": self.file,
            "verified": self.reason is None,
            "reason": self.reason,
            "explanation": self.explanation,
        }
        if (
            self.reason is None
            and (it := self.certificate) is not None
            and isinstance(it.genesis.body, Genesis)
        ):
            genesis, close = it.genesis.body, it.close
            found |= {
                "key_id": it.genesis.key_id,
                "fingerprint": fingerprint(it.genesis.key_id),
                "begun": genesis.day,
                "withdrawn": close.day,
                "unit": genesis.unit,
                "adjacency": genesis.adjacency,
                "order": genesis.order,
                "spent": close.spent,
                "cap": genesis.cap,
                "delta": genesis.delta,
                "epsilon_promised": genesis.epsilon,
                "epsilon_at_most": it.epsilon_bound(),
                "closing_entry": it.entries[-1].seq,
                "entries": len(it.entries),
                "site": self.site,
                "registry_holds_up_to": self.held,
                "in_words": it.in_words(),
            }
        return found


def audit_certificate(file: Path, registry: Path | None = None) -> CertificateFinding:
    """Checks a certificate; what does not hold is in the finding.

    Args:
        file: of the certificate.
        registry: folder of a server's registry: the key must be enrolled there and not barred, and the closing entry
            must extend what that server holds.

    Raises:
        UserError: there is no such file.
        RegistryError: there is no registry in the folder.
    """
    reader = None if registry is None else RegistryReader(registry)
    found = CertificateFinding(file.name)
    try:
        with file.open("rb") as opened:
            data = opened.read(
                2 * LONGEST_CERTIFICATE + 1
            )  # one byte more than is looked at is refused as too long
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): give the file that `fedtide site withdraw` wrote"
        ) from error
    try:
        certificate = ClosingCertificate.from_bytes(data)
        found = replace(found, certificate=certificate)
        certificate.verify()
        if reader is not None:
            found = _against(reader, certificate, found)
    except ReceiptError as error:
        found = replace(found, reason=error.reason, explanation=str(error))
    return found


def _against(
    reader: RegistryReader, certificate: ClosingCertificate, found: CertificateFinding
) -> CertificateFinding:
    """The finding, with what the registry knows.

    Raises:
        ReceiptError: the key is not enrolled or is barred, or the certificate does not extend the chain held.
    """
    key_id = certificate.genesis.key_id
    site = reader.site(key_id)
    if site is None:
        raise UnknownKeyError(f"the key {key_id[:16]} is not enrolled in this registry")
    chain = reader.chain(key_id)
    if site.barred:
        raise UnknownKeyError(
            f"the key of {site.name} is barred: it signed two histories, so its certificate proves nothing"
        )
    if certificate.genesis.hash != chain.entries[0].hash:
        raise WrongGenesisError(
            f"the certificate belongs to another ledger than the one enrolled as {site.name}"
        )
    if chain.head.seq >= certificate.entries[-1].seq and not chain.closed:
        raise TruncatedError(
            f"the certificate ends at entry {certificate.entries[-1].seq}, but the registry holds the chain of "
            f"{site.name} up to {chain.head.seq}: it closes another history"
        )
    chain.extended(certificate.entries)
    return replace(found, site=site.name, held=chain.head.seq)
