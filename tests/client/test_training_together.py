"""Sites that train in one batch release what each would release alone, and no site's users reach another's update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import client.training_together as together
from client.training import StepSettings, train_round
from client.training_together import (
    NotTogetherError,
    check_sites_apart,
    clipped_sums_of_units,
    train_together,
)
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.interface import InterestModel
from common.privacy.noise import INFLATION, SecureGaussian
from tests.client.training_cases import (
    CLIP,
    ITEMS,
    Everyone,
    SeededGaussian,
    SeededSampler,
    a_model,
    batch_of,
    flat,
    item_vectors,
    moved,
    some_users,
)

SETTINGS = StepSettings(
    sampling_rate=0.5,
    noise_multiplier=1.0,
    clip_norm=CLIP,
    normaliser=5.0,
    steps=3,
    learning_rate=2.0,
    micro_batch=32,
)
WIDTH = 14
SIZES = (5, 1, 30, 0, 17)


def of_core(core: str) -> Recommend:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Recommend(item_vectors(), core=core, hidden_width=4, with_times=True)
    moved(model)
    model.set_witness(8)
    return model


def sites_of(sizes: tuple[int, ...] = SIZES) -> list[HistoryBatch]:
    return [batch_of(some_users(size, seed=10 + place), WIDTH) for place, size in enumerate(sizes)]


def trained(model: InterestModel, sites: list[HistoryBatch], factor: float = 1.0) -> list[dict[str, Tensor]]:
    count = len(sites)
    return train_together(
        model,
        sites,
        SETTINGS,
        samplers=[SeededSampler(place) for place in range(count)],
        noises=[SeededGaussian(100 + place, factor) for place in range(count)],
    )


@pytest.mark.parametrize("core", ["lstm", "gru", "attention", "decay"])
def test_each_site_gets_the_update_that_it_gets_alone(core: str) -> None:
    model, sites = of_core(core), sites_of()
    start = model.trainable_state()
    found = trained(model, sites)
    assert all(torch.equal(value, start[name]) for name, value in model.trainable_state().items())
    for place, site in enumerate(sites):
        model.load_trainable(start)
        alone = train_round(
            model, site, SETTINGS, sampler=SeededSampler(place), noise=SeededGaussian(100 + place)
        )
        assert alone.keys() == found[place].keys()
        scale = float(np.abs(flat(alone)).max())
        np.testing.assert_allclose(flat(found[place]), flat(alone), atol=1e-5 * scale)
        # The comparison can fail: the neighbour's update is another one.
        other = flat(found[(place + 1) % len(sites)])
        assert float(np.abs(other - flat(alone)).max()) > 0.01 * scale


def sum_of(model: InterestModel, histories: list[list[list[int]]], clip_norm: float = CLIP) -> Tensor:
    """[sites, coordinates]: the clipped sums of one step, each site at parameters of its own."""
    sites = [batch_of(rows, WIDTH) for rows in histories]
    joined, offsets = together._joined(sites)
    flat_ = torch.cat([p.detach().flatten() for p in model.trainable().values()])
    own = torch.stack([flat_ * (1 + 0.1 * place) for place in range(len(sites))])
    taken = [torch.arange(len(site)) + offset for site, offset in zip(sites, offsets, strict=True)]
    with clipped_sums_of_units(model) as add:
        return together._sums(add, own, joined, taken, clip_norm, 32, together.UNIT)


@pytest.mark.parametrize("others", [0, 1, 7, 8, 9, 40])
def test_one_user_more_moves_its_site_by_at_most_c_and_no_other_site_at_all(others: int) -> None:
    model = a_model()
    moved(model, by=20.0)  # so far off that every gradient is clipped, and rounding is as large as it gets
    user = np.random.default_rng(11).integers(0, ITEMS, size=WIDTH).tolist()
    rows = [some_users(9, seed=1), some_users(others, seed=2), some_users(12, seed=3)]
    for more in ([rows[0], [*rows[1], user], rows[2]], [rows[0], [user, *rows[1]], rows[2]]):
        before, after = sum_of(model, rows), sum_of(model, more)
        moves = float((after[1] - before[1]).norm()) / CLIP
        assert 1 - 1e-6 < moves <= 1 + 1e-6  # the bound is reached, so the test would see more
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[2], after[2])
    assert float((sum_of(model, more, 1e3)[1] - sum_of(model, rows, 1e3)[1]).norm()) > 10 * CLIP


def test_a_site_whose_rows_reached_another_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that go to the wrong site, as a slip in the bookkeeping of units would send them."""
    model = of_core("lstm")
    check_sites_apart(model)
    together._SHOWN.clear()
    together._APART.clear()
    right = together._add_clipped

    def shifted(parts: Any, row: Any, into: list[int], *given: Any) -> None:
        right(parts, row, [(which + 1) % 2 if which >= 0 else which for which in into], *given)

    monkeypatch.setattr(together, "_add_clipped", shifted)
    with pytest.raises(NotTogetherError, match="beside another site"):
        check_sites_apart(model)


def test_every_site_gets_noise_of_its_own_as_wide_as_the_event_says() -> None:
    model = of_core("lstm")
    sites = [batch_of([], WIDTH) for _ in range(40)]
    settings = StepSettings(
        sampling_rate=0.5, noise_multiplier=1.5, clip_norm=CLIP, normaliser=5.0, steps=1, learning_rate=1.0
    )

    def updates(noises: list[SecureGaussian]) -> np.ndarray:
        found = train_together(model, sites, settings, samplers=[Everyone()] * len(sites), noises=noises)
        return np.stack([flat(each) for each in found])

    wide = 1.5 * (1 + INFLATION) * CLIP / 5.0
    fresh = updates([SecureGaussian() for _ in sites])

    def chi_square(values: np.ndarray) -> float:
        return float(
            2
            * min(
                stats.chi2(values.size).cdf(found := (values**2).sum() / wide**2),
                stats.chi2(values.size).sf(found),
            )
        )

    assert chi_square(fresh) > 1e-6
    assert chi_square(0.9 * fresh) < 1e-6
    limit = 6 / np.sqrt(fresh.shape[1])
    correlations = np.corrcoef(fresh) - np.eye(len(sites))
    assert np.abs(correlations).max() < limit
    same = train_together(
        model, sites, settings, samplers=[Everyone()] * 40, noises=[SeededGaussian(1) for _ in sites]
    )
    assert np.corrcoef(flat(same[0]), flat(same[1]))[0, 1] > limit  # a reused seed would be seen


def test_a_user_whose_gradient_is_no_number_contributes_nothing() -> None:
    class Poisoned(Recommend):
        def per_user_loss(self, batch: HistoryBatch) -> Tensor:
            return super().per_user_loss(batch) * torch.where(batch.items[:, 0] == 7, torch.inf, 1.0)

    model = a_model(Poisoned)
    moved(model)
    clean = [[1, 2, 3], [4, 5, 6]]
    assert torch.equal(sum_of(model, [[*clean, [7, 8, 9]], clean])[1], sum_of(model, [clean, clean])[1])
    assert bool(sum_of(model, [[*clean, [7, 8, 9]], clean]).isfinite().all())


def test_a_model_that_reads_its_weights_beside_the_product_is_not_trained_together() -> None:
    class Peeking(Recommend):
        def per_user_loss(self, batch: HistoryBatch) -> Tensor:
            return super().per_user_loss(batch) * (1 + self.residual.weight.detach().square().sum())

    model = a_model(Peeking)
    with pytest.raises(NotTogetherError):
        trained(model, sites_of())
