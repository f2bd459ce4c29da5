"""Small models and made-up users for the tests of training. Everything is seeded but the mechanism itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from client.bookkeeping import _Factored, _held, clipped_sums
from client.opacus_gradients import per_user_gradients
from client.training import StepSettings
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.interface import InterestModel

torch.set_num_threads(1)  # products this small are slower on many threads, and tests share the machine

CLIP = 0.1
ITEMS, WIDTH, HIDDEN = 20, 8, 4
ROWS = 48
SETTINGS = StepSettings(
    sampling_rate=1.0, noise_multiplier=1.0, clip_norm=CLIP, normaliser=5.0, steps=1, learning_rate=1.0
)


def item_vectors(items: int = ITEMS, width: int = WIDTH) -> Tensor:
    return normalize(torch.randn(items, width, generator=torch.Generator().manual_seed(7)), dim=-1)


def a_model(kind: type[Recommend] = Recommend, *, items: int = ITEMS, item_prior: bool = True) -> Recommend:
    """In vectors mode, at its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return kind(item_vectors(items), core="lstm", hidden_width=HIDDEN, item_prior=item_prior)


def moved(model: InterestModel, by: float = 0.3, seed: int = 2) -> None:
    """Moves every trainable parameter off its start, where a zero layer hides what lies below it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def batch_of(rows: list[list[int]], width: int) -> HistoryBatch:
    """Histories padded on the right to `width` events, an hour apart."""
    items = np.full((len(rows), width), -1, dtype=np.int64)
    times = np.zeros_like(items)
    for user, row in enumerate(rows):
        items[user, : len(row)] = row
        times[user, : len(row)] = 1_000_000_000 + 3600 * np.arange(len(row))
    return HistoryBatch.of(items, times)


def some_users(users: int, *, longest: int = 12, items: int = ITEMS, seed: int = 3) -> list[list[int]]:
    """Ragged histories; the first user has one event."""
    chance = np.random.default_rng(seed)
    lengths = [1, *chance.integers(2, longest + 1, size=users)][:users]
    return [chance.integers(0, items, size=length).tolist() for length in lengths]


def step_sum(
    model: InterestModel, batch: HistoryBatch, clip_norm: float = CLIP, rows: int | None = ROWS
) -> Tensor:
    """The clipped sum of one step over all of a batch, in units of rows; None: in one batch of as many as there are."""
    with clipped_sums(model, rows) as clipped:
        units = torch.arange(len(batch)).split(rows or max(1, len(batch)))
        return torch.stack([clipped(model.prepare(batch.rows(unit)), clip_norm) for unit in units]).sum(dim=0)


class Everyone:
    """A sampler for tests: every user takes part."""

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        return np.ones(users, dtype=np.bool_)


class SeededGaussian:
    """What must never be used outside of tests: normals that a seed reproduces."""

    def __init__(self, seed: int = 0, factor: float = 1.0) -> None:
        self.generator, self.factor, self.calls = np.random.default_rng(seed), factor, 0

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        self.calls += 1
        return self.factor * self.generator.standard_normal(size)


class SeededSampler:
    """What must never be used outside of tests: a Poisson sample that a seed reproduces."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        return self.generator.random(users) < rate


def flat(update: dict[str, Tensor]) -> npt.NDArray[np.float64]:
    """An update as one vector."""
    return torch.cat([update[name].flatten() for name in sorted(update)]).double().numpy()


RAGGED = [[1, 2, 3, 4, 9, 2], [5, 6], [7], [3, 3, 8, 11, 0], [10, 1, 10]]
"""One user with one event, one with an item twice."""


def one_at_a_time(model: InterestModel, batch: HistoryBatch) -> list[list[Tensor]]:
    """Each user's gradients from a batch of that user alone, without hooks: [users][parameters]."""
    parameters = list(model.trainable().values())
    return [
        list(torch.autograd.grad(model.per_user_loss(batch.rows(torch.tensor([user]))).sum(), parameters))
        for user in range(len(batch))
    ]


def assert_rows_are_users(model: InterestModel, batch: HistoryBatch, *, room: float) -> None:
    """Every trainable parameter's rows equal the loop's, and every parameter is really moved by someone."""
    batch = model.prepare(batch)
    with per_user_gradients(model) as gradients:
        rows = gradients(batch)
    expected = one_at_a_time(model, batch)
    for place, name in enumerate(model.trainable()):
        size = max(float(user[place].norm()) for user in expected)
        assert size > 1e-7, f"{name} has no gradient, so the comparison is empty"
        for user, own in enumerate(expected):
            assert float((rows[place][user] - own[place]).norm()) <= room * size, name
    assert_one_pass_gives_the_rows_sum(model, batch, expected)


def as_on_a_device(a: Tensor, g: Tensor, clip_norm: float) -> _Factored:
    return _Factored(a, g, clip_norm)


def assert_one_pass_gives_the_rows_sum(
    model: InterestModel, batch: HistoryBatch, expected: list[list[Tensor]]
) -> None:
    """A step's clipped sum is the loop's: every user clipped, some, none; on a CPU, and as a device does it."""
    flat = torch.stack([torch.cat([gradient.flatten() for gradient in user]) for user in expected]).double()
    norms = flat.norm(dim=1, keepdim=True)
    with clipped_sums(model) as clipped:
        for clip_norm in (0.5 * float(norms[norms > 0].min()), float(norms.median()), 2 * float(norms.max())):
            wanted = (flat * (clip_norm / norms.clamp(min=1e-12)).clamp(max=1)).sum(dim=0)
            for held in (_held, as_on_a_device):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("client.bookkeeping._held", held)
                    found = clipped(batch, clip_norm)
                assert float((found - wanted).norm()) <= 1e-4 * clip_norm
                assert found.dtype == torch.float64
    assert all(parameter.grad is None for parameter in model.parameters())
