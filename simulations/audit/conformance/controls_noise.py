"""Positive controls of the noise's shape and of sums: sabotages, each put to the check that is meant to see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from simulations.audit.conformance.code import Code
from simulations.audit.conformance.controls import refused
from simulations.audit.conformance.metrics_pairs import metrics_sensitivity
from simulations.audit.conformance.noise_shape import draw_sizes, shape_of_steps, shape_of_sums
from simulations.audit.conformance.sabotages import SABOTAGES, Sabotage
from simulations.audit.conformance.subjects import Subject
from simulations.audit.conformance.sums import sum_checks
from simulations.audit.evidence import Check

Subjects = Mapping[str, Callable[[], Subject]]
"""Models by what they are: `small`, of `many places`, of `wide layers`."""

Ask = Callable[[Subjects, Code], Sequence[Check]]


def _steps(subjects: Subjects, code: Code) -> Sequence[Check]:
    return shape_of_steps(subjects["many places"](), code, 6)


def _sums(_: Subjects, code: Code) -> Sequence[Check]:
    return shape_of_sums(code)


def _sizes(subjects: Subjects, code: Code) -> Sequence[Check]:
    return draw_sizes(subjects["small"](), code)


def _sum(name: str) -> Ask:
    return lambda subjects, code: sum_checks(subjects["small"](), code, only=(name,))


def _ranks(subjects: Subjects, code: Code) -> Sequence[Check]:
    return metrics_sensitivity(subjects["wide layers"](), code, offs=(3.0, 10.0))


SEEN_BY: Sequence[tuple[str, str, Ask]] = (
    ("second half negated", "other places", _steps),
    ("last draw turned", "other places", _steps),
    ("second half negated", "same numbers", _sums),
    ("last draw shuffled", "same numbers", _sums),
    ("four uniforms", "tails", _sums),
    ("cut at three", "tails", _sums),
    ("large draws again", "sizes of draws", _sizes),
    ("noise in float32", "grid", _steps),
    ("many places unscaled", "sum sensitivity", _sum("transitions")),
    ("heavy items unscaled", "sum sensitivity", _sum("popularity")),
    ("long histories in two", "sum sensitivity", _sum("transitions")),
    ("ranked as they come", "sum sensitivity", _ranks),
)
"""A sabotage, the check that must see it, and how that is asked."""


def controls_of_noise(subjects: Subjects, code: Code) -> list[Check]:
    """Whether each sabotage of `SEEN_BY` was refused by the check that is meant to refuse it."""
    return [
        refused(check, SABOTAGES[name].does, partial(_asked, SABOTAGES[name], ask, subjects, code))
        for name, check, ask in SEEN_BY
    ]


def _asked(sabotage: Sabotage, ask: Ask, subjects: Subjects, code: Code) -> Sequence[Check]:
    with sabotage.at_work():
        return ask(subjects, code)
