"""What attacks amount to: rows for tables and charts, what cannot be if the claim is true, and what is not shown."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulations.audit.attack_plan import MOST_STEPS, OWN, AttackPlan
from simulations.audit.evidence import Check
from simulations.audit.membership import Curve
from simulations.audit.one_run import Floats, clopper_pearson, sampled_curve
from simulations.audit.recovery import CLIPPING_ONLY, NO_DP, Recovery

WORKS = 0.95
"""What recovery must reach without noise, or the attack was no attack."""

_SURE = 1e-4


def dp_boundary(plan: AttackPlan) -> list[list[float]]:
    """The most true positives that any attack can have at each rate of false ones, under the claimed mechanism."""
    rates = np.geomspace(1e-4, 1.0, 80)
    return np.stack([rates, _most_true(plan, rates)], axis=1).round(9).tolist()  # type: ignore[no-any-return]


def _most_true(plan: AttackPlan, rates: Floats) -> Floats:
    """TPR <= min_e(e^e FPR + delta(e)), and the same the other way round; by the PLD."""
    event = plan.event
    least = sampled_curve(event.sampling_rate, event.noise_multiplier, event.steps)
    return 1 - least(1 - rates)  # the curve is its own inverse, mirrored


def recovery_row(found: Recovery) -> dict[str, Any]:
    return {
        "variant": found.variant.name,
        "sigma": found.variant.noise_multiplier,
        "precision": found.precision,
        "error": found.error,
        "chance": found.chance,
        "ceiling": found.ceiling,
    }


def membership_row(attack: str, variant: str, curve: Curve) -> dict[str, Any]:
    (tpr_1, low_1, high_1), (tpr_01, low_01, high_01) = curve.at.values()
    row = {
        "tpr_1": tpr_1,
        "low_1": low_1,
        "high_1": high_1,
        "tpr_01": tpr_01,
        "low_01": low_01,
        "high_01": high_01,
    }
    return {"attack": attack, "variant": variant, "auc": curve.area, **row}


def recovery_checks(plan: AttackPlan, alone: list[Recovery]) -> list[Check]:
    by_name = {each.variant.name: each for each in alone}
    subject, own = f"{plan.model.family}, {plan.model.mode}", by_name[OWN]
    checks = [
        Check(
            "items recovered",
            f"{subject}, {variant.name}",
            by_name[variant.name].precision,
            f"at least {WORKS:g}",
            by_name[variant.name].precision >= WORKS,
            f"without noise one update gives away {by_name[variant.name].precision:.0%} of its only user's items",
            control=True,
        )
        for variant in (NO_DP, CLIPPING_ONLY)
    ]
    checks.append(
        Check(
            "items recovered",
            f"{subject}, {own.variant.name}",
            own.precision,
            f"at most {own.ceiling:.3f}, four standard errors aside",
            own.precision - 4 * own.error <= own.ceiling,
            f"with the run's noise {own.precision:.0%} of guesses are right; {own.chance:.0%} would be by chance",
        )
    )
    return checks


def membership_checks(plan: AttackPlan, curves: dict[str, dict[str, Curve]]) -> list[Check]:
    subject, checks = f"{plan.model.family}, {plan.model.mode}", []
    for attack, by_variant in curves.items():
        plain, own = by_variant[NO_DP.name], by_variant[OWN]
        checks.append(
            Check(
                "members told",
                f"{subject}, {attack}, {NO_DP.name}",
                plain.at[0.01][0],
                "above 0.05",
                plain.at[0.01][1] > 0.05,
                f"without privacy {plain.at[0.01][0]:.0%} of members are told at 1 % false alarms",
                control=True,
            )
        )
        right, false = round(own.at[0.01][0] * own.members), int(0.01 * own.others)
        surely = clopper_pearson(right, own.members, _SURE)[0]
        most = float(_most_true(plan, np.array([clopper_pearson(false, own.others, _SURE)[1]]))[0])
        checks.append(
            Check(
                "members told",
                f"{subject}, {attack}, {OWN}",
                own.at[0.01][0],
                f"at most {most:.3f}, chance aside",
                surely <= most,
                f"with the run's noise {own.at[0.01][0]:.1%} of members are told at 1 % false alarms",
            )
        )
    return checks


def limits(plan: AttackPlan) -> list[str]:
    return [
        "No figure here is a bound on epsilon: a stronger attack may do better, and one that fails proves nothing.",
        "Users are made up, with items drawn at random, and the language model is tiny and random: on other data and "
        "models attacks fare differently.",
        "The model attacked predicts the next item and trains a prior for each, whatever the run's model does.",
        f"Members are told from models of at most {MOST_STEPS} steps on {plan.users // 2} users; the boundary is that "
        "of these steps, not of the run's whole promise.",
        "Intervals of true positives count each decision as if it were of another user, but every user is judged once "
        "by each target.",
    ]
