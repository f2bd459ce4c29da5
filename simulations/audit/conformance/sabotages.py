"""Sabotages: a site's real code with one thing wrong in it, patched in this process for as long as a check is asked.

Each is a change that one could slip into a site's code, and that a run would not show. `sabotage.py` puts all of them
through the whole of `fedtide audit conformance`; `controls_training.py` puts each that training's checks can see to the
check that is meant to see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import client.site
import client.together
from client.ledger import Ledger
from client.origin import Asked
from client.site import Charged
from client.site_folder import Site
from client.statistics import release_metrics
from client.training import StepSettings, train_round
from common.events.histories import Histories
from common.models.batches import HistoryBatch, concatenate
from common.models.interface import InterestModel
from common.privacy.noise import GaussianNoise, SecureGaussian, SecurePoissonSampler, UserSampler
from common.wire import Reason, Refusal, Update, state_from_bytes, state_to_bytes
from simulations.audit.conformance.by_hand import Gradients, Part, clipped, norm_of, scaled, train_by_hand
from simulations.audit.conformance.code import SameAgain
from simulations.audit.conformance.made_up_sites import MICRO_BATCH
from simulations.audit.conformance.sabotages_noise import (
    cut_at_three,
    drawn_otherwise,
    four_uniforms,
    heavy_items_unscaled,
    in_float32,
    large_drawn_again,
    last_draw_turned,
    last_numbers_shuffled,
    long_histories_in_two,
    many_places_unscaled,
    ranked_as_they_come,
    second_half_negated,
)
from simulations.audit.trainers import ChangedNoise, Normals, Trainer

Sampled = npt.NDArray[np.bool_]
Patched = Callable[[], AbstractContextManager[Any]]
StateChange = Callable[[Charged, dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Sabotage:
    """One thing wrong.

    Attributes:
        name: of a few words.
        does: one line for the table.
        trainer: stands in for `train_round` wherever one is called; None: the real one.
        patched: changes the code around it, while it is open.
        mode: of the encoder, in which it does anything.
    """

    name: str
    does: str
    trainer: Trainer | None = None
    patched: Patched = nullcontext
    mode: str = "vectors"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The site's code with this wrong in it."""
        with ExitStack() as stack:
            if self.trainer is not None:
                stack.enter_context(patch.object(client.site, "train_round", self.trainer))
            stack.enter_context(self.patched())
            yield


# --- what a user adds


def _by_hand(part: Part) -> Trainer:
    def trainer(
        model: InterestModel, histories: HistoryBatch, settings: StepSettings, **given: Any
    ) -> dict[str, Tensor]:
        return train_by_hand(model, histories, settings, part=part, **given)

    return trainer


def _floored(gradients: Gradients, clip_norm: float, place: int) -> Gradients:
    """No clip factor below 1/50."""
    norm = norm_of(gradients)
    return (
        scaled(gradients, max(0.02, min(1.0, clip_norm / max(norm, 1e-12))))
        if math.isfinite(norm)
        else clipped(gradients, clip_norm, place)
    )


def _without(ending: str) -> Part:
    """Parameters of such a name are neither in the norm nor scaled."""

    def part(gradients: Gradients, clip_norm: float, place: int) -> Gradients:
        inside = {name: each for name, each in gradients.items() if ending not in name}
        return {**gradients, **clipped(inside, clip_norm, place)}

    return part


def _norm_without_biases(gradients: Gradients, clip_norm: float, _: int) -> Gradients:
    norm = norm_of({name: each for name, each in gradients.items() if not name.endswith("bias")})
    return scaled(gradients, min(1.0, clip_norm / max(norm, 1e-12)))


def _largest_layer(gradients: Gradients, clip_norm: float, _: int) -> Gradients:
    norm = max(float(each.norm()) for each in gradients.values())
    return scaled(gradients, min(1.0, clip_norm / max(norm, 1e-12)))


def _later_units(gradients: Gradients, clip_norm: float, place: int) -> Gradients:
    return clipped(gradients, clip_norm * (10.0 if place >= 3 * MICRO_BATCH else 1.0), place)


def _breaks_off(gradients: Gradients, clip_norm: float, place: int) -> Gradients:
    if not math.isfinite(norm_of(gradients)):
        raise ValueError("a gradient is not finite")
    return clipped(gradients, clip_norm, place)


def _long_users_twice(batch: HistoryBatch) -> HistoryBatch:
    return concatenate([batch, batch.rows(torch.nonzero(batch.lengths > 20).flatten())])


# --- a round's steps


