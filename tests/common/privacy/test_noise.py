"""The generators and the Gaussian sum: right ones pass, and broken ones are shown to fail the same tests."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from common.privacy.noise import (
    GRID_BITS,
    INFLATION,
    LARGEST_DIMENSION,
    ROOM_FOR_FLOATS,
    SecureGaussian,
    SecurePoissonSampler,
    private_sum,
)
from common.privacy.statistics import noise_chi_square, sampler_dispersion

REFUSE = 1e-6  # a right generator fails a test once in a million runs


class SeededGaussian:
    """What must never be used: normals that a seed reproduces."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return self.generator.standard_normal(size)


class GlobalGaussian:
    """What must never be used: numpy's global generator."""

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return np.random.standard_normal(size)  # noqa: NPY002


class GlobalSampler:
    """What must never be used: torch's global generator."""

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        return (torch.rand(users) < rate).numpy()


class ScaledGaussian:
    """Noise of the wrong width."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return self.factor * SecureGaussian().normal(size)


class NoNoise:
    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return np.zeros(size)


# The Gaussian generator


@pytest.mark.parametrize("size", [0, 1, 2, 3, 131_071, 131_072, 131_073, 262_147])
def test_any_number_of_normals_comes_out(size: int) -> None:
    normals = SecureGaussian().normal(size)
    assert normals.shape == (size,)
    assert normals.dtype == np.float64
    assert np.isfinite(normals).all()
    assert len(set(normals.tolist())) == size


def test_a_negative_number_of_normals_is_refused() -> None:
    with pytest.raises(ValueError, match="size is -1"):
        SecureGaussian().normal(-1)


def test_normals_are_normal_and_near_misses_are_not() -> None:
    normals = SecureGaussian().normal(400_000)
    assert stats.kstest(normals, "norm").pvalue > REFUSE
    assert stats.kstest(1.03 * normals, "norm").pvalue < REFUSE
    assert stats.kstest(normals + 0.02, "norm").pvalue < REFUSE
    student = stats.t(df=20, scale=math.sqrt(18 / 20)).rvs(
        400_000, random_state=1
    )  # variance 1, heavier tails
    assert stats.kstest(student, "norm").pvalue < REFUSE


def test_the_tails_carry_their_weight_and_clipped_tails_are_caught() -> None:
    normals = SecureGaussian().normal(1_000_000)

    def beyond_three(values: npt.NDArray[np.float64]) -> float:
        count = int((np.abs(values) > 3).sum())
        return float(stats.binomtest(count, values.size, 2 * stats.norm.sf(3)).pvalue)

    assert beyond_three(normals) > REFUSE
    assert beyond_three(np.clip(normals, -3, 3)) < REFUSE


def test_the_two_normals_of_a_pair_and_of_neighbours_are_uncorrelated() -> None:
    normals = SecureGaussian().normal(131_072)
    limit = 5.5 / math.sqrt(65_536)
    for first, second in [
        (normals[:65_536], normals[65_536:]),
        (normals[::2], normals[1::2]),
        (normals[:65_536] ** 2 - 1, (normals[65_536:] ** 2 - 1) / 2),
    ]:
        assert abs(float(np.mean(first * second))) < limit
    assert abs(float(np.mean(normals[:65_536] * normals[:65_536]))) > limit


# The Gaussian sum


@pytest.mark.parametrize(("noise_multiplier", "clip_norm"), [(0.1, 1.0), (1.0, 0.3), (5.0, 20.0)])
def test_the_noise_is_as_wide_as_the_event_says(noise_multiplier: float, clip_norm: float) -> None:
    clipped_sum = torch.linspace(-3, 3, 20_000, dtype=torch.float64) * clip_norm
    sigma = noise_multiplier * clip_norm

    def residuals(factor: float) -> npt.NDArray[np.float64]:
        out = private_sum(
            clipped_sum,
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            noise=ScaledGaussian(factor),
        )
        return np.asarray(out.double().numpy() - clipped_sum.numpy())

    right = residuals(1)
    assert noise_chi_square(right, sigma * (1 + INFLATION)) > REFUSE
    assert noise_chi_square(right, sigma * 2 / 3) < REFUSE
    assert noise_chi_square(right, sigma * 3 / 2) < REFUSE
    assert noise_chi_square(residuals(2 / 3), sigma) < REFUSE
    assert noise_chi_square(residuals(3 / 2), sigma) < REFUSE
    assert noise_chi_square(residuals(0), sigma) < REFUSE


def test_the_noise_is_wider_than_the_event_by_the_inflation_exactly() -> None:
    class Ones:
        def normal(self, size: int) -> npt.NDArray[np.float64]:
            return np.ones(size)

    out = private_sum(torch.zeros(3), clip_norm=2.0, noise_multiplier=1.5, noise=Ones())
    assert out.numpy() == pytest.approx([3.0 * (1 + INFLATION)] * 3, abs=2.0 * 2**-GRID_BITS)
    assert (out > 3.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_out_lies_on_the_grid_whatever_went_in(dtype: torch.dtype) -> None:
    clip_norm = 0.5
    clipped_sum = torch.rand(50_000, dtype=dtype) * 8 - 4
    out = private_sum(clipped_sum, clip_norm=clip_norm, noise_multiplier=1, noise=SecureGaussian())
    steps = out.double() / (clip_norm * 2**-GRID_BITS)
    assert out.dtype == torch.float32
    assert torch.equal(steps, steps.round())
    naive = clipped_sum.double() + torch.from_numpy(SecureGaussian().normal(50_000)) * clip_norm
    off_grid = naive / (clip_norm * 2**-GRID_BITS)
    assert not torch.equal(off_grid, off_grid.round())


def test_without_noise_the_rounded_sum_comes_out() -> None:
    clipped_sum = torch.tensor([0.0, 1.0, -2.5, 0.1], dtype=torch.float64)
    out = private_sum(clipped_sum, clip_norm=1.0, noise_multiplier=1.0, noise=NoNoise())
    assert out.tolist()[:3] == [0.0, 1.0, -2.5]
    assert abs(out[3].item() - 0.1) <= 2.0 ** -(GRID_BITS + 1)


def test_rounding_never_moves_neighbours_further_apart_than_the_inflation_pays_for() -> None:
    dimension = LARGEST_DIMENSION
    grid = 2.0**-GRID_BITS
    # The worst case: every coordinate of the one sum just below, of the other just above, a midpoint.
    below = torch.full((dimension,), 0.499 * grid, dtype=torch.float64)
    direction = torch.full((dimension,), 1 / math.sqrt(dimension), dtype=torch.float64)
    above = below + direction
    out = [
        private_sum(vector, clip_norm=1.0, noise_multiplier=1.0, noise=NoNoise()).double()
        for vector in (below, above)
    ]
    distance = float((out[1] - out[0]).norm())
    assert distance <= 1 + INFLATION - ROOM_FOR_FLOATS
    assert 2.0**-GRID_BITS * math.sqrt(dimension) <= INFLATION - ROOM_FOR_FLOATS
    assert 2.0**-GRID_BITS * math.sqrt(dimension + 1) > INFLATION - ROOM_FOR_FLOATS


def test_neighbouring_sums_stay_within_the_covered_distance_over_random_sums() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        base = torch.randn(4000, dtype=torch.float64, generator=generator)
        one_user = torch.randn(4000, dtype=torch.float64, generator=generator)
        one_user /= one_user.norm()
        out = [
            private_sum(vector, clip_norm=1.0, noise_multiplier=1.0, noise=SeededGaussian(5)).double()
            for vector in (base, base + one_user)
        ]
        # The cast to float32 is post-processing; its rounding is not the mechanism's.
        assert float((out[1] - out[0]).norm()) <= 1 + 2.0**-GRID_BITS * math.sqrt(4000) + 1e-5


def test_an_empty_batch_is_noise_alone() -> None:
    out = private_sum(torch.zeros(5000), clip_norm=1.0, noise_multiplier=1.0, noise=SecureGaussian())
    assert noise_chi_square(out.numpy(), 1 + INFLATION) > REFUSE


def test_the_sum_is_not_changed_and_no_gradient_flows() -> None:
    clipped_sum = torch.ones(4, requires_grad=True)
    out = private_sum(clipped_sum, clip_norm=1.0, noise_multiplier=1.0, noise=SecureGaussian())
    assert clipped_sum.tolist() == [1.0] * 4
    assert not out.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_sum_on_cuda_gives_the_same_release_as_on_cpu() -> None:
    clipped_sum = torch.linspace(-3, 3, 1000)
    on_cpu = private_sum(clipped_sum, clip_norm=0.7, noise_multiplier=1.1, noise=SeededGaussian())
    on_cuda = private_sum(clipped_sum.cuda(), clip_norm=0.7, noise_multiplier=1.1, noise=SeededGaussian())
    assert on_cuda.device.type == "cuda"
    assert torch.equal(on_cpu, on_cuda.cpu())


@pytest.mark.parametrize(
    ("clipped_sum", "changes", "message"),
    [
        (torch.tensor([1.0, math.nan]), {}, "not finite"),
        (torch.tensor([1.0, math.inf]), {}, "not finite"),
        (torch.tensor([1.0, 1e30]), {}, "far beyond"),
        (torch.zeros(0), {}, "not empty"),
        (torch.zeros(2, 2), {}, "flat"),
        (torch.zeros(LARGEST_DIMENSION + 1), {}, str(LARGEST_DIMENSION)),
        (torch.zeros(2), {"noise_multiplier": 0.0999}, r"0\.1"),
        (torch.zeros(2), {"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        (torch.zeros(2), {"noise_multiplier": math.inf}, "noise_multiplier is inf"),
        (torch.zeros(2), {"clip_norm": 0.0}, "clip_norm is 0"),
        (torch.zeros(2), {"clip_norm": -1.0}, "clip_norm is -1"),
        (torch.zeros(2), {"clip_norm": math.nan}, "clip_norm is nan"),
        (torch.zeros(2), {"clip_norm": math.inf}, "clip_norm is inf"),
    ],
)
def test_what_cannot_be_released_is_refused(
    clipped_sum: torch.Tensor, changes: dict[str, float], message: str
) -> None:
    settings = {"clip_norm": 1.0, "noise_multiplier": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        private_sum(clipped_sum, noise=SecureGaussian(), **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_types_that_lose_the_noise_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        private_sum(torch.zeros(2, dtype=dtype), clip_norm=1.0, noise_multiplier=1.0, noise=SecureGaussian())


@pytest.mark.parametrize("made", [np.full(3, math.nan), np.zeros(2), np.zeros(3, dtype=np.float32)])
def test_a_generator_that_gives_something_else_releases_nothing(made: npt.NDArray[np.float64]) -> None:
    class Broken:
        def normal(self, size: int) -> npt.NDArray[np.float64]:
            return made

    with pytest.raises(ValueError, match="nothing is released"):
        private_sum(torch.zeros(3), clip_norm=1.0, noise_multiplier=1.0, noise=Broken())


def test_the_refusal_of_a_sum_tells_nothing_of_it() -> None:
    with pytest.raises(ValueError, match="not finite") as refusal:
        private_sum(
            torch.tensor([123.25, math.nan]), clip_norm=1.0, noise_multiplier=1.0, noise=SecureGaussian()
        )
    assert "123" not in str(refusal.value)


# The sampler


def shuffled_epochs(steps: int, users: int, rate: float) -> npt.NDArray[np.bool_]:
    """Epochs over shuffled users, cut into batches of rate * users."""
    generator = np.random.default_rng(0)
    size = int(rate * users)
    masks = np.zeros((steps, users), dtype=np.bool_)
    for step in range(steps):
        if step % (users // size) == 0:
            order = generator.permutation(users)
        at = step % (users // size) * size
        masks[step, order[at : at + size]] = True
    return masks


def fixed_size_batches(steps: int, users: int, rate: float) -> npt.NDArray[np.bool_]:
    """A fresh sample without replacement of rate * users at each step."""
    generator = np.random.default_rng(0)
    masks = np.zeros((steps, users), dtype=np.bool_)
    for step in range(steps):
        masks[step, generator.choice(users, int(rate * users), replace=False)] = True
    return masks


def same_users_again(steps: int, users: int, rate: float) -> npt.NDArray[np.bool_]:
    return np.tile(SecurePoissonSampler().sample(users, rate), (steps, 1))


def rate_a_tenth_too_high(steps: int, users: int, rate: float) -> npt.NDArray[np.bool_]:
    return np.stack([SecurePoissonSampler().sample(users, 1.1 * rate) for _ in range(steps)])


def no_empty_batches(steps: int, users: int, rate: float) -> npt.NDArray[np.bool_]:
    """Each step drawn again until it has a user (only differs where batches are small)."""
    masks: list[npt.NDArray[np.bool_]] = []
    while len(masks) < steps:
        mask = SecurePoissonSampler().sample(users, rate)
        if mask.any():
            masks.append(mask)
    return np.stack(masks)


@pytest.mark.parametrize(
    ("steps", "users", "rate"),
    [(200, 1000, 0.05), (200, 1000, 0.5), (400, 50, 0.02), (20, 5000, 0.1), (30, 40, 1)],
)
def test_the_sampler_is_poisson(steps: int, users: int, rate: float) -> None:
    sampler = SecurePoissonSampler()
    masks = np.stack([sampler.sample(users, rate) for _ in range(steps)])
    assert masks.dtype == np.bool_
    assert sampler_dispersion(masks, rate) > REFUSE


@pytest.mark.parametrize(
    "broken", [shuffled_epochs, fixed_size_batches, same_users_again, rate_a_tenth_too_high]
)
def test_samplers_that_are_not_poisson_are_rejected(
    broken: Callable[[int, int, float], npt.NDArray[np.bool_]],
) -> None:
    assert sampler_dispersion(broken(200, 1000, 0.05), 0.05) < REFUSE


def test_a_sampler_that_skips_empty_batches_is_rejected() -> None:
    assert sampler_dispersion(no_empty_batches(2000, 20, 0.05), 0.05) < REFUSE


def test_a_rate_of_one_takes_everyone_and_a_miss_is_rejected() -> None:
    masks = np.stack([SecurePoissonSampler().sample(100, 1.0) for _ in range(20)])
    assert masks.all()
    masks[3, 4] = False
    assert sampler_dispersion(masks, 1.0) == 0


def test_rates_next_to_one_and_to_zero_are_handled() -> None:
    sampler = SecurePoissonSampler()
    assert sampler.sample(1000, math.nextafter(1.0, 0.0)).all()
    assert not sampler.sample(1000, 5e-324).any()
    assert sampler.sample(0, 0.5).shape == (0,)


def test_the_probability_is_never_above_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the very draw that stands at the threshold, a user is left out."""
    for rate in (0.1, 1 / 3, 0.05, math.nextafter(1.0, 0.0), 2.0**-64):
        threshold = int(math.ldexp(rate, 64))
        assert threshold / 2**64 <= rate
        draws = threshold.to_bytes(8, "little") + (threshold - 1).to_bytes(8, "little")
        monkeypatch.setattr(os, "urandom", lambda size, draws=draws: draws)
        assert SecurePoissonSampler().sample(2, rate).tolist() == [False, True]


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, math.nan])
def test_a_rate_outside_its_bounds_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate is"):
        SecurePoissonSampler().sample(10, rate)


