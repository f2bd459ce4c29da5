"""Whole rounds, from request to decoded update: computed again from the plan, who took part, and whose noise it is."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

from client.generators import Generators
from common.config import Plan
from common.privacy.noise import INFLATION, GaussianNoise
from common.privacy.statistics import noise_chi_square
from simulations.audit.conformance.by_hand import constants_of, train_by_hand
from simulations.audit.conformance.checking import Vector, at_most, corrected, statistical
from simulations.audit.conformance.code import Code, Everyone, SameAgain
from simulations.audit.conformance.made_up_sites import (
    ITEMS,
    MAX_EVENTS,
    WITNESS_PLACES,
    Draws,
    Recorded,
    Rows,
    distance,
    in_sums,
)
from simulations.audit.conformance.noise import fresh
from simulations.audit.conformance.pairs_of_sites import LONG, LOUD, Way
from simulations.audit.conformance.subjects import Subject, in_steps, one_step
from simulations.audit.evidence import Check
from simulations.audit.trainers import Silence

STEPS = 210
"""Of a long round: enough for what happens in one step of a hundred, or after two hundred, to happen."""
EXACT = 0.05
"""How far a round may lie from the same computed by hand, in units of C: float32, over so many steps."""
RATE = 0.3

USERS_OF_EACH: Sequence[Rows] = ([LOUD, [4, 5], LONG, [3, 5, 9]], [LONG, [8, 9, 1, 2]])
"""Of the two sites whose rounds are computed again."""

SHARED_STEPS = 260
MOST_STEPS = 2000
"""Of a run's round that is computed by hand."""


@dataclass
class _Replayed:
    """A sampler that gives out what was drawn before."""

    masks: Iterator[npt.NDArray[np.bool_]]

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        """As it was drawn."""
        return next(self.masks)


def exact_round(way: Way, steps: int = STEPS) -> list[Check]:
    """`exact round` and `draws` of a long round with much noise and a small learning rate; see `round_of`."""
    loud = way.loudness(LOUD) / 16
    return round_of(way, way.sites.plan(loud, steps=steps, rate=RATE, noise=20.0, moves=0.001))


def round_of(way: Way, plan: Plan) -> list[Check]:
    """`exact round` and `draws`: each site's update is the plan's round over what the site was given to draw from."""
    settings = constants_of(plan)
    samplers = [Recorded() for _ in USERS_OF_EACH]
    draws = Draws(*samplers)
    released = way.sites.released(way.path, plan, USERS_OF_EACH, draws.again())
    odd, worst = list[str](), 0.0
    for site, (rows, sampler) in enumerate(zip(USERS_OF_EACH, samplers, strict=True)):
        stream = draws.streams[site] if site < len(draws.streams) else SameAgain()
        if sampler.asked != [(len(rows), settings.sampling_rate)] * settings.steps:
            rates = sorted({rate for _, rate in sampler.asked})
            odd.append(f"users were drawn {len(sampler.asked)} times at {rates or 'no rate'}")
        if len(stream.drawn) != settings.steps:
            odd.append(f"noise was drawn {len(stream.drawn)} times")
        if min(len(stream.drawn), len(sampler.drawn)) < settings.steps:
            continue
        way.sites.model.load_trainable(way.sites.start)
        wanted = train_by_hand(
            way.sites.model,
            way.sites.batch(rows),
            settings,
            sampler=_Replayed(iter(sampler.drawn)),
            noise=stream.rewind(),
        )
        worst = max(worst, distance(in_sums(released[site], plan), in_sums(wanted, plan)))
    said = "; ".join(odd) or f"users once a step at {settings.sampling_rate:g}, noise once a step"
    return [
        Check(
            "draws",
            way.name,
            float(len(odd)),
            f"{settings.steps} times each, at the plan's rate",
            not odd,
            f"In a round of {settings.steps} steps: {said}.",
        ),
        at_most(
            "exact round",
            way.name,
            worst,
            EXACT,
            f"A round of {settings.steps} steps lies {worst:.2g} C from the same round computed from the plan by hand.",
        ),
    ]


def round_of_run(way: Way, run: Plan) -> list[Check]:
    """The same with a run's own privacy and training, over users and a model that are made up.

    Where steps are so long that rounding grows from each to the next, only as many are taken as can be followed.
    """
    privacy = run.privacy.model_copy(update={"witness_places": WITNESS_PLACES})
    training = run.training.model_copy(update={"rounds": 1, "head_rounds": 0})
    plan = way.sites.plan(run.privacy.clip_norm)
    for steps in _fewer(training.steps_per_round):
        part = training.model_copy(update={"steps_per_round": steps})
        plan = plan.model_copy(update={"privacy": privacy, "training": part})
        if _strays(way, plan) <= EXACT / 100:
            break
    return round_of(way, plan)


def _fewer(steps: int) -> Iterator[int]:
    steps = min(steps, MOST_STEPS)
    while steps > 1:
        yield steps
        steps //= 4
    yield 1


