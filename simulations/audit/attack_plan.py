"""What is attacked: a run's model and mechanism, and how much of a made-up log."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from client.training import StepSettings
from common.config import Plan
from common.model_plan import ModelPlan
from common.privacy.accountants import epsilon_pld
from common.privacy.mechanisms import PoissonSubsampledGaussian
from simulations.audit.recovery import AttackError

OWN = "the run's noise"
"""Name of the variant with the audited mechanism."""

MOST_STEPS = 100
"""Of private training: more of the run's steps would take minutes and show nothing else."""


@dataclass(frozen=True, slots=True)
class AttackPlan:
    """What is attacked.

    Attributes:
        model: the run's, but with the task next-item over the whole catalog and an item prior, which the attack reads.
        settings: the run's own constants of a step, and at most MOST_STEPS steps.
        delta: of the run's promise.
        items, users: of the made-up log.
        models: how many are trained for membership, by each variant; each is the target of the others.
        sites: how many updates are read, by each variant.
    """

    model: ModelPlan
    settings: StepSettings
    delta: float
    items: int = 300
    users: int = 300
    models: int = 12
    sites: int = 30

    @property
    def event(self) -> PoissonSubsampledGaussian:
        """What private training is charged as."""
        return PoissonSubsampledGaussian(
            self.settings.sampling_rate, self.settings.noise_multiplier, self.settings.steps
        )

    def as_json(self) -> dict[str, Any]:
        """What was fixed before."""
        names = ("sampling_rate", "noise_multiplier", "clip_norm", "steps", "learning_rate")
        return {
            **{name: getattr(self, name) for name in ("delta", "items", "users", "models", "sites")},
            **{name: getattr(self.settings, name) for name in names},
            "epsilon": epsilon_pld([self.event], self.delta),
            "model": self.model.model_dump(mode="json"),
        }


def plan_attacks(
    plan: Plan, *, models: int = 12, users: int = 300, items: int = 300, sites: int = 30
) -> AttackPlan:
    """The attacks on a run's model and mechanism.

    Raises:
        AttackError: there is nothing to attack, or a number out of its bounds.
    """
    if not plan.training.rounds:
        raise AttackError(
            "the plan has no rounds of fine-tuning (training.rounds is 0): there are no updates to attack"
        )
    for name, value, low in (
        ("shadows", models, 4),
        ("users", users, 20),
        ("items", items, 30),
        ("sites", sites, 5),
    ):
        if not low <= value <= 10_000:
            raise AttackError(f"{name} is {value}, but must lie in [{low}, 10000]: choose a value inside")
    known = plan if plan.privacy.noise_multiplier is not None else plan.calibrated()
    settings = StepSettings.of(known)
    settings = replace(
        settings,
        steps=min(known.steps, MOST_STEPS),
        normaliser=settings.sampling_rate * users / 2,
    )
    changed = {"task": "next-item", "negatives": None, "item_prior": True}
    model = known.model.model_copy(update=changed)
    return AttackPlan(model, settings, known.privacy.delta, items, users, models, sites)
