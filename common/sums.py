"""What the Gaussian sums over users hold: which item or pair of items stands at which place of the vector.

Site and server must agree on it, so it is here. The sums themselves, and the bound on what one user can move
them, are the site's (`client/statistics.py`); what is made of the released sums is `common/models/priors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.privacy.noise import LARGEST_DIMENSION

CONTRIBUTION_NORM = 1.0
"""The L2 norm that no user's contribution to a sum exceeds; what a GaussianSum event's noise is relative to."""

POPULARITY = "popularity"
"""[items] float32, the noisy sums of all sites added up; each user contributes a unit vector of own items."""
TRANSITIONS = "transitions"
"""[pairs] float32, as `PairLayout` lays them out; each user contributes a unit vector of own pairs."""
SITES = ".sites"
"""Ending of the [1] float32 that says how many sites' sums were added up: the noise grows with its root."""

METRICS = "metrics"
"""[3] float32, users, hits and NDCG: each user adds (1, hit, NDCG) / sqrt(3), of norm at most 1."""


@dataclass(frozen=True, slots=True)
class PairLayout:
    """Where the pair (i, j) of `size` items stands in a flat vector. An item never pairs with itself.

    Attributes:
        size: number of items.
        symmetric: whether (i, j) and (j, i) are one place: half the places, so half the noise.
    """

    size: int
    symmetric: bool

    @property
    def places(self) -> int:
        """Length of the vector."""
        ordered = self.size * (self.size - 1)
        return ordered // 2 if self.symmetric else ordered

    def place(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[pairs] places of pairs with first != second, both in [0, size)."""
        if self.symmetric:
            low, high = np.minimum(first, second), np.maximum(first, second)
            # Row `low` of the upper triangle begins after size - 1, size - 2, ... places.
            upper: npt.NDArray[np.int64] = low * (2 * self.size - low - 1) // 2 + (high - low - 1)
            return upper
        return first * (self.size - 1) + second - (second > first)

    def matrix(self, vector: Tensor) -> Tensor:
        """[places] -> [size, size], (from, to), zero on the diagonal.

        Raises:
            ValueError: the vector has another length.
        """
        if vector.shape != (self.places,):
            raise ValueError(f"{tuple(vector.shape)} is no vector of {self.places} pairs")
        full = vector.new_zeros(self.size, self.size)
        if self.symmetric:
            upper = torch.triu_indices(self.size, self.size, offset=1, device=vector.device)
            full[upper[0], upper[1]] = vector
            return full + full.T
        full[~torch.eye(self.size, dtype=torch.bool, device=vector.device)] = vector
        return full


def most_items(symmetric: bool, witness_places: int = 0) -> int:
    """The most items whose pairs still fit one release (`LARGEST_DIMENSION`), beside its witness."""
    size = 2
    while PairLayout(size + 1, symmetric).places + witness_places <= LARGEST_DIMENSION:
        size += 1
    return size


def top_items(popularity: Tensor, count: int) -> Tensor:
    """[count] int64, ascending: the items of largest released popularity, ties to the lower row.

    A function of a release alone, so that every site and the server arrive at the same items at no cost.
    """
    order = torch.sort(popularity, descending=True, stable=True).indices
    return order[:count].sort().values
