"""What a site answers, and what it charges: the same to a request that comes again, and whoever its users are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from client.generators import SECURE
from common.privacy.receipts import Receipt
from common.wire import Refusal, Update, answer_to_records
from simulations.audit.conformance.made_up_sites import AGREED, ITEMS, Draws, Rows
from simulations.audit.conformance.pairs_of_sites import LONG, LOUD, NEIGHBOURS, Way
from simulations.audit.conformance.reply import fields_of
from simulations.audit.conformance.subjects import some_users
from simulations.audit.evidence import Check

ODD: dict[str, Rows] = {
    "nobody": [],
    "one user": [[1, 2, 3]],
    "fewer users than agreed": some_users(3, ITEMS),
    "users of one event each": [[item] for item in range(AGREED + 4)],
    "users without events": [[] for _ in range(AGREED)],
    "users of hundreds of events": [LOUD, LONG] * AGREED,
    "many users": some_users(20 * AGREED, ITEMS, longest=6),
}
"""Sites whose users are not what was agreed to, or odd."""


def any_site_answers(way: Way, only: Sequence[str] = tuple(ODD)) -> list[Check]:
    """`any site`: whoever a site's users are, it answers alike and charges alike, field by field."""
    plan = way.plan()
    usual = way.sites.answers(way.path, plan, [some_users(AGREED + 4, ITEMS), NEIGHBOURS])[0]
    told = fields_of(answer_to_records(usual))
    other = []
    for name in only:
        found = way.sites.answers(way.path, plan, [ODD[name], NEIGHBOURS])[0]
        if fields_of(answer_to_records(found)) != told:
            other.append(f"{name}: {found.reason.value if isinstance(found, Refusal) else 'other fields'}")
    says = (
        "; ".join(other) or f"{len(only)} sites with odd users, or fewer than agreed, answer and charge alike"
    )
    holds = not other and isinstance(usual, Update)
    return [
        Check("any site", way.name, float(len(other)), "0 sites that answer otherwise", holds, f"{says}.")
    ]


def same_answer_again(way: Way) -> list[Check]:
    """`same answer`: a request that comes again gets the same bytes, which are those of its receipt."""
    plan = way.plan()
    request, rows = way.sites.request(plan), some_users(9, ITEMS)
    with way.sites.holding([rows, NEIGHBOURS]) as folders:
        asked = [(folder, request) for folder in folders]
        first, *again = [way.path(asked, each) for each in (Draws().again(), Draws().again(), SECURE)]
    same = all(found == first for found in again)
    signed = all(isinstance(each, Update) and _signed(each) for each in first)
    says = (
        "A request that comes again gets the bytes of the first answer" if same else "An answer is made anew"
    )
    if not signed:
        says += ", but the receipt is for other bytes"
    return [Check("same answer", way.name, float(not same), "the same bytes", same and signed, f"{says}.")]


def _signed(update: Update) -> bool:
    """Whether the receipt's last entry is for these very bytes."""
    body = Receipt.from_bytes(update.receipt).entries[-1].to_fields()["body"]
    return hashlib.sha256(update.data).hexdigest() in str(body)