def test_a_negative_number_of_users_is_refused() -> None:
    with pytest.raises(ValueError, match="users is -1"):
        SecurePoissonSampler().sample(-1, 0.5)


# The statistics themselves


def test_the_statistics_reject_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(11)
    for steps, users, rate in [(100, 300, 0.05), (40, 60, 0.02), (60, 60, 0.5), (20, 400, 0.1)]:
        p_values = np.array(
            [sampler_dispersion(generator.random((steps, users)) < rate, rate) for _ in range(600)]
        )
        # Bonferroni over dependent statistics may reject less often, never clearly more.
        assert (p_values < 0.05).mean() < 0.085
        assert (p_values < 0.001).mean() < 0.01
        assert (p_values < 0.5).mean() > 0.2
    p_values = np.array([noise_chi_square(generator.standard_normal(50) * 3, 3) for _ in range(1000)])
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("residuals", "sigma"), [([], 1.0), ([math.nan], 1.0), ([1.0], 0.0), ([1.0], math.inf), ([1.0], math.nan)]
)
def test_noise_that_cannot_be_tested_is_refused(residuals: list[float], sigma: float) -> None:
    with pytest.raises(ValueError, match=r"noise cannot|sigma is"):
        noise_chi_square(residuals, sigma)


@pytest.mark.parametrize(
    ("masks", "rate"), [([], 0.5), ([True], 0.5), ([[]], 0.5), ([[True]], 0.0), ([[True]], 2)]
)
def test_sampling_that_cannot_be_tested_is_refused(masks: list[object], rate: float) -> None:
    with pytest.raises(ValueError, match=r"masks have|rate is"):
        sampler_dispersion(masks, rate)  # type: ignore[arg-type]