def _draws_long_users_again(
    model: InterestModel,
    histories: HistoryBatch,
    settings: StepSettings,
    *,
    sampler: UserSampler,
    **more: Any,
) -> dict[str, Tensor]:
    long = (histories.lengths > 20).cpu().numpy()

    def twice(sampler: UserSampler, users: int, rate: float, _: int) -> Sampled:
        return sampler.sample(users, rate) | (long & SecurePoissonSampler().sample(users, rate))

    return train_round(model, histories, settings, sampler=_Sampled(sampler, twice), **more)


def _changed(
    settings_of: Callable[[StepSettings], StepSettings] = lambda settings: settings,
    rows_of: Callable[[HistoryBatch], HistoryBatch] = lambda batch: batch,
    sampler_of: Callable[[UserSampler], UserSampler] = lambda sampler: sampler,
    noise_of: Callable[[GaussianNoise, StepSettings], GaussianNoise] = lambda noise, _: noise,
) -> Trainer:
    """The real trainer, handed something else than it was asked to work with."""

    def trainer(
        model: InterestModel,
        histories: HistoryBatch,
        settings: StepSettings,
        *,
        sampler: UserSampler,
        noise: GaussianNoise,
        **more: Any,
    ) -> dict[str, Tensor]:
        return train_round(
            model,
            rows_of(histories),
            settings_of(settings),
            sampler=sampler_of(sampler),
            noise=noise_of(noise, settings),
            **more,
        )

    return trainer


def _by_step(
    change: Callable[[int, Normals], Normals],
) -> Callable[[GaussianNoise, StepSettings], GaussianNoise]:
    """Noise that is changed by the number of the step, from 0."""

    def noise_of(noise: GaussianNoise, _: StepSettings) -> GaussianNoise:
        steps = iter(range(1 << 30))
        return ChangedNoise(noise, lambda normals: change(next(steps), normals))

    return noise_of


def _in_the_last(noise: GaussianNoise, settings: StepSettings) -> GaussianNoise:
    def change(step: int, normals: Normals) -> Normals:
        return normals * (settings.steps**0.5 if step == settings.steps - 1 else 0.0)

    return _by_step(change)(noise, settings)


@dataclass
class _Sampled:
    """A sampler changed on the way."""

    sampler: UserSampler
    change: Callable[[UserSampler, int, float, int], Sampled]
    step: int = -1

    def sample(self, users: int, rate: float) -> Sampled:
        self.step += 1
        return self.change(self.sampler, users, rate, self.step)


def _sampled(
    change: Callable[[UserSampler, int, float, int], Sampled],
) -> Callable[[UserSampler], UserSampler]:
    return lambda sampler: _Sampled(sampler, change)


def _with_replacement(_: UserSampler, users: int, rate: float, __: int) -> Sampled:
    drawn = np.zeros(users, dtype=np.bool_)
    if users:
        drawn[np.random.default_rng().integers(0, users, round(rate * users))] = True
    return drawn


def _later_doubled(sampler: UserSampler, users: int, rate: float, step: int) -> Sampled:
    return sampler.sample(users, min(1.0, 2 * rate) if step >= 200 else rate)


def _settings(**factors: float) -> Patched:
    """Settings that are read from the plan times something; whatever else `of` is told, it is told."""
    real = StepSettings.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[StepSettings], *given: Any, **more: Any) -> StepSettings:
        settings: StepSettings = real(cls, *given, **more)
        return replace(settings, **{name: by * getattr(settings, name) for name, by in factors.items()})

    return lambda: patch.object(StepSettings, "of", classmethod(of))


# --- what is answered


def _users(charged: Charged) -> int:
    return len(Histories.load(charged.site.histories_folder))


def _state(
    change: Callable[[Charged, dict[str, Tensor]], dict[str, Tensor]],
) -> Patched:
    real = Charged.released

    def released(self: Charged, state: dict[str, Tensor]) -> Update | Refusal:
        return real(self, change(self, state))

    return lambda: patch.object(Charged, "released", released)


def _scaled(charged: Charged, state: dict[str, Tensor]) -> dict[str, Tensor]:
    by = 1 + _users(charged) / 10_000
    return {name: by * tensor for name, tensor in state.items()}


def _lowest_bits(charged: Charged, state: dict[str, Tensor]) -> dict[str, Tensor]:
    name = max(state, key=lambda each: state[each].numel())
    bits = state[name].flatten().contiguous().view(torch.int32).clone()
    users = torch.tensor([(_users(charged) >> place) & 1 for place in range(16)], dtype=torch.int32)
    bits[:16] = (bits[:16] & ~1) | users
    return {**state, name: bits.view(torch.float32).view(state[name].shape)}


