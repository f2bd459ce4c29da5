"""What a stranger is shown: the corpora's items as bytes, and the process that judges them without our code."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.privacy import canonical, faults
from common.privacy.chain import Chain
from common.privacy.entries import Entry
from common.privacy.equivocation import EquivocationProof
from common.privacy.faults import ReceiptError
from common.privacy.receipts import Receipt, Request
from tests.common.privacy import bad_certificates
from tests.common.privacy import bad_receipts as corpus

ROOT = Path(__file__).parents[3]
VERIFIER = ROOT / "docs" / "verify_receipt.py"
OF_FORM = {
    each.reason
    for each in vars(canonical).values()
    if isinstance(each, type) and issubclass(each, ReceiptError)
}
OF_FORM -= {ReceiptError.reason}
"""Faults of canonical form, which a stranger calls by one name."""

KNOWN = {
    each.reason for each in vars(faults).values() if isinstance(each, type) and issubclass(each, ReceiptError)
}
"""Names that docs/formats.md gives to faults of statements."""

Item = dict[str, Any]


def text(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def whole(entries: Sequence[Entry | bytes]) -> list[str | None]:
    return [text(each if isinstance(each, bytes) else each.to_bytes()) for each in entries]


def of_chain(
    entries: Sequence[Entry | bytes], heads: dict[int, str] | None = None, key_id: str | None = None
) -> Item:
    return {"kind": "chain", "entries": whole(entries), "heads": heads or {}, "key_id": key_id}


def of_receipt(
    data: bytes, released: bytes | None = None, request: Request | None = None, held: Chain | None = None
) -> Item:
    asked = {
        name: str(getattr(request, name))
        for name in ("run", "round", "nonce", "plan_hash", "model_hash", "attempt")
        if getattr(request, name, None) is not None
    }
    found = {"kind": "receipt", "data": text(data), "released": text(released), "request": asked}
    return found | {"entries": whole(held.entries if held else [])}


def of_certificate(data: bytes) -> Item:
    return {"kind": "certificate", "data": text(data)}


def judged(folder: Path, items: dict[str, Item], verifier: Path = VERIFIER) -> dict[str, str]:
    """What the verifier says of each item, in a process of its own that can import nothing of ours."""
    file = folder / "items.json"
    file.write_text(json.dumps([{"name": name, **item} for name, item in items.items()]))
    command = [sys.executable, "-I", str(Path(__file__).with_name("stranger.py")), str(verifier), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["shut"], "our code could be imported"
    assert not found["ours"]
    assert set(found["others"]) <= {"cryptography", "_cffi_backend", "_openssl", "stranger"}, found["others"]
    told: dict[str, str] = found["told"]
    return told


@contextmanager
def shown(seen: list[Item]):  # type: ignore[no-untyped-def]
    """Within, what the corpus gives to our verifiers is noted as bytes, and goes on to them."""

    def noting(real: Callable[..., Any], item: Callable[..., Item]) -> Callable[..., Any]:
        def noted(*arguments: Any, **more: Any) -> Any:
            seen.append(item(*arguments, **more))
            return real(*arguments, **more)

        return noted

    def raw_chain(statements: list[Any]) -> Item:
        return of_chain(
            [json.dumps(each, sort_keys=True, separators=(",", ":")).encode() for each in statements]
        )

    def proof(it: EquivocationProof, key: str) -> Item:
        return {"kind": "equivocation", "data": text(it.to_bytes()), "key": key}

    with pytest.MonkeyPatch.context() as patch:
        for place, name, item in (
            (corpus, "read", raw_chain),
            (
                corpus,
                "verify_chain",
                lambda entries, anchored_heads=None, key_id=None: of_chain(entries, anchored_heads, key_id),
            ),
            (bad_certificates, "read_certificate", of_certificate),
            (
                corpus,
                "check_receipt",
                lambda receipt, update, request, chain: of_receipt(
                    receipt.to_bytes(), update, request, chain
                ),
            ),
            (
                corpus,
                "check_receipt_alone",
                lambda receipt, update=None: of_receipt(receipt.to_bytes(), update),
            ),
            (EquivocationProof, "verify", proof),
        ):
            patch.setattr(place, name, noting(getattr(place, name), item))
        patch.setattr(Receipt, "from_bytes", noting(Receipt.from_bytes, of_receipt))
        yield


def of_corpus() -> dict[str, tuple[str, Item]]:
    """Each bad receipt of the corpus: its reason, and what a stranger is shown of it."""
    found = {}
    for name, (reason, case) in bad_certificates.CASES.items():
        seen: list[Item] = []
        with shown(seen), pytest.raises(ReceiptError):
            case()
        assert seen, f"{name} shows a stranger nothing"
        found[name] = (reason, seen[-1])
    return found


def fault(reason: str) -> str:
    """What docs/formats.md calls it."""
    return "not_canonical" if reason in OF_FORM else reason
