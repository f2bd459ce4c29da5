"""A run's plan: one schema, checked once, frozen.

Every number that a site's mechanism uses is a public constant of the plan; none is computed from a site's data. How
fast it is computed, and on what, is no part of a plan: that is each site's own affair (`client/policy.py`).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from common.model_plan import ModelPlan
from common.phases import (
    FROZEN,
    Exchange,
    MetricsPlan,
    Phase,
    PretrainingPlan,
    Stated,
    StatisticsPlan,
    items_for_noise,
    noise_of_promise,
    noise_of_share,
)
from common.privacy.mechanisms import (
    MOST_STEPS,
    SMALLEST_NOISE_MULTIPLIER,
    Event,
    GaussianSum,
    PoissonSubsampledGaussian,
)
from common.unknown_keys import unknown_key

Precision = Literal["float32", "bfloat16", "int8"]
"""How the numbers of an update travel (`common/precision.py`)."""


class PlanError(ValueError):
    """A plan, or a file that should hold one, is wrong; the message names the value, the bound and the way out."""


class _Frozen(BaseModel):
    model_config = FROZEN


class PrivacyPlan(_Frozen):
    """What a user is promised, and the public constants of the mechanism that keeps it.

    Attributes:
        epsilon, delta: the promise for the whole run, to each user of each site.
        clip_norm: C, the most that one user can move a step's sum.
        sampling_rate: q, each user's chance to take part in a step.
        users_per_site: a public lower bound of every site's number of users; sums are divided by q times this.
        noise_multiplier: sigma; calibrated from the promise where it is left out.
        witness_places: coordinates of every release that no user can reach: they carry its noise alone, so that
            anyone who holds the release can check the noise level. 0: none, and nobody can.
    """

    epsilon: Annotated[float, Field(gt=0, le=100)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip_norm: Annotated[float, Field(gt=0, le=1e4)] = 0.3
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    users_per_site: Annotated[int, Field(ge=1)] = 50
    noise_multiplier: Annotated[float, Field(ge=SMALLEST_NOISE_MULTIPLIER, le=1e6)] | None = None
    witness_places: Annotated[int, Field(ge=0, le=4096)] = 256

    @model_validator(mode="after")
    def _within_reach(self) -> PrivacyPlan:
        from common.privacy.accountants import check_promise

        check_promise(self.epsilon, self.delta)
        return self

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

    rounds: Annotated[int, Field(ge=0, le=100_000)] = Field(
        default=6, description="of private fine-tuning; 0 leaves it out"
    )
    steps_per_round: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 10
    learning_rate: Annotated[float, Field(gt=0)] = 2.0
    head_rounds: Annotated[int, Field(ge=0)] = Field(
        default=0, description="lora: so many first rounds train what is above the adapters alone"
    )
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    average_last: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="the final model is the mean over this share of the last rounds"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="the final model is instead the exponential average of all rounds, of this decay",
    )


class ServerPlan(_Frozen):
    """When a round is good enough."""

    minimum_sites: Annotated[int, Field(ge=1)] = 1
    expected_sites: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="public number of sites, for the choice of top_items; none: minimum_sites"
    )
    aggregation: Literal["mean", "median", "trimmed-mean", "krum"] = "mean"
    malicious_sites: Annotated[int, Field(ge=0)] = Field(
        default=0, description="how many bad sites trimmed-mean and krum are to withstand"
    )
    round_deadline: Annotated[float, Field(gt=0)] = Field(default=600.0, description="seconds")
    quorum: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="admitted updates after which a round waits for the others no longer than grace; none: for all "
        "connected sites, until round_deadline",
    )
    grace: Annotated[float, Field(ge=0)] = Field(default=30.0, description="seconds, after the quorum")
    sites_per_round: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="how many of the connected sites are asked in a round, chosen at random; none: all. No promise "
        "rests on it: each site counts on being asked every time",
    )
    patience: Annotated[float, Field(ge=0)] = Field(
        default=1800.0,
        description="seconds that a run waits before a round for the sites that it needs; then it ends, and can go on",
    )
    update_norm_bound: Annotated[float, Field(gt=0)] = 1e6

    @model_validator(mode="after")
    def _quorum_is_enough(self) -> ServerPlan:
        least = max(self.minimum_sites, self.quorum or 0)
        if self.sites_per_round is not None and self.sites_per_round < least:
            raise ValueError(
                f"sites_per_round is {self.sites_per_round}, but a round needs {least} updates: ask more sites, or "
                "lower quorum or minimum_sites"
            )
        if self.quorum is not None and self.quorum < self.minimum_sites:
            raise ValueError(
                f"quorum is {self.quorum}, but a round needs minimum_sites = {self.minimum_sites} updates: raise the "
                "quorum, or leave it out to wait for all sites"
            )
        return self


class WirePlan(_Frozen):
    """How updates travel. They are rounded after the noise, so that costs no privacy (`common/precision.py`)."""

    precision: Precision = Field(
        default="float32",
        description="of updates: bfloat16 and int8 are rounded at random, without bias, and two and four times "
        "smaller; statistics and metrics are float32 always",
    )
    parameters: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the parameters that are broadcast: bfloat16 is the nearest of each, half as large",
    )


class Plan(_Frozen):
    """All that server and sites agree on before a run starts.

    Attributes:
        catalog: digest of the public catalog, whose order of items the model's rows are; the commands that begin a
            run fill it in. None leaves it unsaid.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")] = "run"
    catalog: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    model: ModelPlan = ModelPlan()
    privacy: PrivacyPlan = PrivacyPlan()
    training: TrainingPlan = TrainingPlan()
    statistics: StatisticsPlan = StatisticsPlan()
    pretraining: PretrainingPlan = PretrainingPlan()
    metrics: MetricsPlan = MetricsPlan()
    server: ServerPlan = ServerPlan()
    wire: WirePlan = WirePlan()

    @model_validator(mode="after")
    def _something_to_do(self) -> Plan:
        shares = self.statistics.popularity_share + self.statistics.transition_share + self.metrics.share
        if shares > 1 or (shares == 1 and self.training.rounds):
            raise ValueError(
                f"the shares of statistics and metrics add up to {shares:g} of the promise: they must stay below 1 "
                "for private fine-tuning, and at 1 without (training.rounds = 0)"
            )
        if not self.training.rounds and not self.statistics.popularity_share:
            raise ValueError(
                "the plan has neither statistics nor rounds of fine-tuning: nothing would be learned"
            )
        if self.model.task != "next-item" and (self.metrics.share or self.pretraining.histories):
            raise ValueError(
                f"metrics and pretraining are for the task next-item, not {self.model.task}: set metrics.share and "
                "pretraining.histories to 0"
            )
        return self

    @model_validator(mode="after")
    def _adapters_get_rounds(self) -> Plan:
        held, rounds = self.training.head_rounds, self.training.rounds
        if held and self.model.mode != "lora":
            raise ValueError(
                f"training.head_rounds is {held}, but there are adapters in mode lora alone: set it to 0, or "
                "model.mode to lora"
            )
        if held and held >= rounds:
            raise ValueError(
                f"training.head_rounds is {held}, but training.rounds is {rounds}, so the adapters would never be "
                "trained: lower it, or set model.mode to vectors"
            )
        return self

    @property
    def steps(self) -> int:
        """DP-SGD steps of the whole run, at each site."""
        return self.training.rounds * self.training.steps_per_round

    @property
    def rounds(self) -> int:
        """Exchanges of the whole run, of every phase."""
        sums = (self.statistics.popularity_share, self.statistics.transition_share, self.metrics.share)
        return self.training.rounds + sum(share > 0 for share in sums)

    def calibrated(self) -> Plan:
        """The plan with the noise of every phase, so that the PLD epsilon of all together keeps the promise.

        Sums get their shares of 1 / noise^2; what they leave goes to DP-SGD, whose noise is the smallest that
        keeps the promise beside them (heterogeneous composition). Noise that the plan states stays as it is.

        Raises:
            PlanError: the noise that the plan states exceeds the promise.
        """
        from common.privacy.accountants import epsilon_pld
        from common.privacy.calibration import calibrate_noise

        statistics, metrics, privacy = self.statistics, self.metrics, self.privacy
        # An uncalibrated plan's own noise is trusted no more than any other: the whole is checked below.
        shares = {
            Phase.POPULARITY: statistics.popularity_share,
            Phase.TRANSITIONS: statistics.transition_share,
            Phase.METRICS: metrics.share,
        }
        stated = self._sum_noise()
        missing = [phase for phase, share in shares.items() if share and stated[phase] is None]
        whole = noise_of_promise(privacy.epsilon, privacy.delta) if missing else 0.0
        found = stated | {phase: noise_of_share(whole, shares[phase]) for phase in missing}
        statistics = statistics.model_copy(
            update={
                "popularity_noise_multiplier": found[Phase.POPULARITY],
                "transition_noise_multiplier": found[Phase.TRANSITIONS],
            }
        )
        if statistics.transition_share and statistics.top_items is None:
            sites = self.server.expected_sites or self.server.minimum_sites
            deviation = (statistics.transition_noise_multiplier or 1.0) * sites**0.5
            count = items_for_noise(
                sites * privacy.users_per_site,
                deviation,
                symmetric=statistics.symmetric,
                witness_places=privacy.witness_places,
            )
            statistics = statistics.model_copy(update={"top_items": count})
        if statistics.top_items is not None:
            from common.sums import most_items

            most = most_items(statistics.symmetric, privacy.witness_places)
            if statistics.top_items > most:
                raise PlanError(
                    f"statistics.top_items is {statistics.top_items}, but one release holds the pairs of {most} "
                    "items at most: lower it"
                )
        metrics = metrics.model_copy(update={"noise_multiplier": found[Phase.METRICS]})
        sums = [GaussianSum(noise) for phase in shares if shares[phase] and (noise := found[phase])]
        if privacy.noise_multiplier is None and self.training.rounds:
            noise = calibrate_noise(
                privacy.epsilon,
                privacy.delta,
                sampling_rate=privacy.sampling_rate,
                steps=self.steps,
                spent=sums,
            )
            privacy = privacy.model_copy(update={"noise_multiplier": noise})
        plan = self.model_copy(update={"statistics": statistics, "metrics": metrics, "privacy": privacy})
        spent = epsilon_pld(plan.events(), privacy.delta)
        if spent > privacy.epsilon:
            raise PlanError(
                f"privacy.epsilon is {privacy.epsilon:g}, but the noise that the plan states comes to {spent:.4g}: "
                f"leave {', '.join(self._stated_noise())} out, so that it is calibrated, raise it, or promise that much"
            )
        return plan

    def _stated_noise(self) -> list[str]:
        stated = {
            "privacy.noise_multiplier": self.privacy.noise_multiplier,
            "statistics.popularity_noise_multiplier": self.statistics.popularity_noise_multiplier,
            "statistics.transition_noise_multiplier": self.statistics.transition_noise_multiplier,
            "metrics.noise_multiplier": self.metrics.noise_multiplier,
        }
        return [name for name, noise in stated.items() if noise is not None]

    def _sum_noise(self) -> dict[Phase, float | None]:
        return {
            Phase.POPULARITY: self.statistics.popularity_noise_multiplier,
            Phase.TRANSITIONS: self.statistics.transition_noise_multiplier,
            Phase.METRICS: self.metrics.noise_multiplier,
        }

    def for_catalog(self, digest: str) -> Plan:
        """The plan of a run over the catalog of this digest.

        Raises:
            PlanError: the plan is for another one.
        """
        self.check_catalog(digest)
        return self.model_copy(update={"catalog": digest})

    def check_catalog(self, digest: str) -> None:
        """Raises `PlanError` where the plan is for another catalog than that of this digest."""
        if self.catalog not in (None, digest):
            raise PlanError(
                f"the plan is for the catalog {self.catalog}, but the one here is {digest}: server and sites must "
                "read the same file, its items in the same order"
            )

    def schedule(self) -> tuple[Exchange, ...]:
        """Every round of the run, in order, with what it costs a site.

        Raises:
            PlanError: the plan is not calibrated yet.
        """
        before: list[tuple[Phase, Event]] = []
        noise = self._sum_noise()

        def sum_of(phase: Phase) -> tuple[Phase, Event]:
            value = noise[phase]
            if value is None:
                raise PlanError(f"the plan has no noise multiplier for {phase} yet: calibrate it first")
            return phase, GaussianSum(value)

        if self.statistics.popularity_share:
            before.append(sum_of(Phase.POPULARITY))
        if self.statistics.transition_share:
            before.append(sum_of(Phase.TRANSITIONS))
        rounds = self.training.rounds
        updates = [(Phase.UPDATE, self.round_event())] * rounds if rounds else []
        after = [sum_of(Phase.METRICS)] if self.metrics.share else []
        return tuple(
            Exchange(number, phase, event)
            for number, (phase, event) in enumerate([*before, *updates, *after], start=1)
        )

    def exchange(self, number: int, phase: Phase) -> Exchange:
        """The exchange of a round.

        Raises:
            PlanError: the plan has no such round, or it is of another phase, or it is not calibrated yet.
        """
        found = next((each for each in self.schedule() if each.round == number), None)
        if found is None or found.phase is not phase:
            raise PlanError(f"the plan has no round {number} of {phase}")
        return found

    def holds_adapters(self, number: int) -> bool:
        """Whether a round of fine-tuning leaves the adapters as they are."""
        updates = [each.round for each in self.schedule() if each.phase is Phase.UPDATE]
        return number in updates[: self.training.head_rounds]

    def precision(self, phase: Phase) -> Precision:
        """How the numbers of a release travel: sums are asked for once a run, and stay as they are."""
        return self.wire.precision if phase is Phase.UPDATE else "float32"

    def stated(self, phase: Phase) -> Stated:
        """What a reservation of this phase states beside its event."""
        if phase is Phase.UPDATE:
            return Stated(self.privacy.clip_norm, self.privacy.normaliser, self.training.learning_rate)
        return Stated(clip_norm=1.0, normaliser=1.0, learning_rate=None)  # each user adds norm 1 at most

    def events(self) -> list[Event]:
        """What the whole run costs each site."""
        return [exchange.event for exchange in self.schedule()]

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
        """sha256 over all that the plan says; a catalog that is unsaid is left out."""
        content = self.model_dump(mode="json", exclude={"catalog"} if self.catalog is None else set())
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as indented JSON, which `read_plan` reads back."""
        return self.model_dump_json(indent=2) + "\n"


_SITES_OWN = ("performance", "model.frozen_precision")
"""What plans once held: how a site computes, which the site alone decides."""
_SITES_OWN_SAID = (
    "how a site computes is no part of a plan: leave it out; each site sets it under [performance] in its policy.toml, "
    "and a simulation with `fedtide simulate` --device, --threads, --micro-batch, --dp-engine, --frozen-precision"
)


def make_plan(values: dict[str, Any]) -> Plan:
    """The plan of these values.

    Raises:
        PlanError: one line for each wrong value, with its place and its bound.
    """
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            place = ".".join(str(part) for part in fault["loc"]) or "plan"
            said = fault["msg"].removeprefix("Value error, ")
            if place in _SITES_OWN:
                lines.append(f"{place}: {_SITES_OWN_SAID}")
                continue
            if fault["type"] == "extra_forbidden":
                lines.append(unknown_key(Plan, place, "a plan"))
                continue
            given = fault["input"]
            shown = f" (given: {given!r})" if isinstance(given, str | int | float | None) else ""
            lines.append(f"{place}: {said[0].lower()}{said[1:]}{shown}")
        raise PlanError("; ".join(lines)) from error
    for section, part in plan:  # pydantic takes true for 1
        given = values.get(section)
        for field, value in given.items() if isinstance(given, dict) else ():
            if isinstance(value, bool) and not isinstance(getattr(part, field), bool):
                raise PlanError(f"{section}.{field}: input should be a number (given: {value!r})")
    return plan


def read_plan(path: Path) -> Plan:
    """The plan in a TOML or JSON file.

    Raises:
        PlanError: the file is missing, cannot be parsed, or holds a wrong value.
    """
    return make_plan(_values(path))


def read_recorded_plan(path: Path) -> Plan:
    """The plan that a run's folder recorded, where what plans once said of how sites compute is passed over.

    Raises:
        PlanError: the file is missing, cannot be parsed, or holds a wrong value.
    """
    values = _values(path)
    for place in _SITES_OWN:
        *sections, name = place.split(".")
        table: Any = values
        for section in sections:
            table = table.get(section) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table.pop(name, None)
    return make_plan(values)


def _values(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"the plan {path} cannot be read ({error.strerror}): give the path of a TOML or JSON file"
        ) from error
    except UnicodeDecodeError as error:
        raise PlanError(f"the plan {path} is no text: give the path of a TOML or JSON file") from error
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"the plan {path} cannot be parsed: {error}") from error
    if not isinstance(values, dict):
        raise PlanError(f"the plan {path} must be a table of sections")
    return values