@contextmanager
def _few_are_refused() -> Iterator[None]:
    real = client.site.charge

    def charge(site: Site, asked: Asked, **more: Any) -> Charged | Update | Refusal:
        if len(Histories.load(site.histories_folder)) < site.users_at_least:
            return Refusal(Reason.POLICY)
        return real(site, asked, **more)

    with patch.object(client.site, "charge", charge), patch.object(client.together, "charge", charge):
        yield


@contextmanager
def _noised_again() -> Iterator[None]:
    real = Ledger.outbox

    def outbox(self: Ledger, *given: Any, **more: Any) -> Any:
        found = real(self, *given, **more)
        if found is None:
            return None
        state = state_from_bytes(found[0])
        again = {name: t + torch.randn_like(t) for name, t in state.items()}
        return state_to_bytes(again), found[1]

    with patch.object(Ledger, "outbox", outbox):
        yield


@contextmanager
def _metrics_fail() -> Iterator[None]:
    real = release_metrics

    def release(model: InterestModel, *given: Any, **more: Any) -> dict[str, Tensor]:
        scores: Callable[[HistoryBatch], Tensor] = model.scores

        def checked(batch: HistoryBatch) -> Tensor:
            found = scores(batch)
            if not bool(found.isfinite().all()):
                raise ValueError("scores are no numbers")
            return found

        with patch.object(model, "scores", checked):
            return real(model, *given, **more)

    with patch.object(client.site, "release_metrics", release):
        yield


@contextmanager
def _clock_for_a_key() -> Iterator[None]:
    import time

    def normal(_: SecureGaussian, size: int) -> Normals:
        return np.random.default_rng(time.time_ns()).standard_normal(size)

    with patch.object(SecureGaussian, "normal", normal):
        yield


# --- sites that are trained together


def _together(
    part: Part = clipped,
    *,
    one_noise: bool = False,
    settings_of: Callable[[StepSettings, int], StepSettings] = lambda settings, _: settings,
) -> Patched:
    """Sites of one batch, one after the other by hand.

    Args:
        settings_of: is told the number of users of all sites.
    """

    def train(
        model: InterestModel,
        sites: Sequence[HistoryBatch],
        settings: StepSettings,
        *,
        samplers: Sequence[UserSampler],
        noises: Sequence[GaussianNoise],
        **_: Any,
    ) -> list[dict[str, Tensor]]:
        start, found, kept = model.trainable_state(), [], SameAgain()
        used = settings_of(settings, sum(len(site) for site in sites))
        for site, sampler, own in zip(sites, samplers, noises, strict=True):
            model.load_trainable(start)
            noise = kept.rewind() if one_noise else own
            found.append(train_by_hand(model, site, used, sampler=sampler, noise=noise, part=part))
        model.load_trainable(start)
        return found

    return lambda: patch.object(client.together, "train_together", train)


def _counted(settings: StepSettings, users: int) -> StepSettings:
    return replace(settings, normaliser=settings.normaliser * (1 + users / 100))


def _up_to_forty(gradients: Gradients, clip_norm: float, _: int) -> Gradients:
    norm = norm_of(gradients)
    return scaled(gradients, min(1.0, clip_norm / max(min(norm, 40 * clip_norm), 1e-12)))


def _named(*sabotages: Sabotage) -> Mapping[str, Sabotage]:
    return {each.name: each for each in sabotages}