def _strays(way: Way, plan: Plan) -> float:
    """How far a round by hand strays where it begins one rounding of float32 away, in units of C."""
    samplers, noise, found = (Everyone(), Everyone()), SameAgain(), list[Vector]()
    for off, sampler in zip((1.0, 1 + 2**-23), samplers, strict=True):
        way.sites.model.load_trainable({name: off * value for name, value in way.sites.start.items()})
        update = train_by_hand(
            way.sites.model,
            way.sites.batch(USERS_OF_EACH[0]),
            constants_of(plan),
            sampler=sampler,
            noise=noise.rewind(),
        )
        found.append(in_sums(update, plan))
    return distance(*found)


def shares(way: Way, steps: int = SHARED_STEPS) -> list[Check]:
    """`shares`: how often each user took part in a long round, read from the update, at the plan's own rate."""
    rate, users = 0.25, ITEMS // 3
    rows = [
        [3 * user, 3 * user + 1, 3 * user + 2] * (1 if user % 2 else MAX_EVENTS // 3) for user in range(users)
    ]
    plan = way.sites.plan(0.05, steps=steps, rate=rate, moves=1e-5)
    start = way.sites.fresh
    way.sites.model.load_trainable(start)
    alone = replace(constants_of(plan), steps=1)
    directions = []
    for user in range(users):
        way.sites.model.load_trainable(start)
        one = train_by_hand(
            way.sites.model, way.sites.batch([rows[user]]), alone, sampler=Everyone(), noise=Silence()
        )
        directions.append(in_sums(one, plan))
    released = way.sites.released(
        way.path, plan, [rows, rows[: users // 2]], Generators(noise=Silence), state=start
    )
    found, p_values = list[float](), list[float]()
    for update, present in zip(released, (users, users // 2), strict=True):
        known = np.stack(directions[:present]).T
        counts = np.linalg.lstsq(known, in_sums(update, plan), rcond=None)[0]
        if not (abs(counts - np.round(counts)) < 0.25).all():
            raise ValueError("a round is no sum of its users' clipped gradients, so shares cannot be read")
        whole = np.round(counts).astype(np.int64)
        found.append(float(whole.mean() / steps))
        p_values += _binomial_p_values(whole, steps, rate)
    return [
        statistical(
            "shares",
            way.name,
            max(found, key=lambda each: abs(each - rate)),
            corrected(p_values),
            f"{rate:g} for each user, whether of few events or many",
            f"Users took part in {', '.join(f'{each:.4f}' for each in found)} of {steps} steps at each site.",
        )
    ]


def _binomial_p_values(counts: npt.NDArray[np.int64], steps: int, rate: float) -> list[float]:
    """Of each user's count, of all together, and of their spread."""
    from scipy.stats import binom, chi2

    def two_sided(count: int, trials: int) -> float:
        below, above = binom.cdf(count, trials, rate), binom.sf(count - 1, trials, rate)
        return float(min(1.0, 2 * min(below, above)))

    spread = float(np.square(counts - steps * rate).sum() / (steps * rate * (1 - rate)))
    tails = chi2.cdf(spread, len(counts)), chi2.sf(spread, len(counts))
    return [
        two_sided(int(counts.sum()), steps * len(counts)),
        min(1.0, 2 * float(min(tails))),
        *(two_sided(int(count), steps) for count in counts),
    ]


def answered_noise(way: Way) -> list[Check]:
    """`answer noise` and `new answer`: what sites with nobody in them release is the plan's noise, each its own."""
    steps, sigma = 3, 1.7
    plan = way.sites.plan(0.4, steps=steps, noise=sigma)
    wide = sigma * steps**0.5 * (1 + INFLATION)
    found = [
        in_sums(update, plan) / wide
        for _ in range(3)
        for update in way.sites.released(way.path, plan, [[], []])
    ]
    drawn = np.concatenate(found)
    return [
        statistical(
            "answer noise",
            way.name,
            float(np.sqrt(np.mean(np.square(drawn)))),
            noise_chi_square(drawn, 1.0),
            "1: as wide as the plan says",
            f"The noise of {len(found)} updates of sites with nobody in them, {drawn.size} numbers.",
        ),
        fresh("new answer", way.name, found, "updates of two sites in three rounds"),
    ]


def stopped_clock(subject: Subject, code: Code) -> list[Check]:
    """`stopped clock`: noise repeats neither where the clock stands still nor where every seed is set again."""
    settings = one_step(0.4, noise_multiplier=1.7)

    def one_round(noise: GaussianNoise) -> Vector:
        update = code.trainer(subject.rewound(), subject.batch([]), settings, sampler=Everyone(), noise=noise)
        return in_steps(update, settings) / 1.7

    found = []
    for _ in range(2):
        with _nothing_moves():
            found.append(one_round(code.noise()))
    return [fresh("stopped clock", subject.name, found, "rounds at one instant, with the same seeds")]


@contextmanager
def _nothing_moves() -> Iterator[None]:
    """Python's clocks stand still, and Python's, numpy's and torch's own generators are seeded."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    clocks = ("time", "monotonic", "perf_counter", "process_time")
    with ExitStack() as stack:
        for name in clocks:
            stack.enter_context(patch.object(time, name, lambda: 1_800_000_000.0))
            stack.enter_context(patch.object(time, f"{name}_ns", lambda: 1_800_000_000_000_000_000))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            np.random.seed(1)  # noqa: NPY002
            random.seed(1)
            torch.manual_seed(1)
            yield
        finally:
            np.random.set_state(numpys)  # noqa: NPY002
            random.setstate(pythons)
