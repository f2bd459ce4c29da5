"""The noise and the sampling of a round, seen from what is released: right ones pass, broken ones are caught."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from client.self_test import rows_of_units
from client.training import StepSettings, train_round
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.privacy.noise import GaussianNoise, SecureGaussian, SecurePoissonSampler, UserSampler
from common.privacy.statistics import noise_chi_square, sampler_dispersion
from tests.client.training_cases import (
    ITEMS,
    Everyone,
    SeededGaussian,
    SeededSampler,
    a_model,
    batch_of,
    flat,
    some_users,
)

REFUSE = 1e-6  # a right generator fails a test once in a million runs
SETTINGS = StepSettings(
    sampling_rate=0.25, noise_multiplier=1.7, clip_norm=0.4, normaliser=3.0, steps=5, learning_rate=2.0
)
NOBODY: list[list[int]] = []
SILENT = [[3], [4], [5]]
"""Users with one event: nothing follows, so their gradient is zero."""


class ScaledGaussian:
    """Noise of the wrong width."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        scaled: npt.NDArray[np.float64] = self.factor * SecureGaussian().normal(size)
        return scaled


def residuals(
    rows: list[list[int]], noise: GaussianNoise, settings: StepSettings = SETTINGS
) -> npt.NDArray[np.float64]:
    """What a round releases when no user moves anything, in units of one step's noise (before sigma and C)."""
    update = train_round(
        a_model(items=1500), batch_of(rows, 4), settings, sampler=SecurePoissonSampler(), noise=noise
    )
    scale: float = settings.normaliser / settings.learning_rate / settings.steps**0.5
    return flat(update) * scale


@pytest.mark.parametrize("rows", [NOBODY, SILENT], ids=["no users", "users without a gradient"])
def test_the_update_of_a_round_carries_the_noise_that_its_event_states(rows: list[list[int]]) -> None:
    wide = SETTINGS.noise_multiplier * SETTINGS.clip_norm
    released = residuals(rows, SecureGaussian())
    assert noise_chi_square(released, wide) > REFUSE
    for wrong in (2 / 3, 3 / 2):
        assert noise_chi_square(released, wrong * wide) < REFUSE


@pytest.mark.parametrize("factor", [0.0, 2 / 3, 3 / 2])
def test_a_round_with_noise_of_another_width_or_none_would_be_caught(factor: float) -> None:
    wide = SETTINGS.noise_multiplier * SETTINGS.clip_norm
    assert noise_chi_square(residuals(SILENT, ScaledGaussian(factor)), wide) < REFUSE


def test_rounds_have_noise_of_their_own_and_a_seed_used_again_would_be_caught() -> None:
    def correlation(first: GaussianNoise, second: GaussianNoise) -> float:
        return float(np.corrcoef(residuals(SILENT, first), residuals(SILENT, second))[0, 1])

    limit = 5 / 1500**0.5
    assert abs(correlation(SecureGaussian(), SecureGaussian())) < limit
    assert correlation(SeededGaussian(4), SeededGaussian(4)) > limit


def test_the_steps_of_a_round_have_noise_of_their_own_and_one_draw_used_again_would_be_caught() -> None:
    class OneDraw:
        """What must never be used: the same noise at every step."""

        def __init__(self) -> None:
            self.drawn: npt.NDArray[np.float64] | None = None

        def normal(self, size: int) -> npt.NDArray[np.float64]:
            self.drawn = SecureGaussian().normal(size) if self.drawn is None else self.drawn
            return self.drawn

    wide = SETTINGS.noise_multiplier * SETTINGS.clip_norm
    assert noise_chi_square(residuals(NOBODY, OneDraw()), wide) < REFUSE


@pytest.mark.parametrize("rows", [NOBODY, some_users(5, longest=4)], ids=["no users", "nobody sampled"])
def test_an_empty_batch_is_a_step_like_any_other(rows: list[list[int]]) -> None:
    settings = replace(SETTINGS, sampling_rate=1e-12, steps=3)
    noise, steps = SeededGaussian(0), list[int]()
    model, batch = a_model(), batch_of(rows, 4)
    update = train_round(
        model, batch, settings, sampler=SecurePoissonSampler(), noise=noise, on_step=steps.append
    )
    assert steps == [1, 2, 3]
    assert noise.calls == 3
    drawn = np.random.default_rng(0).standard_normal((3, len(flat(update)))).sum(axis=0)
    expected = -settings.learning_rate * 1.7 * 0.4 / settings.normaliser * drawn
    np.testing.assert_allclose(flat(update), expected * (1 + 1e-3), rtol=0, atol=1e-5)


class Recorded(Recommend):
    """Notes whose histories its loss sees; each user's first item is that user's number."""

    seen: list[list[int]]

    def per_user_loss(self, batch: HistoryBatch) -> torch.Tensor:
        self.seen[-1].extend(item for item in batch.items[:, 0].tolist() if item >= 0)
        return super().per_user_loss(batch)


