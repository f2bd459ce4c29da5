"""At a site, an update is rounded after its noise, once; what was rounded is kept, signed and sent again."""
# ruff: noqa: F401, F811 (fixtures of another file)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from client import site as site_module
from client.generators import Generators
from client.ledger import Ledger
from client.site_folder import Site
from client.training import train_round
from common.config import Plan, Precision, WirePlan
from common.phases import Phase
from common.precision import SCALES, decoded, encoded
from common.privacy.faults import WrongDigestError
from common.privacy.receipts import Receipt, check_receipt_alone
from common.wire import Reason, Refusal, Request, Update, state_to_bytes
from common.witness import WITNESS
from simulations.audit.trainers import Silence
from tests.asking import answer
from tests.client.test_site import (
    Ask,
    ask,
    lose_histories,
    outcomes,
    plan,
    shared,
    site,
    start,
)
from tests.client.training_cases import Everyone

ROUNDED: tuple[Precision, ...] = ("bfloat16", "int8")


def asked(plan: Plan, request: Request, precision: Precision) -> Request:
    rounded = plan.model_copy(update={"wire": WirePlan(precision=precision)})
    return replace(request, plan=rounded.model_dump_json())


def released(reply: Update | Refusal) -> Update:
    assert isinstance(reply, Update)
    return reply


@pytest.mark.parametrize("precision", ROUNDED)
def test_a_retry_gets_the_same_rounding_though_another_would_differ(
    precision: Precision,
    site: Site,
    plan: Plan,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A site that kept the update as it was and rounded it for each answer would send what nobody signed for."""
    unrounded: list[dict[str, Tensor]] = []

    def spied(update: dict[str, Tensor], precision: Precision) -> dict[str, Tensor]:
        unrounded.append(update)
        return encoded(update, precision)

    monkeypatch.setattr(site_module, "encoded", spied)
    request = asked(plan, ask(), precision)
    first = released(answer(site, request))
    lose_histories(site)
    second = released(answer(site, request))
    assert state_to_bytes(first.state) == state_to_bytes(second.state)
    assert first.receipt == second.receipt
    assert outcomes(site) == ["released"]
    assert len(unrounded) == 1
    with Ledger.open(site.ledger_folder) as ledger:
        kept = ledger.outbox(request.run, 1, nonce=request.nonce)
    assert kept is not None
    assert kept[0] == state_to_bytes(first.state)
    receipt = Receipt.from_bytes(first.receipt)
    check_receipt_alone(receipt, state_to_bytes(first.state))
    for other in (encoded(unrounded[0], precision), unrounded[0], decoded(first.state)):
        with pytest.raises(WrongDigestError):
            check_receipt_alone(receipt, state_to_bytes(other))


def scales_before_noise(clean: list[dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """The order that must not be: a grid made of the users' gradients, on which the noised update is rounded."""

    def broken(update: dict[str, Tensor], precision: Precision) -> dict[str, Tensor]:
        scales = encoded(clean.pop(0), precision)[SCALES]
        sent = encoded(update, precision)
        by_place = scales.repeat_interleave(256)
        flat = torch.cat([update[name].flatten() for name in sorted(update) if name != WITNESS])
        steps = (flat / by_place[: flat.numel()]).round().clamp(-127, 127).to(torch.int8)
        names = [name for name in sorted(update) if name != WITNESS]
        parts = steps.split([update[name].numel() for name in names])
        rounded = {name: part.view(update[name].shape) for name, part in zip(names, parts, strict=True)}
        return {**sent, **rounded, SCALES: scales}

    return broken


@pytest.mark.parametrize("in_order", [True, False])
def test_rounding_comes_after_the_noise(
    in_order: bool,
    site: Site,
    plan: Plan,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rounds from the same parameters, all users in both: nothing but noise tells the two updates apart.

    A scale made of the noised update differs then, and is that of its block as it is released. A scale made before
    the noise is the same number twice: a deterministic function of the users, which the server would read.
    """
    clean: list[dict[str, Tensor]] = []
    noised: list[dict[str, Tensor]] = []

    def both(model: Any, histories: Any, settings: Any, **named: Any) -> dict[str, Tensor]:
        start = model.trainable_state()
        clean.append(train_round(model, histories, settings, sampler=Everyone(), noise=Silence()))
        model.load_trainable(start)
        noised.append(train_round(model, histories, settings, **named))
        return noised[-1]

    monkeypatch.setattr(site_module, "train_round", both)
    if not in_order:
        monkeypatch.setattr(site_module, "encoded", scales_before_noise(clean))
    one_step = plan.model_copy(update={"training": plan.training.model_copy(update={"steps_per_round": 1})})
    everyone = Generators(sampler=Everyone)
    requests = [asked(one_step, ask(number), "int8") for number in (1, 2)]
    sent = [released(answer(site, each, generators=everyone)).state for each in requests]
    scales = torch.stack([each[SCALES] for each in sent])
    assert bool((scales[0] != scales[1]).all()) == in_order
    of_release = torch.stack([encoded(each, "int8")[SCALES] for each in noised])
    assert torch.equal(scales, of_release) == in_order
    if in_order:
        for each, update in zip(sent, noised, strict=True):
            back, most = decoded(each), float(each[SCALES].max())
            assert torch.equal(back[WITNESS], update[WITNESS])
            assert all(float((back[name] - update[name]).abs().max()) <= most for name in update)


def test_an_update_that_cannot_be_rounded_stays_charged_and_is_refused_in_a_word(
    site: Site,
    plan: Plan,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def endless(*_: Any, **__: Any) -> dict[str, Tensor]:
        return {"w": torch.tensor([float("inf")])}

    monkeypatch.setattr(site_module, "train_round", endless)
    assert answer(site, asked(plan, ask(), "int8")) == Refusal(Reason.FAILED)
    assert outcomes(site) == ["burnt"]


def test_sums_travel_as_float32(plan: Plan) -> None:
    rounded = plan.model_copy(update={"wire": WirePlan(precision="int8")})
    precisions = {phase: rounded.precision(phase) for phase in Phase}
    assert precisions == {**dict.fromkeys(Phase, "float32"), Phase.UPDATE: "int8"}
