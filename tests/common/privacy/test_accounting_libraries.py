"""What the libraries of accounting get wrong, or leave to the caller."""

from __future__ import annotations

import math
import warnings

import pytest

from common.privacy.accountants import (
    LARGEST_EPSILON,
    ContradictionError,
    cross_check,
    epsilon_pld,
    epsilon_prv,
    epsilon_rdp,
    epsilon_rdp_google,
    published_epsilon,
)
from tests.common.privacy.accountant_cases import dp_sgd


def test_dp_accountings_rdp_silently_drops_orders_and_nearly_doubles() -> None:
    events = [dp_sgd(0.2, 0.4, 200)]
    assert epsilon_rdp_google(events, 1e-5) > 1.9 * epsilon_rdp(events, 1e-5)
    assert published_epsilon(events, 1e-5).rdp < 160


def test_opacus_rdp_has_a_floor_that_ours_lowers() -> None:
    from opacus.accountants import RDPAccountant

    stock = RDPAccountant()
    stock.history = [(10.0, 0.01, 10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        floor = stock.get_epsilon(1e-5)
        stock.history = [(10.0, 0.01, 0)]
        of_nothing = stock.get_epsilon(1e-5)
    assert floor == pytest.approx(0.103, abs=1e-3)
    assert of_nothing == pytest.approx(0.103, abs=1e-3)
    assert epsilon_rdp([dp_sgd(0.01, 10, 10)], 1e-5) < 0.2 * floor
    assert epsilon_rdp([], 1e-5) == 0


@pytest.mark.parametrize(
    ("rate", "noise", "steps"), [(0.01, 1, 1000), (0.1, 0.8, 50), (1, 4, 10), (0.2, 2, 500)]
)
def test_our_rdp_is_opacus_own_where_that_has_no_floor(rate: float, noise: float, steps: int) -> None:
    from opacus.accountants import RDPAccountant

    stock = RDPAccountant()
    stock.history = [(noise, rate, steps)]
    assert epsilon_rdp([dp_sgd(rate, noise, steps)], 1e-5) == pytest.approx(
        stock.get_epsilon(1e-5), rel=1e-12
    )


def test_prv_has_a_floor_and_fails_on_what_we_never_hand_to_it() -> None:
    from opacus.accountants import PRVAccountant

    tiny = [dp_sgd(0.001, 50, 1)]
    assert epsilon_pld(tiny, 1e-5) < 1e-3
    assert epsilon_prv(tiny, 1e-5) > 0.005
    assert published_epsilon(tiny, 1e-5).epsilon < 1e-3
    with pytest.raises(ValueError, match=r".*"):
        PRVAccountant().get_epsilon(1e-5)
    assert epsilon_prv([], 1e-5) == 0
    stock = PRVAccountant()
    stock.history = [(1.0, 0.1, 0)]
    with pytest.raises(ZeroDivisionError):
        stock.get_epsilon(1e-5)
    stock.history = [(0.0, 0.1, 1)]
    with pytest.raises(OverflowError):
        stock.get_epsilon(1e-5)
    with pytest.raises(ValueError, match=r".*"):
        epsilon_prv([dp_sgd(0.1, 1, 10)], 1e-16)


def test_the_pld_is_infinite_at_a_tiny_delta_and_then_nothing_is_published() -> None:
    events = [dp_sgd(0.1, 1.0, 10)]
    assert epsilon_pld(events, 1e-16) == math.inf
    with pytest.raises(ContradictionError, match="no finite epsilon"):
        published_epsilon(events, 1e-16)


def test_the_pld_depends_on_its_grid_always_from_above() -> None:
    events = [dp_sgd(0.01, 1, 1000)]
    figures = [epsilon_pld(events, 1e-5, discretisation=interval) for interval in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] == pytest.approx(3.867, abs=1e-3)
    assert figures[1] == pytest.approx(1.901, abs=1e-3)
    assert abs(figures[2] - figures[3]) < 2e-3


def test_the_adjacency_is_add_or_remove_and_replace_one_is_another_figure() -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation, UnsupportedEventError
    from dp_accounting.rdp import RdpAccountant

    replace_one = PLDAccountant(NeighboringRelation.REPLACE_ONE, 1e-3)
    replace_one.compose(GaussianDpEvent(4.0), 10)
    assert replace_one.get_epsilon(1e-5) == pytest.approx(7.511, abs=2e-3)
    assert epsilon_pld([dp_sgd(1, 4, 10)], 1e-5) == pytest.approx(3.341, abs=1e-3)
    rdp_replace_one = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    rdp_replace_one.compose(GaussianDpEvent(4.0), 10)  # the same library's RDP answers another question
    assert rdp_replace_one.get_epsilon(1e-5) == pytest.approx(3.617, abs=1e-3)
    with pytest.raises(UnsupportedEventError):
        rdp_replace_one.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), 1)


