"""Attacks that an auditor can picture, on made-up users: items read off an update, and who was in the training.

They show what noise does; none of their figures bounds epsilon. What does is the record (`receipts`) and, from
below, canaries. The one thing that can be refuted here is that an attack got further than the claimed mechanism lets
any attack get.

`Evidence.series`: `recovery` and `recovery_of_ten`, lists of {variant, sigma, precision, error, chance, ceiling}, for
sites of one user and of ten; `roc`, {attack: {variant: [[fpr, tpr], ...]}}; `membership`, a list of {attack, variant,
auc, tpr_1, low_1, high_1, tpr_01, low_01, high_01}; `dp_boundary`, [[fpr, tpr], ...].
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from common.models.interface import InterestModel
from simulations.audit.attack_findings import (
    dp_boundary,
    limits,
    membership_checks,
    membership_row,
    recovery_checks,
    recovery_row,
)
from simulations.audit.attack_plan import OWN, AttackPlan
from simulations.audit.canary import canary_model
from simulations.audit.evidence import Evidence
from simulations.audit.membership import (
    ATTACKS,
    Curve,
    curve_of_attack,
    halves,
    losses_of_models,
    scores,
    thinned,
    train_with_privacy,
    train_without_privacy,
)
from simulations.audit.recovery import CLIPPING_ONLY, NO_DP, Variant, random_histories, recover
from simulations.audit.trainers import Trainer

PLAIN_STEPS, PLAIN_RATE = 100, 0.01
SIGMAS = (0.1, 0.3, 1.0)


def run_attacks(
    plan: AttackPlan,
    *,
    trainer: Trainer | None = None,
    command: str = "fedtide audit attack",
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Evidence:
    """Both attacks, without privacy and with the run's.

    Args:
        trainer: stands in for `client.training.train_round` in a test, where privacy is claimed.
        on_progress: called with what is done, and of how much.
    """
    began = time.monotonic()
    chosen: dict[str, Any] = {} if trainer is None else {"trainer": trainer}
    variants = [Variant(f"sigma {sigma:g}", noise_multiplier=sigma) for sigma in SIGMAS]
    own = Variant(OWN, noise_multiplier=plan.settings.noise_multiplier)
    variants = [NO_DP, CLIPPING_ONLY, *variants, own]
    # A model that is trained takes about as long as ten updates.
    total, done = 2 * plan.sites * len(variants) + 20 * plan.models, 0

    def step(by: int = 1) -> None:
        nonlocal done
        done += by
        on_progress(done, total)

    with canary_model(plan.model, plan.items) as model:
        alone, ten = (
            recover(model, plan.settings, variants, users=users, sites=plan.sites, on_site=step, **chosen)
            for users in (1, 10)
        )
        curves = _membership(model, plan, lambda: step(10), **chosen)
    return Evidence(
        tool="attack",
        command=command,
        checks=[*recovery_checks(plan, alone), *membership_checks(plan, curves)],
        parameters=plan.as_json(),
        series={
            "recovery": [recovery_row(each) for each in alone],
            "recovery_of_ten": [recovery_row(each) for each in ten],
            "roc": {
                attack: {variant: thinned(curve.roc) for variant, curve in by.items()}
                for attack, by in curves.items()
            },
            "membership": [
                membership_row(attack, variant, curve)
                for attack, by in curves.items()
                for variant, curve in by.items()
            ],
            "dp_boundary": dp_boundary(plan),
        },
        limits=limits(plan),
        seconds=time.monotonic() - began,
    )


def _membership(
    model: InterestModel, plan: AttackPlan, on_model: Callable[[], None], **chosen: Any
) -> dict[str, dict[str, Curve]]:
    """Attack -> variant -> curve."""
    chance = np.random.default_rng()
    histories = random_histories(plan.users, plan.items, chance)
    members = halves(plan.models, plan.users, chance)
    seen = {
        NO_DP.name: losses_of_models(
            model,
            histories,
            members,
            lambda moved, some: train_without_privacy(moved, some, PLAIN_STEPS, PLAIN_RATE),
            on_model,
        ),
        OWN: losses_of_models(
            model,
            histories,
            members,
            lambda moved, some: train_with_privacy(moved, some, plan.settings, **chosen),
            on_model,
        ),
    }
    scored = {variant: scores(losses) for variant, losses in seen.items()}
    return {
        attack: {variant: curve_of_attack(by[attack], members) for variant, by in scored.items()}
        for attack in ATTACKS
    }
