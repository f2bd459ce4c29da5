"""What a site allows to run on it, whatever a server says: `policy.toml` in the site's folder, checked when loaded.

Every bound is a public constant that the administrator sets. How a plan is held against them is in `plan_check.py`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from common.models.names import CORES, FAMILIES, TASKS, FrozenPrecision
from common.phases import FROZEN
from common.privacy.mechanisms import (
    MOST_STEPS,
    SMALLEST_NOISE_MULTIPLIER,
)
from common.unknown_keys import unknown_key

POLICY = "policy.toml"

Noise = Annotated[float, Field(ge=SMALLEST_NOISE_MULTIPLIER, le=1e6)]
Delta = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Names = tuple[str, ...]
MODES = ("vectors", "lora")


class PolicyError(ValueError):
    """A site's policy is wrong; the message names the value, the bound and the way out."""


class Performance(BaseModel):
    """How a site computes: on what, and how much at once. No part of a plan can say any of it.

    Attributes:
        engine: how a step's clipped sum is made: `fast`, or `opacus` for Opacus' own hooks; the same to rounding.
        micro_batch: users in the largest unit of rows: a step's memory follows it.
        threads: of the arithmetic; None takes as many as there are cores, but four at most.
        device: `cpu`; `cuda`, an accelerator; or `auto`, one where there is one.
        frozen_precision: of a language model's frozen weights, in mode lora.
    """

    model_config = FROZEN

    engine: Literal["fast", "opacus"] = "fast"
    micro_batch: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = 96
    threads: Annotated[int, Field(ge=1, le=64)] | None = None
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    frozen_precision: FrozenPrecision = "float32"


class Limits(BaseModel):
    """Bounds that a plan must keep, all of them public constants.

    By default what a run may spend is bounded by the ledger's budget alone, and the rest so that plans of ordinary size
    pass, and none that exhausts a machine.

    Attributes:
        bundles: sha256 of the bundles that may run; none: that of the version that is installed here.
        language_models: name in a plan -> the site's own folder, empty for one that Fedtide verifies itself; None
            allows any that is on this machine.
        noise_for_updates, noise_for_sums: smallest noise multipliers.
        rounds, steps_per_round: most of one run.
        epsilon: largest of one run, computed here from the plan's own noise.
        delta: at which `epsilon` is computed; the plan's own where left out.
        clip_norm: largest.
        least_clip_norm: smallest: far above what rounding makes of a gradient that is zero.
        cores, modes, tasks: that may be trained.
        width, hidden_width, max_events, negatives: largest of the model; `hidden_width` bounds codes' widths too.
        most_tokens, lora_rank, lora_layers: largest in mode lora.
        statistics_events, statistics_gaps: largest of statistics.
        memory: most that a step's unit of rows may need, in GiB (`unit_memory.py`).
    """

    model_config = FROZEN

    bundles: tuple[str, ...] = ()
    language_models: dict[str, str] | None = None
    noise_for_updates: Noise = SMALLEST_NOISE_MULTIPLIER
    noise_for_sums: Noise = SMALLEST_NOISE_MULTIPLIER
    rounds: Annotated[int, Field(ge=1, le=200_000)] = 10_000
    steps_per_round: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 1000
    epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    delta: Delta | None = None
    clip_norm: Annotated[float, Field(gt=0, le=1e4)] = 1e4
    least_clip_norm: Annotated[float, Field(gt=0, le=1e4)] = 1e-4
    cores: Names = tuple(CORES)
    modes: Names = MODES
    tasks: Names = tuple(TASKS)
    width: Count = 512
    hidden_width: Count = 512
    max_events: Count = 500
    negatives: Count = 10_000
    most_tokens: Count = 1024
    lora_rank: Count = 64
    lora_layers: Count = 12
    statistics_events: Count = 10_000
    statistics_gaps: Count = 100
    memory: Annotated[float, Field(gt=0, le=1e9)] = 8.0

    @field_validator("cores", "modes", "tasks")
    @classmethod
    def _names(cls, names: Names, field: ValidationInfo) -> Names:
        known = {"cores": CORES, "modes": MODES, "tasks": TASKS}[field.field_name or ""]
        for each in names:
            if each not in known:
                raise ValueError(f"{each!r} is unknown: choose among {', '.join(known)}")
        return names

    @field_validator("bundles")
    @classmethod
    def _hashes(cls, bundles: tuple[str, ...]) -> tuple[str, ...]:
        for each in bundles:
            if not re.fullmatch("[0-9a-f]{64}", each):
                raise ValueError(f"{each!r} is no sha256: give 64 small hex digits")
        return bundles


ANY_PLAN = Limits(
    rounds=200_000,
    steps_per_round=MOST_STEPS,
    least_clip_norm=1e-12,
    width=4096,
    hidden_width=4096,
    max_events=100_000,
    negatives=2**62,
    most_tokens=8192,
    lora_rank=4096,
    lora_layers=4096,
    statistics_events=100_000,
    statistics_gaps=1000,
    memory=1e9,
)
"""Bounds that no plan is beyond: of simulated sites, whose plans are their researcher's own."""


