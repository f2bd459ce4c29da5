"""Frozen item vectors: the catalog's texts through the language model, centred, rotated and scaled.

Everything here is a function of public things (catalog and language model), so it is computed anywhere, cached
by content, and costs no privacy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.models.array_cache import Array, cached_array
from common.models.language_model import TOKENS_OF_A_TEXT, LanguageModel, embed_texts, texts_key
from common.models.names import UnknownTokens
from common.models.vocabulary import check_vocabulary

_ROWS_AT_ONCE = 16_384
_ROUNDING = 1e-6
"""A direction whose spread is below this part of the whole is rounding, and no direction."""


@dataclass(frozen=True)
class TextProjection:
    """From a text's pooled state to the space of item vectors: unit((x - mean) @ rotation).

    Attributes:
        mean: [encoder width].
        rotation: [encoder width, width]: principal directions, each divided by the square root of its spread.
    """

    mean: Tensor
    rotation: Tensor

    def __call__(self, pooled: Tensor) -> Tensor:
        """pooled: [..., encoder width] -> [..., width], of unit norm."""
        return normalize((pooled - self.mean) @ self.rotation, dim=-1)


@dataclass(frozen=True)
class ItemVectors:
    """The catalog in the model's space.

    Attributes:
        vectors: [items, width] float32 of unit norm; zeros for an item without text.
        projection: how any other text gets there.
    """

    vectors: Tensor
    projection: TextProjection


def project(pooled: Tensor, width: int) -> ItemVectors:
    """Half-whitened principal components of the pooled texts: directions scaled by the root of their spread.

    With X = U S V' (centred), a vector is unit(U S^0.5): between plain PCA (U S) and full whitening (U). V and S
    come from X'X, summed part by part: a catalog of a million items is never in memory in float64.

    Args:
        pooled: [items, encoder width]; rows of zeros are items without text, and stay so.
        width: number of components; fewer where the catalog has fewer.
    """
    parts = pooled.split(_ROWS_AT_ONCE)
    spoken = [part.abs().sum(dim=1) > 0 for part in parts]
    count = sum(int(real.sum()) for real in spoken)
    if not count:
        raise ValueError("no item of the catalog has a text; give the catalog a text column")
    total = torch.zeros(pooled.shape[1], dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    for part in parts:
        total += part.double().sum(dim=0)
        size += part.double().square().sum()
    mean = total / count
    gram = torch.zeros(pooled.shape[1], pooled.shape[1], dtype=torch.float64)
    for part, real in zip(parts, spoken, strict=True):
        x = part[real].double() - mean
        gram += x.T @ x
    squares, directions = torch.linalg.eigh(gram)
    spread, directions = squares.flip(0).clamp(min=0).sqrt(), directions.flip(1)
    # A direction's sign is arbitrary: take the one whose largest entry is positive, the same on every machine.
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign()
    keep = min(width, int((spread > _ROUNDING * torch.maximum(spread[0], size.sqrt())).sum()))
    if keep == 0:  # one text, or all alike: any direction will do
        rotation = torch.eye(len(mean), dtype=torch.float64)[:, :1]
        mean = torch.zeros_like(mean)
    else:
        rotation = directions[:, :keep] / spread[:keep].sqrt()
    rotation = torch.nn.functional.pad(rotation, (0, width - rotation.shape[1]))
    projection = TextProjection(mean=mean.float(), rotation=rotation.float())
    vectors = [projection(part) * real.unsqueeze(-1) for part, real in zip(parts, spoken, strict=True)]
    return ItemVectors(vectors=torch.cat(vectors), projection=projection)


def item_vectors(
    lm: LanguageModel,
    texts: list[str],
    width: int,
    *,
    cache: Path | None = None,
    unknown_tokens: UnknownTokens = "allow",
) -> ItemVectors:
    """Item vectors of a catalog's texts, from the cache where these texts went through this model before.

    What the language model said of each text lies in a file of the cache, and is mapped, not read, from there.

    Args:
        unknown_tokens: what becomes of a catalog of which more than a tenth is unknown to the language model.

    Raises:
        LanguageModelError: such a catalog is refused, or the language model cannot be read.
    """

    def check() -> None:
        if unknown_tokens == "refuse":
            check_vocabulary(lm.tokenizer, texts)

    if cache is None:
        check()
        return project(embed_texts(lm, texts), width)

    def fill(said: Array) -> None:
        check()
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            part = texts[start : start + _ROWS_AT_ONCE]
            said[start : start + len(part)] = embed_texts(lm, part).numpy()

    # What was tried before it was kept is part of the key: what lies there has passed.
    what = f"{lm.reading} of {TOKENS_OF_A_TEXT} tokens, tried; unknown tokens: {unknown_tokens}"
    key = texts_key(what, lm, texts)
    return project(
        torch.from_numpy(cached_array(cache, key, (len(texts), lm.width), np.float32, fill)), width
    )
