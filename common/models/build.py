"""From a plan, a public catalog and a language model's folder to an interest model, the same at every site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.config import ModelPlan
from common.models.history_encoder import HistoryEncoder
from common.models.interface import InterestModel
from common.models.item_vectors import TextProjection, item_vectors
from common.models.language_model import LanguageModel, load_language_model
from common.models.names import FAMILIES, named


@dataclass(frozen=True)
class BuiltModel:
    """An interest model and how a text outside the catalog gets into its space."""

    model: InterestModel
    vectors: Tensor
    projection: TextProjection
    language_model: LanguageModel


def item_texts(texts: Sequence[str], categories: Sequence[Sequence[str]]) -> list[str]:
    """What the language model reads of each item: its text, then its categories."""
    return [
        ". ".join(part for part in (text.strip(), ", ".join(names)) if part)
        for text, names in zip(texts, categories, strict=True)
    ]


def build_model(plan: ModelPlan, texts: list[str], folder: Path, *, cache: Path | None = None) -> BuiltModel:
    """The model of a plan at its seeded start.

    Args:
        texts: [items] what the language model reads of each item.
        folder: of the language model.
        cache: where item vectors are kept, by content; None to compute them anew.

    Raises:
        LanguageModelError: the language model cannot be read, or not in this mode.
    """
    lm = load_language_model(folder)
    public = item_vectors(lm, texts, plan.width, cache=cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        encoder = None
        if plan.mode == "lora":
            encoder = HistoryEncoder(
                lm,
                texts,
                public.projection,
                top_layers=plan.lora_layers,
                rank=plan.lora_rank,
                train_down=plan.lora_train_down,
                most_tokens=plan.most_tokens,
                seed=plan.seed,
            )
        negatives = None
        if plan.negatives is not None and plan.negatives < len(texts):
            negatives = torch.randperm(len(texts))[: plan.negatives].sort().values
        model = named(FAMILIES, plan.family)(
            public.vectors,
            core=plan.core,
            hidden_width=plan.hidden_width,
            item_prior=plan.item_prior,
            negatives=negatives,
            encoder=encoder,
        )
    return BuiltModel(model=model, vectors=public.vectors, projection=public.projection, language_model=lm)