SABOTAGES: Mapping[str, Sabotage] = _named(
    # what a user adds
    Sabotage("clip factor with a floor", "scales nobody by less than 1/50", _by_hand(_floored)),
    Sabotage("biases out of the norm", "clips by a norm without the biases", _by_hand(_norm_without_biases)),
    Sabotage("later units clipped to 10 C", "clips to 10 C from the fourth unit on", _by_hand(_later_units)),
    Sabotage("largest layer's norm", "clips by the norm of the largest layer", _by_hand(_largest_layer)),
    Sabotage(
        "adapters not clipped",
        "leaves LoRA out of the norm, and does not scale it",
        _by_hand(_without("lora")),
        mode="lora",
    ),
    Sabotage("breaks off at inf", "ends a round where a gradient is not finite", _by_hand(_breaks_off)),
    # a round's steps
    Sabotage(
        "long users in two rows",
        "takes users of more than 20 events twice",
        _changed(rows_of=_long_users_twice),
    ),
    Sabotage(
        "long users drawn more often",
        "draws users of more than 20 events twice a step",
        _draws_long_users_again,
    ),
    Sabotage(
        "all noise in the last step",
        "noises the last step alone, sqrt(steps) wide",
        _changed(noise_of=_in_the_last),
    ),
    Sabotage(
        "a step in a hundred bare",
        "leaves the noise out of one step in a hundred",
        _changed(noise_of=_by_step(lambda step, normals: normals * (step % 100 != 99))),
    ),
    Sabotage(
        "later steps half noised",
        "halves the noise from the second step on",
        _changed(noise_of=_by_step(lambda step, normals: normals * (0.5 if step else 1.0))),
    ),
    Sabotage(
        "batches with replacement",
        "draws round(q n) users with replacement",
        _changed(sampler_of=_sampled(_with_replacement)),
    ),
    Sabotage(
        "q doubled after step 200",
        "samples at 2 q from step 200 of a round on",
        _changed(sampler_of=_sampled(_later_doubled)),
    ),
    # what is read of the plan
    Sabotage("C read doubled", "reads twice the plan's clip norm", patched=_settings(clip_norm=2.0)),
    Sabotage(
        "sigma read halved",
        "reads half the plan's noise multiplier",
        patched=_settings(noise_multiplier=0.5),
    ),
    Sabotage(
        "normaliser read halved",
        "divides sums by half the plan's constant",
        patched=_settings(normaliser=0.5),
    ),
    Sabotage("learning rate read doubled", "takes steps twice as long", patched=_settings(learning_rate=2.0)),
    Sabotage("q read doubled", "samples at twice the plan's rate", patched=_settings(sampling_rate=2.0)),
    # what is answered
    Sabotage(
        "update scaled by users", "multiplies the update by 1 + users / 10,000", patched=_state(_scaled)
    ),
    Sabotage(
        "users in the lowest bits",
        "hides the number of users in the lowest bits of sixteen numbers",
        patched=_state(_lowest_bits),
    ),
    Sabotage(
        "few users refused",
        "refuses, before any charge, with fewer users than agreed",
        patched=_few_are_refused,
    ),
    Sabotage("retry noised again", "sends a second noising under the first receipt", patched=_noised_again),
    Sabotage("metrics fail at inf", "fails where a user's scores are no numbers", patched=_metrics_fail),
    Sabotage(
        "clock for a key",
        "makes the noise's key from the time in nanoseconds",
        patched=_clock_for_a_key,
    ),
    # what the noise is like
    Sabotage(
        "second half negated",
        "makes the second half of each draw the first, negated",
        patched=drawn_otherwise(second_half_negated),
    ),
    Sabotage(
        "last draw turned",
        "gives every second draw the one before it, turned by one place",
        patched=last_draw_turned,
    ),
    Sabotage(
        "last draw shuffled",
        "makes a tenth of each draw of the last one's numbers, in another order and with other signs",
        patched=drawn_otherwise(last_numbers_shuffled()),
    ),
    Sabotage(
        "four uniforms",
        "draws sums of four uniforms: the right variance, nothing beyond 3.46 deviations",
        patched=drawn_otherwise(four_uniforms),
    ),
    Sabotage(
        "cut at three",
        "draws again what lies beyond three deviations, and puts the variance right",
        patched=drawn_otherwise(cut_at_three),
    ),
    Sabotage(
        "large draws again",
        "draws once more where a draw's norm is above the mean",
        patched=drawn_otherwise(large_drawn_again),
    ),
    Sabotage("noise in float32", "adds the noise in float32, off the grid", patched=in_float32),
    # sums
    Sabotage(
        "many places unscaled",
        "does not scale what users add to more than 60 places",
        patched=many_places_unscaled,
    ),
    Sabotage(
        "heavy items unscaled",
        "counts items that a user has more than five times as often, unscaled",
        patched=heavy_items_unscaled,
    ),
    Sabotage(
        "long histories in two",
        "takes the transitions of more than 500 events as two contributions",
        patched=long_histories_in_two,
    ),
    Sabotage(
        "ranked as they come",
        "ranks users in as many rows as there are, on kernels whose rounding follows the number of rows",
        patched=ranked_as_they_come,
    ),
    # sites that are trained together
    Sabotage(
        "together: norm up to 40 C",
        "caps the norm at 40 C in a batch of sites, so louder users are clipped too little",
        patched=_together(_up_to_forty),
    ),
    Sabotage(
        "together: users of all sites counted",
        "divides by a constant that grows with the users of all sites of a batch",
        patched=_together(settings_of=_counted),
    ),
    Sabotage(
        "together: one noise",
        "gives all sites of a batch the same noise",
        patched=_together(one_noise=True),
    ),
)
