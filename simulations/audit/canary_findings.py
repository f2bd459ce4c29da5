"""What the guesses about canaries amount to: bounds round by round, one verdict, a positive control.

`Evidence.series`: `rounds`, a list of {round, claimed, steinke, f_dp} with lower bounds at 95 %; `scores`, {included,
left_out}, each canary's score as a mean over rounds in clip norms; `ceiling`, {steinke, f_dp}, the bounds if every
guess had been right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from simulations.audit.canary import Hunt, canary_histories, canary_model, hunt, loudness
from simulations.audit.canary_plan import CanaryError, CanaryPlan, Registration
from simulations.audit.evidence import Check, Evidence
from simulations.audit.one_run import (
    Floats,
    Guesses,
    f_dp_bound_sampled,
    f_dp_p,
    f_dp_refuted,
    guess_extremes,
    steinke_bound,
)
from simulations.audit.trainers import Silence, Trainer

SHOWN_LEVEL = 0.05
"""Of the lower bounds that are printed. The verdict is by the plan's own level."""

LOUD, LEAST_LOUD = 8.0, 3.0
"""A canary's gradient before clipping, in clip norms: what the plan aims at, and what every canary must have."""

_ROUNDS_SHOWN = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)


def loud_clip_norm(plan: CanaryPlan) -> float:
    """The plan's clip norm, or a smaller one at which canaries are LOUD: quiet ones would hide faults of clipping."""
    import torch

    with canary_model(plan.model, plan.canaries) as model:
        some = canary_histories(plan.canaries, plan.events).rows(torch.arange(min(plan.canaries, 64)))
        typical = float(np.median(loudness(model, model.prepare(some))))
    if not typical > 0:
        raise CanaryError("canaries have no gradient in this model: choose another family or task")
    return min(plan.clip_norm, float(f"{typical / LOUD:.3g}"))


def audit_canaries(
    plan: CanaryPlan,
    registration: Registration,
    *,
    trainer: Trainer | None = None,
    command: str = "fedtide audit canary",
    on_round: Callable[[int], None] = lambda _: None,
) -> Evidence:
    """One registered audit and its positive control, which is the same without noise.

    Args:
        trainer: `client.training.train_round` unless a test puts another in its place.
        on_round: called with the number of rounds done, of `plan.rounds` + 1.
    """
    import time
    from dataclasses import replace

    began = time.monotonic()
    with canary_model(plan.model, plan.canaries) as model:
        chosen: dict[str, Any] = {} if trainer is None else {"trainer": trainer}
        found = hunt(model, plan, on_round=on_round, **chosen)
        control = hunt(model, replace(plan, rounds=1), noise=Silence(), **chosen)
    on_round(plan.rounds + 1)
    guesses = guess_extremes(found.scores.sum(axis=0), found.included, plan.guesses)
    silent = guess_extremes(control.scores.sum(axis=0), control.included, plan.guesses)
    return Evidence(
        tool="canary",
        command=command,
        checks=_checks(plan, found, guesses, silent),
        parameters={
            **plan.as_json(),
            "registered": registration.digest,
            "registration": registration.number,
            "multiplicity": "the number of guesses was fixed before the run; one verdict, after the last round",
        },
        series={
            "rounds": bounds_by_round(plan, found),
            "scores": _scores(found),
            "ceiling": _bounds(plan, Guesses(plan.canaries, guesses.made, guesses.made), plan.rounds),
        },
        limits=_limits(plan),
        seconds=time.monotonic() - began,
    )


def bounds_by_round(plan: CanaryPlan, found: Hunt) -> list[dict[str, float]]:
    """Claim and lower bounds at 95 % after some of the rounds, the last among them; each by itself."""
    rows = []
    for number in sorted({each for each in _ROUNDS_SHOWN if each < plan.rounds} | {plan.rounds}):
        guesses = guess_extremes(found.scores[:number].sum(axis=0), found.included, plan.guesses)
        rows.append({"round": number, "claimed": plan.claimed(number), **_bounds(plan, guesses, number)})
    return rows


def _bounds(plan: CanaryPlan, guesses: Guesses, rounds: int) -> dict[str, float]:
    by_curve = f_dp_bound_sampled(
        guesses, plan.sampling_rate, plan.noise_multiplier, rounds, plan.delta, SHOWN_LEVEL
    )
    return {"steinke": steinke_bound(guesses, plan.delta, SHOWN_LEVEL), "f_dp": by_curve}


def _checks(plan: CanaryPlan, found: Hunt, guesses: Guesses, silent: Guesses) -> list[Check]:
    subject, curve = f"{plan.model.family}, {plan.model.mode}", plan.curve(plan.rounds)
    p, without = f_dp_p(guesses, curve), f_dp_p(silent, curve)
    quietest = float(found.loudness.min())
    chance = f"at epsilon {plan.epsilon:g} so many have a chance of {p:.2g} at most"
    explained = f"epsilon {plan.epsilon:g} explains that" if p > 0.1 else chance
    return [
        Check(
            "guesses against the claim",
            subject,
            p,
            f"at least {plan.level:g}",
            not f_dp_refuted(guesses, curve, plan.level),
            f"{guesses.right} of {guesses.made} guesses about {guesses.canaries} canaries were right; {explained}",
        ),
        Check(
            "canaries are loud",
            subject,
            quietest,
            f"at least {LEAST_LOUD:g}",
            quietest >= LEAST_LOUD,
            f"before clipping the quietest canary's gradient is {quietest:.1f} clip norms long: clipping has to work",
        ),
        Check(
            "nothing else in the update",
            subject,
            float(len(found.unasked)),
            "0",
            not found.unasked,
            f"beside the model's parameters it holds {', '.join(found.unasked) or 'nothing'}"[:200],
        ),
        Check(
            "guesses without noise",
            subject,
            without,
            f"below {plan.level:g}",
            f_dp_refuted(silent, curve, plan.level),
            f"with the noise taken away, {silent.right} of {silent.made} guesses were right, and the claim is refuted",
            control=True,
        ),
    ]


def _scores(found: Hunt) -> dict[str, list[float]]:
    mean: Floats = found.scores.mean(axis=0).round(4)
    return {"included": mean[found.included].tolist(), "left_out": mean[~found.included].tolist()}


def _limits(plan: CanaryPlan) -> list[str]:
    return [
        "A lower bound below the claim proves no privacy: it is one attempt that failed to refute it.",
        "The code is audited at an epsilon of its own, with a tiny random language model and made-up users; what the "
        "run's own updates hold is for the tool noise, and the record for the tool receipts.",
        "Noise that repeats from round to round, users drawn without chance, and constants computed from data are not "
        "seen here: the tool conformance looks for those.",
        "Half of the noise is refuted only about every second time with 1000 canaries, three quarters hardly ever: the "
        "tools conformance and noise see a tenth too little.",
        f"Bounds by round are each at 95 % by themselves; the verdict is one test, at {plan.level:g}.",
    ]
