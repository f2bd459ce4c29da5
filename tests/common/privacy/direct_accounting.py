"""Epsilons by the libraries' own accountants, charge by charge: nothing of Fedtide's accounting is asked."""

from __future__ import annotations

from collections.abc import Sequence

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from common.privacy.mechanisms import Event, GaussianSum, PoissonSubsampledGaussian


def by_dp_accounting(events: Sequence[Event], delta: float) -> float:
    """Every charge one by one, by the library's own accountant."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for event in events:
        match event:
            case GaussianSum():
                accountant.compose(GaussianDpEvent(event.noise_multiplier))
            case PoissonSubsampledGaussian():
                step = PoissonSampledDpEvent(event.sampling_rate, GaussianDpEvent(event.noise_multiplier))
                accountant.compose(step, event.steps)
    return float(accountant.get_epsilon(delta))


def by_opacus(kind: type, events: Sequence[Event], delta: float) -> float:
    """Step by step, by Opacus' accountant of this kind."""
    accountant = kind()
    for event in events:
        steps = event.steps if isinstance(event, PoissonSubsampledGaussian) else 1
        rate = event.sampling_rate if isinstance(event, PoissonSubsampledGaussian) else 1.0
        for _ in range(steps):
            accountant.step(noise_multiplier=event.noise_multiplier, sample_rate=rate)
    return float(accountant.get_epsilon(delta))
