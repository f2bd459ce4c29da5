"""What an audit with canaries will do, fixed and written down before the first coin is thrown."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.model_plan import ModelPlan
from common.privacy.accountants import epsilon_pld
from common.privacy.calibration import calibrate_noise
from common.privacy.mechanisms import PoissonSubsampledGaussian
from simulations.audit.one_run import Curve, Guesses, f_dp_refuted, gaussian_curve, sampled_curve

REGISTERED = "canary.registered.json"


class CanaryError(ValueError):
    """An audit with canaries cannot be run like that; the message names the value, the bound and the way out."""


@dataclass(frozen=True, slots=True)
class CanaryPlan:
    """All that decides what is measured and how it is judged.

    Attributes:
        model: family, mode and the rest; its language model is replaced by a tiny random one.
        canaries: how many coins.
        guesses: on each side: the highest scores are guessed in, as many of the lowest out.
        epsilon, delta: what the audited rounds claim together.
        level: how often honest code may be refused.
        rounds: of one step each.
        sampling_rate: 1: everybody takes part in every round.
        noise_multiplier: what the claim needs, by the repository's own calibration.
        clip_norm: C.
        learning_rate: of plain gradient descent.
        events: of each canary, all on its own item.
        trainer: what is audited.
    """

    model: ModelPlan
    noise_multiplier: float
    canaries: int = 1000
    guesses: int = 100
    epsilon: float = 2.0
    delta: float = 1e-5
    level: float = 0.01
    rounds: int = 4
    sampling_rate: float = 1.0
    clip_norm: float = 0.3
    learning_rate: float = 0.3
    events: int = 12
    trainer: str = "client.training.train_round"

    def event(self, rounds: int) -> PoissonSubsampledGaussian:
        """What the first `rounds` rounds are charged as."""
        return PoissonSubsampledGaussian(self.sampling_rate, self.noise_multiplier, rounds)

    def claimed(self, rounds: int) -> float:
        """Epsilon of the first `rounds` rounds, by the PLD."""
        return epsilon_pld([self.event(rounds)], self.delta)

    def curve(self, rounds: int) -> Curve:
        """The trade-off curve that the first `rounds` rounds claim."""
        if self.sampling_rate == 1:
            return gaussian_curve(rounds**0.5 / self.noise_multiplier)
        return sampled_curve(self.sampling_rate, self.noise_multiplier, rounds)

    def as_json(self) -> dict[str, Any]:
        """What is registered."""
        return {**asdict(self), "model": self.model.model_dump(mode="json")}

    def digest(self) -> str:
        """sha256 over what is registered."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()


def plan_canaries(model: ModelPlan, **values: Any) -> CanaryPlan:
    """A plan with the noise that its claim needs.

    Raises:
        CanaryError: a number out of its bounds, or an audit that could refute nothing.
    """
    draft = CanaryPlan(model=model, noise_multiplier=1.0, **values)
    bounds = {
        "canaries": (20, 100_000),
        "guesses": (1, draft.canaries // 2),
        "rounds": (1, 1000),
        "events": (2, model.max_events),
        "epsilon": (0.1, 20.0),
        "level": (1e-6, 0.5),
        "delta": (1e-12, 1e-3),
        "sampling_rate": (0.01, 1.0),
        "clip_norm": (1e-4, 1e4),
    }
    for name, (low, high) in bounds.items():
        value = getattr(draft, name)
        if not low <= value <= high:
            raise CanaryError(
                f"{name} is {value:g}, but must lie in [{low:g}, {high:g}]: choose a value inside"
            )
    noise = calibrate_noise(draft.epsilon, draft.delta, sampling_rate=draft.sampling_rate, steps=draft.rounds)
    plan = CanaryPlan(model=model, noise_multiplier=noise, **values)
    perfect = Guesses(plan.canaries, 2 * plan.guesses, 2 * plan.guesses)
    if not f_dp_refuted(perfect, plan.curve(plan.rounds), plan.level):
        raise CanaryError(
            f"canaries is {plan.canaries} with {plan.guesses} guesses on each side, but even if every guess were right "
            f"epsilon {plan.epsilon:g} would not be refuted at {plan.level:g}: take more canaries, or a smaller epsilon"
        )
    return plan


@dataclass(frozen=True, slots=True)
class Registration:
    """Where in the list of a folder's audits this one stands."""

    digest: str
    number: int


def register(folder: Path, plan: CanaryPlan, *, again: bool = False) -> Registration:
    """Writes the plan down before the run; earlier ones stay, so that nobody can run until a figure pleases.

    Args:
        again: whether one more is meant, where one is registered already.

    Raises:
        CanaryError: one is registered and `again` was not said, or the file is none of these.
    """
    from server.runs import write_whole

    file = folder / REGISTERED
    said = _registered(file)
    if said and not again:
        raise CanaryError(
            f"{file} registers {len(said)} audit{'s' * (len(said) > 1)} already: say --again for one more, which is "
            "written down beside, so that a reader sees how often it was tried"
        )
    number = len(said) + 1
    made = datetime.now(UTC).isoformat(timespec="seconds")
    said.append({"number": number, "digest": plan.digest(), "made": made, "parameters": plan.as_json()})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(said, indent=2).encode())
    return Registration(plan.digest(), number)


def _registered(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(said, list) or not all(isinstance(each, dict) for each in said):
            raise ValueError("no list")
    except ValueError as error:
        raise CanaryError(f"{file} is no list of registered audits: move it away, and keep it") from error
    return said
