"""Positive controls of what is asked of whole answers: sabotages, each put to the check that is meant to see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from common.phases import Phase
from simulations.audit.conformance.answers_of_sites import any_site_answers, same_answer_again
from simulations.audit.conformance.code import Code
from simulations.audit.conformance.controls import refused
from simulations.audit.conformance.made_up_sites import LORA, MadeUpSites
from simulations.audit.conformance.pairs_of_sites import (
    Way,
    answer_sensitivity,
    numbers_that_are_none,
    unheard_user,
)
from simulations.audit.conformance.rounds_of_sites import (
    answered_noise,
    exact_round,
    shares,
    stopped_clock,
)
from simulations.audit.conformance.sabotages import SABOTAGES
from simulations.audit.conformance.subjects import Subject
from simulations.audit.evidence import Check

Ask = Callable[[Way], Sequence[Check]]

_LOUD, _LOUDER = (partial(answer_sensitivity, loudness=(each,), units=1) for each in (16.0, 1e3))
_ROUND = partial(exact_round, steps=110)

SEEN_BY: Mapping[str, tuple[str, Ask]] = {
    "clip factor with a floor": ("answer sensitivity", _LOUDER),
    "biases out of the norm": ("answer sensitivity", _LOUD),
    "later units clipped to 10 C": ("answer sensitivity", partial(_LOUD, units=6)),
    "largest layer's norm": ("answer sensitivity", _LOUD),
    "long users in two rows": ("answer sensitivity", _LOUD),
    "adapters not clipped": ("answer sensitivity", _LOUD),
    "C read doubled": ("answer sensitivity", _LOUD),
    "together: norm up to 40 C": ("answer sensitivity", _LOUDER),
    "update scaled by users": ("answer own row", _LOUD),
    "together: users of all sites counted": ("other site", _LOUD),
    "users in the lowest bits": ("unheard user", unheard_user),
    "breaks off at inf": ("no number", numbers_that_are_none),
    "metrics fail at inf": ("no number", partial(numbers_that_are_none, phase=Phase.METRICS)),
    "all noise in the last step": ("exact round", _ROUND),
    "a step in a hundred bare": ("exact round", _ROUND),
    "later steps half noised": ("exact round", _ROUND),
    "normaliser read halved": ("exact round", _ROUND),
    "learning rate read doubled": ("exact round", _ROUND),
    "batches with replacement": ("draws", _ROUND),
    "q read doubled": ("draws", _ROUND),
    "q doubled after step 200": ("shares", shares),
    "long users drawn more often": ("shares", shares),
    "sigma read halved": ("answer noise", answered_noise),
    "together: one noise": ("new answer", answered_noise),
    "few users refused": ("any site", any_site_answers),
    "retry noised again": ("same answer", same_answer_again),
}
"""Sabotage -> the check that must see it, and how it is asked."""

CLOCK = "clock for a key"


def controls_of_answers(
    code: Code, sites: Callable[..., MadeUpSites], small: Callable[[], Subject]
) -> Iterator[tuple[str, Callable[[], Sequence[Check]]]]:
    """The sabotages' names, and what to ask of each."""
    one, together = code.paths.items()
    for name, (check, ask) in SEEN_BY.items():
        path = together if name.startswith("together") else one

        def asked(
            name: str = name, check: str = check, ask: Ask = ask, path: tuple[str, Any] = path
        ) -> list[Check]:
            fields = LORA if SABOTAGES[name].mode == "lora" else {}
            way = Way(sites(**fields), *path)
            with SABOTAGES[name].at_work():
                return [refused(check, SABOTAGES[name].does, lambda: ask(way))]

        yield name, asked

    def without_clock() -> list[Check]:
        with SABOTAGES[CLOCK].at_work():
            return [refused("stopped clock", SABOTAGES[CLOCK].does, lambda: stopped_clock(small(), code))]

    yield CLOCK, without_clock
