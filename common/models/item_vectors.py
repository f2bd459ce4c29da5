"""Frozen item vectors: the catalog's texts through the language model, centred, rotated and scaled.

Everything here is a function of public things (catalog and language model), so it is computed anywhere, cached
by content, and costs no privacy.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from common.models.language_model import LanguageModel, embed_texts


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

    With X = U S V' (centred), a vector is unit(U S^0.5): between plain PCA (U S) and full whitening (U).

    Args:
        pooled: [items, encoder width]; rows of zeros are items without text, and stay so.
        width: number of components; fewer where the catalog has fewer.
    """
    spoken = pooled.abs().sum(dim=1) > 0
    if not bool(spoken.any()):
        raise ValueError("no item of the catalog has a text; give the catalog a text column")
    x = pooled[spoken].double()
    mean = x.mean(dim=0)
    _, spread, directions = torch.linalg.svd(x - mean, full_matrices=False)
    # A direction's sign is arbitrary: take the one whose largest entry is positive, the same on every machine.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()
    keep = min(width, int((spread > 1e-6 * spread.max().clamp(min=1e-12)).sum()))
    if keep == 0:  # one text, or all alike: any direction will do
        rotation = torch.eye(x.shape[1], dtype=x.dtype)[:, :1]
        mean = torch.zeros_like(mean)
    else:
        rotation = directions[:keep].T / spread[:keep].sqrt()
    rotation = torch.nn.functional.pad(rotation, (0, width - rotation.shape[1]))
    projection = TextProjection(mean=mean.float(), rotation=rotation.float())
    return ItemVectors(vectors=projection(pooled) * spoken.unsqueeze(-1), projection=projection)


def item_vectors(
    lm: LanguageModel, texts: list[str], width: int, *, cache: Path | None = None
) -> ItemVectors:
    """Item vectors of a catalog's texts, from the cache where these texts went through this model before."""
    if cache is None:
        return project(embed_texts(lm, texts), width)
    key = hashlib.sha256(lm.digest.encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    file = cache / f"{key.hexdigest()[:32]}.safetensors"
    if file.is_file():
        pooled = load_file(file)["pooled"]
    else:
        pooled = embed_texts(lm, texts)
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        save_file({"pooled": pooled}, partial)
        partial.replace(file)
    return project(pooled, width)
