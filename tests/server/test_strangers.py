"""Bad replies before docs/verify_receipt.py: what a server leaves out for its receipt, a stranger refuses too."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord

from tests.common.privacy.strangers_items import KNOWN, OF_FORM, Item, fault, judged, of_receipt
from tests.server import bad_replies as corpus

UNSEEN = {
    "not_finite",  # what the released numbers are is no matter of receipts
    "all_zero",
    "over_norm",
    "wrong_shape",
    "wrong_tensors",
    "malformed",
    "wrong_mechanism",  # another noise, norm or constant than the plan's: takes the plan
    "second_update",  # takes the server's list of whom it has heard already
    "not_enrolled",  # as before; against the chain held it is wrong_genesis
}
"""Reasons that lie outside receipts."""


def test_each_receipt_that_a_server_refuses_is_refused_by_a_stranger(tmp_path: Path) -> None:
    items, reasons = dict[str, Item](), dict[str, str]()
    for number, (name, (reason, _, case)) in enumerate(corpus.CASES.items()):
        scene = corpus.scene(tmp_path / str(number))
        content = case(scene)
        receipt, update = content.get("receipt"), content.get("update")
        if not isinstance(receipt, ConfigRecord) or not isinstance(receipt.get("entries"), bytes):
            assert reason not in KNOWN | OF_FORM, name
            continue
        released = update["tensors"].data if isinstance(update, ArrayRecord) and "tensors" in update else None
        held = scene.registry.chain(scene.key_id)
        items[name], reasons[name] = of_receipt(receipt["entries"], released, corpus.asked(), held), reason
    told = judged(tmp_path, items)
    of_receipts = {name: reason for name, reason in reasons.items() if reason in KNOWN | OF_FORM}
    assert len(of_receipts) > 20
    assert {name: told[name] for name in of_receipts} == {name: fault(it) for name, it in of_receipts.items()}
    assert set(reasons.values()) - set(of_receipts.values()) == UNSEEN
