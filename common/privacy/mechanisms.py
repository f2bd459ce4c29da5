"""The two mechanisms that Fedtide knows, as events from which every epsilon is recomputed.

An event says everything that its privacy cost depends on, its meaning never changes, and what is not
understood is refused. Epsilons are never stored; accountants (`accountants.py`) derive them from events.
Adjacency everywhere: add or remove one user of one site, with all of that user's events.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import ClassVar

SMALLEST_NOISE_MULTIPLIER = 0.1
"""Below this an event is refused: no accountant here gives a figure that anyone should act upon."""

MOST_STEPS = 10_000_000


class UnknownMechanismError(ValueError):
    """An event names a mechanism, or a field of one, that this version does not understand."""


def _check(name: str, value: float, *, above: float, at_most: float, way_out: str) -> None:
    if not math.isfinite(value) or not above < value <= at_most:
        raise ValueError(f"{name} is {value}, but must lie in ({above:g}, {at_most:g}]: {way_out}")


@dataclass(frozen=True, slots=True)
class PoissonSubsampledGaussian:
    """DP-SGD: `steps` Gaussian sums, each over users drawn independently at `sampling_rate`.

    Attributes:
        sampling_rate: q in (0, 1], a public constant.
        noise_multiplier: standard deviation of the noise divided by the clip norm.
        steps: number of sums reserved; an upper bound on the number released.
    """

    kind: ClassVar[str] = "poisson_subsampled_gaussian"
    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        _check(
            "sampling_rate",
            self.sampling_rate,
            above=0,
            at_most=1,
            way_out="choose a public constant in (0, 1]",
        )
        _check(
            "noise_multiplier",
            self.noise_multiplier,
            above=SMALLEST_NOISE_MULTIPLIER * (1 - 1e-12),
            at_most=1e6,
            way_out="choose a larger epsilon or fewer steps",
        )
        if (
            isinstance(self.steps, bool)
            or not isinstance(self.steps, int)
            or not 1 <= self.steps <= MOST_STEPS
        ):
            raise ValueError(f"steps is {self.steps}, but must be a whole number in [1, {MOST_STEPS}]")


@dataclass(frozen=True, slots=True)
class GaussianSum:
    """One Gaussian sum over all users, each user's contribution scaled to norm at most 1.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by the contribution norm.
    """

    kind: ClassVar[str] = "gaussian_sum"
    noise_multiplier: float

    def __post_init__(self) -> None:
        _check(
            "noise_multiplier",
            self.noise_multiplier,
            above=SMALLEST_NOISE_MULTIPLIER * (1 - 1e-12),
            at_most=1e6,
            way_out="choose a larger epsilon",
        )


Event = PoissonSubsampledGaussian | GaussianSum


def number_to_text(value: float | int) -> str:
    """The shortest decimal string that reads back as the same number ("0.25", "3"): how numbers travel."""
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number, and only those travel")
    if isinstance(value, int):
        return str(value)
    text = format(Decimal(repr(float(value))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def text_to_number(text: str) -> float:
    """The float that a canonical decimal string stands for; any other spelling of it is refused.

    Raises:
        ValueError: the text is not what `number_to_text` writes.
    """
    if not isinstance(text, str) or not 1 <= len(text) <= 64:
        raise ValueError("a number must travel as a decimal string of 1 to 64 characters")
    try:
        value = float(Decimal(text))
    except (InvalidOperation, OverflowError) as error:
        raise ValueError(f"{text!r} is no decimal number") from error
    if not math.isfinite(value) or number_to_text(value) != text:
        raise ValueError(f"{text!r} is not the canonical spelling of a finite number")
    return value


def event_to_fields(event: Event) -> dict[str, str]:
    """The event as strings, for canonical JSON."""
    match event:
        case PoissonSubsampledGaussian():
            return {
                "mechanism": event.kind,
                "noise_multiplier": number_to_text(event.noise_multiplier),
                "sampling_rate": number_to_text(event.sampling_rate),
                "steps": number_to_text(event.steps),
            }
        case GaussianSum():
            return {"mechanism": event.kind, "noise_multiplier": number_to_text(event.noise_multiplier)}


def event_from_fields(fields: Mapping[str, object]) -> Event:
    """The event that `event_to_fields` wrote.

    Raises:
        UnknownMechanismError: another mechanism, a missing field, or one too many.
        ValueError: a number out of its bounds or not in canonical spelling.
    """
    kinds: dict[str, set[str]] = {
        PoissonSubsampledGaussian.kind: {"mechanism", "noise_multiplier", "sampling_rate", "steps"},
        GaussianSum.kind: {"mechanism", "noise_multiplier"},
    }
    kind = fields.get("mechanism")
    if not isinstance(kind, str) or kind not in kinds:
        raise UnknownMechanismError(f"mechanism {kind!r} is unknown; known are {', '.join(sorted(kinds))}")
    if set(fields) != kinds[kind]:
        odd = ", ".join(sorted(str(name) for name in set(fields) ^ kinds[kind]))
        raise UnknownMechanismError(f"an event of mechanism {kind} has missing or unknown fields: {odd}")

    def number(name: str) -> float:
        text = fields[name]
        if not isinstance(text, str):
            raise ValueError(f"{name} must travel as a decimal string")
        return text_to_number(text)

    if kind == GaussianSum.kind:
        return GaussianSum(noise_multiplier=number("noise_multiplier"))
    steps = number("steps")
    if steps != int(steps):
        raise ValueError(f"steps is {steps}, but must be a whole number")
    return PoissonSubsampledGaussian(
        sampling_rate=number("sampling_rate"), noise_multiplier=number("noise_multiplier"), steps=int(steps)
    )
