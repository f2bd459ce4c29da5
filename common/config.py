"""A run's plan: one schema, checked once, frozen.

What can change privacy (`PrivacyPlan`) stands apart from what cannot (`PerformancePlan`). Every number that a
site's mechanism uses is a public constant of the plan; none is computed from a site's data.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.privacy.mechanisms import MOST_STEPS, SMALLEST_NOISE_MULTIPLIER, PoissonSubsampledGaussian


class PlanError(ValueError):
    """A plan, or a file that should hold one, is wrong; the message names the value, the bound and the way out."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelPlan(_Frozen):
    """Which model is trained. The catalog and the language model are public."""

    family: str = "recommend"
    core: str = "lstm"
    encoder: str = Field(
        default="all-MiniLM-L6-v2", description="language model: a known name, a folder or a hub id"
    )
    mode: Literal["vectors", "lora"] = Field(
        default="vectors", description="vectors: frozen item vectors; lora: adapters on the top layers"
    )
    width: Annotated[int, Field(ge=2, le=1024)] = 64
    hidden_width: Annotated[int, Field(ge=1, le=4096)] = 16
    max_events: Annotated[int, Field(ge=2, le=2000)] = 50
    item_prior: bool = Field(default=True, description="train a prior for each item beside the residual")
    negatives: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="public negatives in the loss; none: the whole catalog"
    )
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 8
    lora_layers: Annotated[int, Field(ge=1, le=128)] = 2
    lora_train_down: bool = False
    most_tokens: Annotated[int, Field(ge=8, le=8192)] = 160
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _known(self) -> ModelPlan:
        families, cores = ("recommend",), ("lstm",)
        if self.family not in families:
            raise ValueError(f"family {self.family!r} is unknown: choose one of {', '.join(families)}")
        if self.core not in cores:
            raise ValueError(f"core {self.core!r} is unknown: choose one of {', '.join(cores)}")
        return self


class PrivacyPlan(_Frozen):
    """What a user is promised, and the public constants of the mechanism that keeps it.

    Attributes:
        epsilon, delta: the promise for the whole run, to each user of each site.
        clip_norm: C, the most that one user can move a step's sum.
        sampling_rate: q, each user's chance to take part in a step.
        users_per_site: a public lower bound of every site's number of users; sums are divided by q times this.
        noise_multiplier: sigma; calibrated from the promise where it is left out.
    """

    epsilon: Annotated[float, Field(gt=0, le=100)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip_norm: Annotated[float, Field(gt=0, le=1e4)] = 0.3
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    users_per_site: Annotated[int, Field(ge=1)] = 50
    noise_multiplier: Annotated[float, Field(ge=SMALLEST_NOISE_MULTIPLIER, le=1e6)] | None = None

    @model_validator(mode="after")
    def _delta_for_users(self) -> PrivacyPlan:
        if self.delta * self.users_per_site >= 1:
            raise ValueError(
                f"delta is {self.delta:g}, but must be below 1/users_per_site = {1 / self.users_per_site:g}: "
                "a delta that large lets a mechanism publish a whole user"
            )
        return self

    @property
    def normaliser(self) -> float:
        """The public constant that divides each step's sum."""
        return self.sampling_rate * self.users_per_site


class TrainingPlan(_Frozen):
    """How the model is trained: post-processing of the mechanism's output, but for the number of steps."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 6
    steps_per_round: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 10
    learning_rate: Annotated[float, Field(gt=0)] = 2.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    average_last: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="the final model is the mean over this share of the last rounds"
    )


class ServerPlan(_Frozen):
    """When a round is good enough."""

    minimum_sites: Annotated[int, Field(ge=1)] = 1
    aggregation: Literal["mean", "median", "trimmed-mean", "krum"] = "mean"
    malicious_sites: Annotated[int, Field(ge=0)] = Field(
        default=0, description="how many bad sites trimmed-mean and krum are to withstand"
    )
    round_deadline: Annotated[float, Field(gt=0)] = Field(default=600.0, description="seconds")
    update_norm_bound: Annotated[float, Field(gt=0)] = 1e6


class PerformancePlan(_Frozen):
    """Knobs that cannot change privacy or the model."""

    micro_batch: Annotated[int, Field(ge=1)] = 64
    threads: Annotated[int, Field(ge=1)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Plan(_Frozen):
    """All that server and sites agree on before a run starts."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")] = "run"
    model: ModelPlan = ModelPlan()
    privacy: PrivacyPlan = PrivacyPlan()
    training: TrainingPlan = TrainingPlan()
    server: ServerPlan = ServerPlan()
    performance: PerformancePlan = PerformancePlan()

    @property
    def steps(self) -> int:
        """DP-SGD steps of the whole run, at each site."""
        return self.training.rounds * self.training.steps_per_round

    def calibrated(self) -> Plan:
        """The plan with its noise multiplier: the smallest whose PLD epsilon over all steps keeps the promise."""
        if self.privacy.noise_multiplier is not None:
            return self
        from common.privacy.accountants import calibrate_noise

        noise = calibrate_noise(
            self.privacy.epsilon,
            self.privacy.delta,
            sampling_rate=self.privacy.sampling_rate,
            steps=self.steps,
        )
        return self.model_copy(
            update={"privacy": self.privacy.model_copy(update={"noise_multiplier": noise})}
        )

    def round_event(self) -> PoissonSubsampledGaussian:
        """What one round of private fine-tuning costs a site.

        Raises:
            PlanError: the plan is not calibrated yet.
        """
        if self.privacy.noise_multiplier is None:
            raise PlanError("the plan has no noise multiplier yet: calibrate it first")
        return PoissonSubsampledGaussian(
            sampling_rate=self.privacy.sampling_rate,
            noise_multiplier=self.privacy.noise_multiplier,
            steps=self.training.steps_per_round,
        )

    def digest(self) -> str:
        """sha256 over what changes the run's meaning; performance knobs are left out."""
        content = self.model_dump(mode="json", exclude={"performance"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as indented JSON, which `read_plan` reads back."""
        return self.model_dump_json(indent=2) + "\n"


def make_plan(values: dict[str, Any]) -> Plan:
    """The plan of these values.

    Raises:
        PlanError: one line for each wrong value, with its place and its bound.
    """
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            place = ".".join(str(part) for part in fault["loc"]) or "plan"
            said = fault["msg"].removeprefix("Value error, ")
            given = fault["input"]
            shown = f" (given: {given!r})" if isinstance(given, str | int | float | None) else ""
            lines.append(f"{place}: {said[0].lower()}{said[1:]}{shown}")
        raise PlanError("; ".join(lines)) from error


def read_plan(path: Path) -> Plan:
    """The plan in a TOML or JSON file.

    Raises:
        PlanError: the file is missing, cannot be parsed, or holds a wrong value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"the plan {path} cannot be read ({error.strerror}): give the path of a TOML or JSON file"
        ) from error
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"the plan {path} cannot be parsed: {error}") from error
    if not isinstance(values, dict):
        raise PlanError(f"the plan {path} must be a table of sections")
    return make_plan(values)