def took_part(sampler: UserSampler, rate: float, users: int, steps: int) -> npt.NDArray[np.bool_]:
    """Who was really trained on in each step of a round: [steps, users]."""
    model = a_model(Recorded, items=users)
    assert isinstance(model, Recorded)
    model.seen = [[]]  # what the start-up check does with made-up users lands here too
    train_round(
        model, batch_of([[0, 1]], 2), replace(SETTINGS, steps=1), sampler=Everyone(), noise=SecureGaussian()
    )
    settings = replace(SETTINGS, steps=steps, sampling_rate=rate)
    rows_of_units(model, settings.micro_batch, 2)
    model.seen = [[]]
    batch = batch_of([[user, (user + 1) % users] for user in range(users)], 2)
    train_round(
        model,
        batch,
        settings,
        sampler=sampler,
        noise=SecureGaussian(),
        on_step=lambda _: model.seen.append([]),
    )
    taken = np.zeros((steps, users), dtype=np.bool_)
    for step, rows in enumerate(model.seen[:steps]):
        assert len(set(rows)) == len(rows)  # nobody twice
        taken[step, rows] = True
    return taken


class ShuffledEpochs:
    """What must never be used: every user once an epoch, in batches."""

    def __init__(self) -> None:
        self.waiting: list[int] = []

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        size = round(rate * users)
        if len(self.waiting) < size:
            self.waiting = np.random.default_rng().permutation(users).tolist()
        taken = np.zeros(users, dtype=np.bool_)
        taken[self.waiting[:size]] = True
        self.waiting = self.waiting[size:]
        return taken


class FixedBatches:
    """What must never be used: batches of one size, drawn anew at each step."""

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        taken = np.zeros(users, dtype=np.bool_)
        taken[np.random.default_rng().permutation(users)[: round(rate * users)]] = True
        return taken


class SameUsers:
    """What must never be used: one draw for the whole round."""

    def __init__(self) -> None:
        self.taken: npt.NDArray[np.bool_] | None = None

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        if self.taken is None:
            self.taken = SecurePoissonSampler().sample(users, rate)
        return self.taken


def test_users_take_part_as_poisson_sampling_says_and_other_ways_would_be_caught() -> None:
    rate, users, steps = 0.25, 40, 120
    assert sampler_dispersion(took_part(SecurePoissonSampler(), rate, users, steps), rate) > REFUSE
    for broken in (ShuffledEpochs(), FixedBatches(), SameUsers()):
        assert sampler_dispersion(took_part(broken, rate, users, steps), rate) < REFUSE, type(broken).__name__
    assert sampler_dispersion(took_part(SecurePoissonSampler(), rate, users, steps), 0.2) < REFUSE


def seed_everything(patch: pytest.MonkeyPatch) -> None:
    """All that a global seed can reach."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    patch.setenv("PYTHONHASHSEED", "0")


class GlobalGaussian:
    """What must never be used: noise that torch.manual_seed reproduces."""

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return torch.randn(size, dtype=torch.float64).numpy()


def test_seeding_everything_does_not_repeat_a_round_but_seeded_generators_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = batch_of(some_users(8), 12)

    def round_of(sampler: UserSampler, noise: GaussianNoise) -> npt.NDArray[np.float64]:
        seed_everything(monkeypatch)
        return flat(train_round(a_model(), batch, SETTINGS, sampler=sampler, noise=noise))

    first, second = (round_of(SecurePoissonSampler(), SecureGaussian()) for _ in range(2))
    assert (first == second).mean() < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.6
    seeded = [round_of(SeededSampler(1), SeededGaussian(2)) for _ in range(2)]
    assert np.array_equal(seeded[0], seeded[1])
    assert not np.array_equal(seeded[0], round_of(SeededSampler(1), SeededGaussian(3)))
    broken = [round_of(SeededSampler(1), GlobalGaussian()) for _ in range(2)]
    assert np.array_equal(broken[0], broken[1])  # the test would see noise that a global seed reaches
    assert os.environ["PYTHONHASHSEED"] == "0"
    assert len(first) > ITEMS


def test_an_update_is_float32_under_the_names_of_the_trainable_parameters_and_the_model_has_moved_by_it() -> (
    None
):
    model = a_model()
    start = model.trainable_state()
    update = train_round(
        model, batch_of(some_users(8), 12), SETTINGS, sampler=SecurePoissonSampler(), noise=SecureGaussian()
    )
    assert list(update) == list(model.trainable())
    for name, change in update.items():
        assert change.dtype == torch.float32
        assert change.device.type == "cpu"
        assert torch.equal(change, model.trainable_state()[name] - start[name])
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not hasattr(parameter, "grad_sample")


def test_a_second_round_on_the_same_model_goes_on_from_where_the_first_ended() -> None:
    batch = batch_of(some_users(8), 12)
    two = a_model()
    noise, sampler = SeededGaussian(0), SeededSampler(0)
    for _ in range(2):
        train_round(two, batch, SETTINGS, sampler=sampler, noise=noise)
    one = a_model()
    train_round(one, batch, replace(SETTINGS, steps=10), sampler=SeededSampler(0), noise=SeededGaussian(0))
    for name, value in one.trainable_state().items():
        assert torch.equal(value, two.trainable_state()[name])


def test_training_takes_the_direction_that_lowers_the_loss() -> None:
    batch = batch_of([[item % 10, (item + 1) % 10, (item + 2) % 10] for item in range(60)], 3)
    model = a_model()
    before = model.per_user_loss(batch).mean().item()
    settings = StepSettings(1.0, 0.1, 1.0, 60.0, steps=30, learning_rate=1.0)
    train_round(model, batch, settings, sampler=Everyone(), noise=SecureGaussian())
    assert model.per_user_loss(batch).mean().item() < 0.8 * before
