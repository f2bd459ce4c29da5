"""What leaves a site beside the released vectors: the replies of two sites that differ in one user, field by field."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from client.ledger import Ledger
from client.policy import Performance
from client.site_folder import Site
from common.config import Plan, make_plan
from common.events.catalog import Catalog
from common.models.build import build_model, item_texts
from common.phases import Phase
from common.privacy.receipts import Receipt
from common.sums import POPULARITY, SITES
from common.wire import Request, State, state_from_bytes
from simulations.audit.conformance.code import Code
from simulations.audit.conformance.made_up_sites import own_home
from simulations.audit.conformance.subjects import language_model, some_users, texts
from simulations.audit.conformance.sums import histories_of
from simulations.audit.evidence import Check

if TYPE_CHECKING:
    from flwr.app import RecordDict

USERS, ITEMS, NOISE = 12, 30, 6.0
PHASES = (Phase.POPULARITY, Phase.UPDATE, Phase.METRICS)
LOUD = [3, 4] * 40
OF_THE_RELEASE = ("body.update_digest", "signature")
"""Fields of the receipt's last entry that say which bytes were released, and so differ as the noise does."""


def reply_checks(code: Code, folder: Path, only: Sequence[Phase] = PHASES) -> list[Check]:
    """`nothing else leaves`, for a statistic, an update and metrics."""
    with tempfile.TemporaryDirectory(dir=folder) as name, own_home(Path(name) / "home"):
        plan, catalog = _plan(folder), _catalog()
        state = build_model(
            plan.model,
            item_texts(catalog.texts, catalog.categories),
            Path(plan.model.encoder),
            witness_places=plan.privacy.witness_places,
        ).model.trainable_state()
        found = []
        for number, exchange in enumerate(plan.schedule(), start=1):
            if exchange.phase in only:
                request = _request(plan, number, exchange.phase, state)
                sites = _two_sites(Path(name) / exchange.phase, plan, catalog)
                found.append(_compare(exchange.phase, *(code.reply(site, request) for site in sites)))
        return found


def _request(plan: Plan, number: int, phase: Phase, state: State) -> Request:
    first = phase is Phase.POPULARITY
    return Request(
        run="conformance",
        round=number,
        attempt=1,
        nonce="ab" * 16,
        plan=plan.model_dump_json(),
        state={} if first else state,
        phase=phase,
        released={} if first else {POPULARITY: torch.ones(ITEMS), POPULARITY + SITES: torch.ones(1)},
    )


def _plan(folder: Path) -> Plan:
    return make_plan(
        {
            "name": "conformance",
            "model": {
                "encoder": str(language_model(folder)),
                "width": 4,
                "hidden_width": 4,
                "max_events": 12,
            },
            "privacy": {
                "users_per_site": 10,
                "noise_multiplier": NOISE,
                "sampling_rate": 0.5,
                "delta": 1e-5,
            },
            "statistics": {"popularity_share": 0.1, "popularity_noise_multiplier": NOISE},
            "metrics": {"share": 0.1, "noise_multiplier": NOISE},
            "training": {"rounds": 1, "steps_per_round": 2},
        }
    )


def _catalog() -> Catalog:
    return Catalog(
        ids=tuple(f"i{item}" for item in range(ITEMS)), texts=tuple(texts(ITEMS)), categories=((),) * ITEMS
    )


def _two_sites(folder: Path, plan: Plan, catalog: Catalog) -> list[Site]:
    """Two sites with the same ledger and key; the second has one user more."""
    folder.mkdir()
    catalog.save(folder / "catalog.jsonl")
    rows = some_users(USERS, ITEMS)
    first, second = folder / "without", folder / "with-one"
    first.mkdir(mode=0o700)
    site = Site(
        folder=first,
        name="made-up",
        catalog=folder / "catalog.jsonl",
        users_at_least=10,
        metrics=True,
        performance=Performance(threads=1),
    )
    site.save()
    events = [exchange.event for exchange in plan.schedule()]
    Ledger.create(site.ledger_folder, epsilon=8, delta=1e-5, typical_plan=events).disconnect()
    shutil.copytree(first, second)
    histories_of(rows).save(first / "histories")
    histories_of([*rows, LOUD]).save(second / "histories")
    return [Site.load(first), Site.load(second)]


def fields_of(reply: RecordDict) -> dict[str, object]:
    """Every field of a reply by its path: arrays as their form, the receipt entry by entry, all else as it is."""
    from flwr.app import Array

    found: dict[str, object] = {}
    for record, values in reply.items():
        for name, value in values.items():
            place = f"{record}.{name}"
            if isinstance(value, Array):
                found[place] = (value.dtype, tuple(value.shape), value.stype, len(value.data))
                found[f"{place}.header"] = _header(value.data)
            elif place == "receipt.entries" and isinstance(value, bytes):
                found |= _receipt_fields(value)
            else:
                found[place] = value
    return found


def _header(data: bytes) -> bytes:
    """Names, types and shapes of tensors, and whatever else stands before their numbers in safetensors' form."""
    return data[: 8 + int.from_bytes(data[:8], "little")]


def _receipt_fields(data: bytes) -> dict[str, object]:
    receipt = Receipt.from_bytes(data)
    found: dict[str, object] = {"receipt": len(data)}
    last = len(receipt.entries) - 1
    for number, entry in enumerate([receipt.genesis, *receipt.entries], start=-1):
        statement = entry.to_fields()
        body = statement.pop("body")
        own = {**statement, **{f"body.{n}": v for n, v in body.items()}}  # type: ignore[union-attr]
        for name, value in own.items():
            differs = number == last and name in OF_THE_RELEASE
            found[f"receipt.{number}.{name}"] = len(str(value)) if differs else value
    return found


def _compare(phase: Phase, without: RecordDict, with_one: RecordDict) -> Check:
    one, other = fields_of(without), fields_of(with_one)
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    form = sorted({name.split(".")[0] for name in (*one, *other)})
    extra = [name for name in form if name not in ("update", "receipt")]
    noisy = _all_noise(without, with_one)
    holds = not differing and not extra and form == ["receipt", "update"] and noisy
    said = (
        f"{len(one)} fields beside the released numbers are equal, byte for byte, at two sites that differ in one user."
        if holds
        else f"A user more shows in {', '.join(differing[:4]) or 'no field'}; unforeseen: {', '.join(extra) or 'none'}"
        f"{'' if noisy else '; a released number is the same at both sites'}."
    )
    return Check(
        "nothing else leaves",
        f"reply to {phase}",
        float(len(differing) + len(extra)),
        "0 fields",
        holds,
        said,
    )


def _all_noise(without: RecordDict, with_one: RecordDict) -> bool:
    """Whether every released number differs, as noise makes it."""

    def numbers(reply: RecordDict) -> Tensor:
        state = state_from_bytes(reply["update"]["tensors"].data)
        return torch.cat([state[name].flatten() for name in sorted(state)])

    if "update" not in without or "update" not in with_one:
        return False
    one, other = numbers(without), numbers(with_one)
    return one.shape == other.shape and not bool((one == other).any())
