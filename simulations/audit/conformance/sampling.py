"""Who took part? Read from what each step moved, then held against Poisson sampling at the declared rate.

Each made-up user has a direction of gradient of its own, and no noise is added, so the change of the parameters in one
step says who was in it. The steps of a round are told apart by the generator of noise, which is asked once a step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from client.training import StepSettings
from common.models.interface import InterestModel
from common.privacy.noise import UserSampler
from common.privacy.statistics import sampler_dispersion
from simulations.audit.conformance.checking import Vector, corrected, statistical
from simulations.audit.conformance.code import Code, Everyone
from simulations.audit.conformance.forks import in_fork
from simulations.audit.conformance.subjects import Subject, in_steps, one_step
from simulations.audit.evidence import Check
from simulations.audit.trainers import Silence

USERS, STEPS = 40, 120
RATE = 0.25
DECLARED_USERS = 26
"""The public lower bound that goes into the normaliser; with other users there, a q counted from them is another."""

UNSURE = 0.2
"""A user's share in a step is 0 or 1; further off than this, the step cannot be read."""

_SMALL_STEP = 1e-4

Masks = npt.NDArray[np.bool_]


class _Watch(Silence):
    """Silence that notes where the parameters stood whenever it was asked."""

    def __init__(self, model: InterestModel) -> None:
        self.model, self.stood = model, list[Vector]()

    def normal(self, size: int) -> Vector:
        self.note()
        return super().normal(size)

    def note(self) -> None:
        state = self.model.trainable_state()
        self.stood.append(torch.cat([state[name].flatten() for name in sorted(state)]).double().numpy())


def settings_of(steps: int, rate: float = RATE) -> StepSettings:
    """So small a step that users' directions stay what they were."""
    declared = rate * DECLARED_USERS
    base = one_step(0.05, sampling_rate=rate, normaliser=declared, steps=steps)
    return replace(base, learning_rate=_SMALL_STEP * declared / base.clip_norm)


def separable_users(users: int) -> list[list[int]]:
    """Each with items of its own."""
    return [[3 * user, 3 * user + 1, 3 * user + 2] for user in range(users)]


def took_part(subject: Subject, code: Code, sampler: UserSampler, steps: int, users: int = USERS) -> Masks:
    """[steps, users] who was in which step of one round.

    Args:
        subject: over a catalog of three items a user or more.

    Raises:
        ValueError: a step is no sum of its users' directions.
    """
    rows = separable_users(users)
    alone = replace(settings_of(1), sampling_rate=1.0)
    directions = np.stack(
        [
            in_steps(
                code.trainer(
                    subject.rewound(), subject.batch([row], 3), alone, sampler=Everyone(), noise=Silence()
                ),
                alone,
            )
            for row in rows
        ]
    )
    settings = settings_of(steps)
    watch = _Watch(subject.rewound())
    code.trainer(watch.model, subject.batch(rows, 3), settings, sampler=sampler, noise=watch)
    watch.note()
    scale = settings.normaliser / settings.learning_rate / settings.clip_norm
    moves = -np.diff(np.stack(watch.stood), axis=0) * scale  # [steps, coordinates]
    shares = np.linalg.lstsq(directions.T, moves.T, rcond=None)[0].T  # [steps, users]
    if len(shares) != steps:
        raise ValueError(f"noise was drawn for {len(shares)} of {steps} steps")
    if not bool((np.minimum(abs(shares), abs(shares - 1)) < UNSURE).all()):
        raise ValueError("a step is no sum of its users' clipped gradients, so who took part cannot be read")
    return shares > 0.5


def sampling(subject: Subject, code: Code) -> list[Check]:
    """`sampling rate`, `batch sizes` and `independence` of one round, by `judge`."""
    return judge(took_part(subject, code, code.sampler(), STEPS), subject.name)


def judge(masks: Masks, subject: str) -> list[Check]:
    """Did each user take part in each step with chance RATE, independently of all others and of all other steps?"""
    rate, sizes = float(masks.mean()), masks.sum(axis=1)
    expected = (masks.shape[1] * RATE * (1 - RATE)) ** 0.5
    spread = float(sizes.std())
    return [
        statistical(
            "sampling",
            subject,
            rate,
            sampler_dispersion(masks, RATE),
            f"{RATE:g}, with spread as of Poisson sampling",
            f"Users took part in {rate:.4f} of {len(masks)} steps, {RATE:g} is declared; batch sizes spread by "
            f"{spread:.2f}, Poisson sampling's by {expected:.2f}.",
        ),
        statistical(
            "independent users",
            subject,
            *_together(masks),
            f"about {RATE**2:g} for each pair",
            "No two users are drawn together more or less often than chance has it.",
        ),
        statistical(
            "independent steps",
            subject,
            *_again(masks),
            f"{RATE**2:g}",
            "Who was drawn says nothing about who is drawn next.",
        ),
    ]


def _together(masks: Masks) -> tuple[float, float]:
    """The share of steps of the pair of users that is furthest from chance, and the p-value over all pairs.

    Given how often each of the two took part, the number of steps with both is hypergeometric.
    """
    from scipy.stats import hypergeom

    steps, counts = len(masks), masks.sum(axis=0)
    one, other = np.triu_indices(masks.shape[1], k=1)
    both = (masks.T.astype(int) @ masks.astype(int))[one, other]
    chance = hypergeom(steps, counts[one], counts[other])
    p = np.minimum(1.0, 2 * np.minimum(chance.cdf(both), chance.sf(both - 1)))
    worst = int(np.argmin(p))
    return float(both[worst] / steps), corrected(list(p))


def _again(masks: Masks) -> tuple[float, float]:
    """The same of users in a step and the next; each step is in one pair of a test, so the pairs are independent."""
    found = []
    for start in (0, 1):
        first = masks[start:-1:2]
        both = first & masks[start + 1 :: 2]
        found.append((float(both.mean()), _binomial(int(both.sum()), both.size)))
    return min(found, key=lambda each: each[1])[0], corrected([p for _, p in found])


def _binomial(found: int, trials: int) -> float:
    from scipy.stats import binom

    chance = RATE * RATE
    return float(min(1.0, 2 * min(binom.cdf(found, trials, chance), binom.sf(found - 1, trials, chance))))


def forked_sampling(subject: Subject, code: Code) -> list[Check]:
    """Two copies of one process must not draw the same users."""
    steps = 4

    def one_round() -> Vector:
        return took_part(subject, code, code.sampler(), steps).ravel().astype(np.float64)

    one, other = in_fork(one_round), in_fork(one_round)
    same, chance = float((one == other).mean()), RATE**2 + (1 - RATE) ** 2
    return [
        Check(
            "forked sampling",
            subject.name,
            same,
            "below 1",
            same < 1,
            f"Two copies of a process agree on {same:.0%} of who takes part; {chance:.0%} is chance.",
        )
    ]
