"""The generators that a site's exchange draws from: the secure ones, unless a caller in this process says otherwise.

No request, plan or policy reaches them: they are a keyword of `site.answer` and `together.answered_together`, for
audits and tests that need to know what was drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.privacy.noise import GaussianNoise, SecureGaussian, SecurePoissonSampler, UserSampler


@dataclass(frozen=True)
class Generators:
    """Makes the generators of one exchange of one site.

    Attributes:
        noise: called once for each release.
        sampler: called once for each round of private fine-tuning.
    """

    noise: Callable[[], GaussianNoise] = SecureGaussian
    sampler: Callable[[], UserSampler] = SecurePoissonSampler


SECURE = Generators()
