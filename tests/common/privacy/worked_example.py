"""The worked example of docs/formats.md, made by the code with test keys: `python -m` this writes it into the page."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from common.privacy.certificates import ClosingCertificate
from common.privacy.entries import Burnt, Close
from common.privacy.mechanisms import GaussianSum, PoissonSubsampledGaussian
from common.privacy.receipts import Receipt
from tests.common.privacy.honest_chain import SERVER, SITE, Writer, digest

PAGE = Path(__file__).parents[3] / "docs" / "formats.md"
UPDATE = save({"sums": np.array([1.5, -0.25], dtype=np.float32)})
_BLOCK = re.compile(r"(<!-- example: ([a-z -]+) -->\n```[a-z]*\n)(.*?)(\n```)", re.DOTALL)


def ledger(*, anchored: bool = True) -> Writer:
    """One entry of every kind: 0 genesis, 1-2 statistics, 3 anchor, 4-5 an update that burnt, 6 close."""
    site = Writer(SITE)
    body = site.reserve_body("example", 1, 1, event=GaussianSum(6.0))
    plan, model = digest(b"the plan"), digest(b"the model")
    site.add(replace(body, plan_hash=plan, model_hash=model, normaliser=1.0))
    site.release(site.entries[1], UPDATE, content="statistics")
    if anchored:
        site.anchor(2)
    site.spent = body.spent
    body = site.reserve_body("example", 2, 1, event=PoissonSubsampledGaussian(0.05, 1.0, 10))
    burns = site.add(replace(body, plan_hash=plan, model_hash=model))
    site.spent = body.spent
    site.add(Burnt(burns.hash))
    site.add(Close(site.spent, "2026-01-04"))
    return site


def receipt() -> Receipt:
    site = ledger()
    return Receipt(site.entries[0], tuple(site.entries[1:3]))


def certificate() -> ClosingCertificate:
    site = ledger()
    return ClosingCertificate(site.entries[0], tuple(site.entries[3:]))


def blocks() -> dict[str, str]:
    """Each block of the page by its name."""
    site = ledger()
    lines = [entry.to_bytes().decode() for entry in site.entries]
    words = certificate().to_bytes().decode().split('  "signed": {')[0]
    facts = {
        "site's private key": SITE.private_bytes_raw().hex(),
        "site's public key": site.genesis.public_key,
        "site's key id": site.entries[0].key_id,
        "server's private key": SERVER.private_bytes_raw().hex(),
        "released bytes": UPDATE.hex(),
    }
    sums = {
        "receipt": receipt().to_bytes(),
        "countersignature": site.countersigned(2).to_bytes(),
        "certificate": certificate().to_bytes(),
    }
    unsigned = re.sub(r',"signature":"[0-9a-f]{128}"', "", lines[0])
    return {
        "keys": "\n".join(f"{name + ':':22}{value}" for name, value in facts.items()),
        "signed bytes": unsigned,
        "entries": "\n".join(lines),
        "hashes": "\n".join(f"{entry.seq}  {entry.kind:8}{entry.hash}" for entry in site.entries),
        "countersignature": sums["countersignature"].decode(),
        "certificate": words + '  "signed": { ...',
        "files": "\n".join(
            f"{name:18}{len(data):5} bytes  sha256 {hashlib.sha256(data).hexdigest()}"
            for name, data in sums.items()
        ),
    }


def in_page(text: str) -> dict[str, str]:
    """The blocks as the page has them."""
    return {found[2]: found[3] for found in _BLOCK.finditer(text)}


def main() -> None:
    """Writes the blocks into the page."""
    made = blocks()
    PAGE.write_text(_BLOCK.sub(lambda it: it[1] + made[it[2]] + it[4], PAGE.read_text()))


if __name__ == "__main__":
    main()