def test_shuffled_batches_accounted_as_poisson_would_be_too_low() -> None:
    """Opacus gives poisson_sampling=False the Poisson figure; what holds is one full sum an epoch."""
    two_epochs_as_poisson = epsilon_pld([dp_sgd(0.1, 0.8, 20)], 1e-5)
    two_full_sums = epsilon_pld([dp_sgd(1.0, 0.8, 2)], 1e-5)
    assert two_epochs_as_poisson == pytest.approx(5.68, abs=0.01)
    assert epsilon_rdp([dp_sgd(0.1, 0.8, 20)], 1e-5) == pytest.approx(6.673, abs=1e-3)
    assert two_full_sums == pytest.approx(8.60, abs=0.02)


def test_opacus_records_the_same_history_for_shuffled_and_poisson_batches() -> None:
    import torch
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    histories = []
    for poisson in (True, False):
        model = torch.nn.Linear(2, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = PrivacyEngine(accountant="rdp")
            model, optimizer, _ = engine.make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), 0.1),
                data_loader=DataLoader(TensorDataset(torch.randn(40, 2)), batch_size=4, shuffle=True),
                noise_multiplier=0.8,
                max_grad_norm=1.0,
                poisson_sampling=poisson,
            )
            for _ in range(20):
                optimizer.zero_grad()
                model(torch.randn(4, 2)).sum().backward()
                optimizer.step()
        histories.append(engine.accountant.history)
    assert histories[0] == histories[1] == [(0.8, 0.1, 20)]


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "gdp"),
    [(0.01, 0.8, 5000, 1e-5, 6.346), (0.05, 1.1, 400, 1e-4, 4.418), (0.5, 4.0, 100, 1e-5, 5.786)],
)
def test_the_clt_accountant_is_too_low_and_the_cross_check_would_refuse_it(
    rate: float, noise: float, steps: int, delta: float, gdp: float
) -> None:
    from opacus.accountants import GaussianAccountant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = GaussianAccountant()
        stock.history = [(noise, rate, steps)]
        too_low = stock.get_epsilon(delta)
    published = published_epsilon([dp_sgd(rate, noise, steps)], delta)
    assert too_low == pytest.approx(gdp, abs=1e-3)
    assert too_low < 0.99 * published.epsilon
    with pytest.raises(ContradictionError, match="PRV <= PLD"):
        cross_check(pld=too_low, rdp=published.rdp, prv=published.prv, closed_form=None)


def test_events_without_any_privacy_to_speak_of_do_not_fill_the_memory() -> None:
    assert epsilon_pld([dp_sgd(1.0, 0.1, 10_000_000)], 1e-5) == math.inf
    assert epsilon_pld([dp_sgd(0.5, 0.1, 1_000_000)], 1e-5) == math.inf
    assert epsilon_pld([dp_sgd(0.2, 0.3, 200)], 1e-5) < 2 * LARGEST_EPSILON
    with pytest.raises(ContradictionError, match="no finite epsilon"):
        published_epsilon([dp_sgd(1.0, 0.1, 10_000_000)], 1e-5)
