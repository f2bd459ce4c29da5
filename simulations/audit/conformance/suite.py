"""The whole of `fedtide audit conformance`: which checks are asked of what, and what they cannot show."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from client.self_test import Engine
from common.config import Plan
from common.models.names import FAMILIES
from common.phases import Phase
from simulations.audit.conformance.answers_of_sites import any_site_answers, same_answer_again
from simulations.audit.conformance.checking import LEVEL, attempted
from simulations.audit.conformance.code import Answers, Code, by_engine
from simulations.audit.conformance.controls import controls
from simulations.audit.conformance.controls_noise import controls_of_noise
from simulations.audit.conformance.controls_training import controls_of_answers
from simulations.audit.conformance.made_up_sites import (
    AGREED,
    LORA,
    PERFORMANCE,
    MadeUpSites,
    at_made_up_sites,
)
from simulations.audit.conformance.metrics_pairs import WIDE, metrics_sensitivity
from simulations.audit.conformance.noise import forked_noise, noise_checks
from simulations.audit.conformance.noise_shape import draw_sizes, shape_of_steps, shape_of_sums
from simulations.audit.conformance.pairs_of_sites import (
    Way,
    answer_sensitivity,
    numbers_that_are_none,
    unheard_user,
)
from simulations.audit.conformance.reply import reply_checks
from simulations.audit.conformance.rounds_of_sites import (
    answered_noise,
    exact_round,
    round_of_run,
    shares,
    stopped_clock,
)
from simulations.audit.conformance.sampling import USERS, forked_sampling, sampling
from simulations.audit.conformance.sensitivity import LOUDEST, OTHERS, rows_are_users, sensitivity
from simulations.audit.conformance.subjects import MODES, Subject, a_subject, devices
from simulations.audit.conformance.sums import sum_checks
from simulations.audit.evidence import Check, Evidence

WIDE_CATALOG, WIDE_ROUNDS, ROUNDS = 3000, 16, 6
STATISTICAL = (
    "noise level",
    "noise with users",
    "normal",
    "new noise",
    "tails",
    "other places",
    "same numbers",
    "sizes of draws",
    "forked noise",
    "sampling",
    "independent users",
    "independent steps",
    "sum noise",
    "shares",
    "answer noise",
    "new answer",
    "stopped clock",
)
"""Checks that honest code fails with chance LEVEL at most; the others it never fails."""

LIMITS = (
    "Made-up users and tiny models are put to the test: it refutes, it does not prove.",
    "It shows what the code at hand does, not that this code ran: a site that lies can run other code.",
    "Times of steps and of answers are not looked at.",
    "Generators are tested for width, shape, repetition and correlation, not for being unpredictable.",
)


@dataclass(frozen=True)
class Options:
    """What to test.

    Attributes:
        families, modes, devices: each with each.
        model: fields of a run's model plan, to be tested beside them; sizes are those of all subjects.
        plan: a run's own, whose privacy and training are tested beside the usual.
        with_controls: whether broken variants are put through the same checks.
        engine: of a step, at every site that is made up.
    """

    families: Sequence[str] = tuple(FAMILIES)
    modes: Sequence[str] = MODES
    devices: Sequence[str] | None = None
    model: Mapping[str, Any] | None = None
    plan: Plan | None = None
    with_controls: bool = True
    engine: Engine = "fast"


Ask = tuple[str, str, Callable[[], Sequence[Check]]]


class Workshop:
    """Where subjects are made, each once."""

    def __init__(self, folder: Path, engine: Engine = "fast") -> None:
        self.folder, self.engine = folder, engine
        self._made: dict[str, Subject] = {}
        self._sites: dict[str, MadeUpSites] = {}

    def subject(self, **fields: Any) -> Subject:
        """A subject of these fields (see `a_subject`)."""
        name = repr(sorted(fields.items()))
        if name not in self._made:
            self._made[name] = a_subject(self.folder, **fields)
        return self._made[name]

    def sites(self, **fields: Any) -> MadeUpSites:
        """Sites in folders of their own (see `MadeUpSites`)."""
        name = repr(sorted(fields.items()))
        if name not in self._sites:
            performance = PERFORMANCE.model_copy(update={"engine": self.engine})
            place = f"sites-{len(self._sites)}"
            self._sites[name] = MadeUpSites(self.folder, place, performance=performance, **fields)
        return self._sites[name]

    def way(self, name: str, path: Answers, **fields: Any) -> Way:
        """From a request to an answer, at those sites."""
        return Way(self.sites(**fields), name, path)


def conformance(
    options: Options,
    code: Code,
    *,
    command: str = "",
    on_step: Callable[[int, int], None] | None = None,
    workshop: Workshop | None = None,
) -> Evidence:
    """All checks of some code.

    Args:
        on_step: told how many of how many questions are answered.
        workshop: where subjects are kept from one call to the next; one of its own if left out.
    """
    began, checks = time.monotonic(), list[Check]()
    with (
        tempfile.TemporaryDirectory(prefix="fedtide-conformance-") as name,
        _one_thread(),
        at_made_up_sites(Path(name)),
    ):
        code = replace(code, trainer=by_engine(options.engine, code.trainer))
        questions = list(_questions(options, code, workshop or Workshop(Path(name), options.engine)))
        for number, (what, of, ask) in enumerate(questions, start=1):
            checks += attempted(what, of, ask)
            if on_step is not None:
                on_step(number, len(questions))
    by_chance = sum(check.name in STATISTICAL and not check.control for check in checks)
    return Evidence(
        tool="conformance",
        command=command,
        checks=checks,
        parameters={
            "level": LEVEL,
            "statistical_checks": by_chance,
            "false_alarm_of_all": by_chance * LEVEL,
            "families": list(options.families),
            "modes": list(options.modes),
            "devices": list(options.devices or devices()),
            "engine": options.engine,
            "others": list(OTHERS),
            "loudest_user_in_clip_norms": LOUDEST,
        },
        limits=LIMITS,
        seconds=time.monotonic() - began,
    )


def _questions(options: Options, code: Code, workshop: Workshop) -> Iterator[Ask]:
    for device in options.devices or devices():
        models = [{"family": family, "mode": mode} for family in options.families for mode in options.modes]
        if options.model is not None and options.model not in models:
            models.append(dict(options.model))
        for model in models:
            place = f"{model['family']}, {model['mode']}, {device}"
            yield from _of_model(partial(workshop.subject, device=device, **model), place, code)
        yield from _of_device(workshop, device, code)
    for name, path in code.paths.items():
        yield from _of_answers(partial(workshop.way, name, path), name)
        lora = partial(workshop.way, f"{name}, lora", path, **LORA)
        yield from _of_language_model(lora, f"{name}, lora")
        if options.plan is not None and options.plan.privacy.noise_multiplier is not None:
            yield "exact round", f"{name}, the run's plan", partial(_of_run, workshop, options, name, path)
    yield "nothing else leaves", "reply", lambda: reply_checks(code, workshop.folder)
    if options.with_controls:
        yield "controls", "controls", lambda: controls(code, workshop.folder)
        small = partial(workshop.subject, family="recommend", mode="vectors", device="cpu")
        for name, ask in controls_of_answers(code, workshop.sites, small):
            yield "controls", name, ask
        subjects = {
            "small": small,
            "many places": partial(small, items=WIDE_CATALOG),
            "wide layers": partial(small, **WIDE),
        }
        yield "controls", "noise", lambda: controls_of_noise(subjects, code)


def _of_model(subject: Callable[[], Subject], place: str, code: Code) -> Iterator[Ask]:
    yield "rows are users", place, lambda: rows_are_users(subject())
    yield "sensitivity", place, lambda: sensitivity(subject(), code)
    yield "noise level", place, lambda: noise_checks(subject(), code, ROUNDS)


def _of_answers(way: Callable[[], Way], name: str) -> Iterator[Ask]:
    """From request to decoded update, at the plan's own numbers; the family is the same for all."""
    yield "answer sensitivity", name, lambda: answer_sensitivity(way())
    yield "unheard user", name, lambda: unheard_user(way())
    yield "no number", name, lambda: numbers_that_are_none(way())
    yield "no number", f"{name}, metrics", lambda: numbers_that_are_none(way(), Phase.METRICS)
    yield "exact round", name, lambda: exact_round(way())
    yield "shares", name, lambda: shares(way())
    yield "answer noise", name, lambda: answered_noise(way())
    yield "any site", name, lambda: any_site_answers(way())
    yield "same answer", name, lambda: same_answer_again(way())