class Policy(Limits):
    """All that `policy.toml` says.

    Attributes:
        families: that may be trained here; each member of an ensemble too.
        users_at_least: the public lower bound of users that the site has agreed to.
        metrics: whether metrics may be released, when a plan asks for them and the budget allows.
        offline: whether language models are taken from this machine only.
        performance: how this site computes.
    """

    users_at_least: Annotated[int, Field(ge=1)]
    families: tuple[str, ...] = ("recommend",)
    metrics: bool = False
    offline: bool = True
    performance: Performance = Performance()

    @field_validator("families")
    @classmethod
    def _known(cls, families: tuple[str, ...]) -> tuple[str, ...]:
        for each in families:
            if each not in FAMILIES:
                raise ValueError(f"family {each!r} is unknown: choose among {', '.join(FAMILIES)}")
        return families

    @property
    def limits(self) -> Limits:
        """The bounds alone."""
        return Limits(**{name: getattr(self, name) for name in Limits.model_fields})


def read_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        PolicyError: it cannot be read, or a value is wrong: one part for each, with its place and its bound.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PolicyError(f"the policy {path} cannot be read: {error}") from error
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        raise PolicyError(f"the policy {path} is wrong: {fault_lines(error, Policy, 'a policy')}") from error


def performance_of(*, engine_option: str = "--engine", **given: Any) -> Performance:
    """How a site computes, from what was given; what is None is as it is by default.

    Args:
        engine_option: by which the command that asks takes `engine`.
        given: by the names of `Performance`, which are those of options.

    Raises:
        PolicyError: a value is wrong; names its option.
    """
    options = {name: f"--{name.replace('_', '-')}" for name in given} | {"engine": engine_option}
    try:
        return Performance.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise PolicyError(fault_lines(error, Performance, "[performance]", options)) from error


def fault_lines(
    error: ValidationError, schema: type[BaseModel], what: str, options: Mapping[str, str] | None = None
) -> str:
    """A line for each fault of what was read by a schema.

    Args:
        what: is read by that schema, for the message: "a policy".
        options: place -> the option by which it was given.
    """
    lines = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"])
        place = (options or {}).get(place, place)
        said = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            lines.append(unknown_key(schema, place, what))
            continue
        given = fault["input"]
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | None) else ""
        lines.append(f"{place}: {said[0].lower()}{said[1:]}{shown}")
    return "; ".join(lines)


_EXPLAINED = {
    "users_at_least": "Public lower bound of users: sums are divided by it, and a plan may count on no more.",
    "families": "Model families that may be trained here; of an ensemble each member too.",
    "metrics": "Whether noisy metrics may be released, when a plan asks for them and the budget allows.",
    "offline": "Whether language models are taken from this machine only.",
    "bundles": "sha256 of bundles that may run here; empty: that of the version installed here.",
    "noise_for_updates": "Smallest noise multiplier of updates.",
    "noise_for_sums": "Smallest noise multiplier of statistics and metrics.",
    "rounds": "Most rounds of one run.",
    "steps_per_round": "Most steps of one round.",
    "epsilon": "Largest epsilon of one run, computed here from the plan's noise.",
    "delta": "At which that epsilon is computed.",
    "clip_norm": "Largest clip norm.",
    "least_clip_norm": "Smallest clip norm: far above what rounding makes of a gradient that is zero.",
    "cores": "Temporal cores that may be trained.",
    "modes": 'How a language model is used: "vectors" (frozen) or "lora" (adapters are trained).',
    "tasks": "What may be predicted.",
    "width": "Largest width of item vectors.",
    "hidden_width": "Largest width of a core's state, and of codes.",
    "max_events": "Most events of a history that a model reads.",
    "negatives": "Most public negatives in the loss.",
    "most_tokens": "lora: most tokens of a history.",
    "lora_rank": "lora: largest rank of adapters.",
    "lora_layers": "lora: most layers with adapters.",
    "statistics_events": "Most events of a history that statistics count.",
    "statistics_gaps": "statistics: how many events apart two items may be at most.",
    "memory": "Most memory, in GiB, for what a step computes at once; see micro_batch.",
    "language_models": "Language models that a plan may name = the site's own folder, "
    "or empty for one that Fedtide verifies itself.",
    "performance": "How this site computes. No server and no plan can set any of it.",
}

_PERFORMANCE_EXPLAINED = {
    "engine": 'How a step\'s clipped sum is made: "fast", or "opacus" for Opacus\' own hooks.',
    "micro_batch": "Users in a unit of rows, which a step computes at once and always whole: its memory follows it.",
    "threads": "Of the arithmetic; left out: as many as there are cores, but four at most.",
    "device": 'Where it is computed: "cpu"; "cuda", an accelerator; or "auto", an accelerator where there is one.',
    "frozen_precision": 'Of a language model\'s frozen weights in mode lora: "float32" or "bfloat16".',
}


def policy_text(policy: Policy) -> str:
    """The file of a policy, each value with a line that says what it is."""
    lines = ["# What this site allows, whatever a server asks. Read again at each request.", ""]
    for name, explained in _EXPLAINED.items():
        value = getattr(policy, name)
        if value is None:
            continue
        lines.append(f"# {explained}")
        if isinstance(value, Performance):
            lines.append(f"[{name}]")
            for own, said in _PERFORMANCE_EXPLAINED.items():
                given = getattr(value, own)
                lines += [
                    f"# {said}",
                    f"{own} = {json.dumps(given)}" if given is not None else f"# {own} = 1",
                ]
        elif isinstance(value, dict):
            lines += [f"[{name}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())]
        else:
            lines.append(f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
        lines.append("")
    return "\n".join(lines)
