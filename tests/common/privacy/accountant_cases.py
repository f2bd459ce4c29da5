"""What the tests of the accountants share: steps of DP-SGD, as one event."""

from __future__ import annotations

from common.privacy.mechanisms import PoissonSubsampledGaussian


def dp_sgd(rate: float, noise: float, steps: int) -> PoissonSubsampledGaussian:
    return PoissonSubsampledGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps)