def _of_language_model(way: Callable[[], Way], name: str) -> Iterator[Ask]:
    """What goes another way through a site where histories are read by a language model."""
    yield "answer sensitivity", name, lambda: answer_sensitivity(way(), loudness=(16.0,))
    yield "exact round", name, lambda: exact_round(way(), steps=10)


def _of_run(workshop: Workshop, options: Options, name: str, path: Answers) -> Sequence[Check]:
    """A round of the run's own plan."""
    assert options.plan is not None
    fields = {**(options.model or {}), "max_events": options.plan.model.max_events}
    agreed = max(AGREED, options.plan.privacy.users_per_site)
    way = workshop.way(f"{name}, the run's plan", path, agreed=agreed, **fields)
    return round_of_run(way, options.plan)


def _of_device(workshop: Workshop, device: str, code: Code) -> Iterator[Ask]:
    """What does not depend on the family, with a model of many coordinates or of separable users."""
    usual = partial(workshop.subject, family="recommend", mode="vectors", device=device)
    small, wide = usual, partial(usual, items=WIDE_CATALOG)
    separable = partial(usual, items=3 * USERS, off_start=0.0)
    yield "noise level", f"{WIDE_CATALOG} items, {device}", lambda: noise_checks(wide(), code, WIDE_ROUNDS)
    yield "tails", f"{WIDE_CATALOG} items, {device}", lambda: shape_of_steps(wide(), code, WIDE_ROUNDS)
    yield "tails", f"sums, {device}", lambda: shape_of_sums(code)
    yield "sizes of draws", device, lambda: draw_sizes(small(), code)
    yield "sampling", device, lambda: sampling(separable(), code)
    if device == "cpu":  # a copy of a process cannot use CUDA
        yield "forked noise", device, lambda: forked_noise(small(), code)
        yield "forked sampling", device, lambda: forked_sampling(separable(), code)
    yield "stopped clock", device, lambda: stopped_clock(small(), code)
    yield "sum noise", device, lambda: sum_checks(small(), code)
    wide_layers = partial(usual, **WIDE)
    yield "sum sensitivity", f"metrics, {device}", lambda: metrics_sensitivity(wide_layers(), code)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models as small as these are slower on many threads; and no copy of the process may need any."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