# Nothing repeats


def seed_everything() -> None:
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)


def test_seeding_everything_does_not_reproduce_noise() -> None:
    def release(noise: SecureGaussian | GlobalGaussian) -> list[float]:
        seed_everything()
        return private_sum(torch.zeros(8), clip_norm=1.0, noise_multiplier=1.0, noise=noise).tolist()

    assert release(SecureGaussian()) != release(SecureGaussian())
    assert release(GlobalGaussian()) == release(GlobalGaussian())


def test_seeding_everything_does_not_reproduce_sampling() -> None:
    def sample(sampler: SecurePoissonSampler | GlobalSampler) -> list[bool]:
        seed_everything()
        return [bool(taken) for taken in sampler.sample(200, 0.5)]

    assert sample(SecurePoissonSampler()) != sample(SecurePoissonSampler())
    assert sample(GlobalSampler()) == sample(GlobalSampler())


def in_forked_child(make: Callable[[], bytes]) -> bytes:
    """What `make` returns in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, make())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        made = stream.read()
    os.waitpid(child, 0)
    return made


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_a_stream_of_its_own() -> None:
    generators: list[tuple[SecureGaussian | SeededGaussian, bool]] = [
        (SecureGaussian(), False),
        (SeededGaussian(), True),
    ]
    for generator, repeats in generators:
        generator.normal(3)

        def draw(generator: SecureGaussian | SeededGaussian = generator) -> bytes:
            return generator.normal(8).tobytes()

        of_child = in_forked_child(draw)
        assert len(of_child) == 64
        assert (of_child == draw()) is repeats


@pytest.mark.parametrize("generator", [SecureGaussian(), SecurePoissonSampler()])
@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_generator_is_never_copied_or_stored(generator: object, way: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="never pickled or copied"):
        way(generator)


@pytest.mark.parametrize("generator", [SecureGaussian, SecurePoissonSampler])
def test_a_generator_takes_no_seed_and_holds_nothing(generator: Callable[..., object]) -> None:
    with pytest.raises(TypeError):
        generator(7)
    with pytest.raises(AttributeError):
        generator().seed = 7  # type: ignore[attr-defined]
