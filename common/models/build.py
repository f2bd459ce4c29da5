"""From a plan, a public catalog and a language model's folder to an interest model, the same at every site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.config import PlanError
from common.model_plan import ModelPlan
from common.models.history_encoder import HistoryEncoder
from common.models.interface import InterestModel
from common.models.item_vectors import TextProjection, item_vectors
from common.models.language_model import LanguageModel, load_language_model
from common.models.names import FAMILIES, FrozenPrecision, named
from common.models.sequence import Ingredients
from common.models.tasks.interest import Interest
from common.models.tasks.next_category import NextCategory
from common.models.tasks.next_item import NextItem
from common.models.tasks.task import Task


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


def make_task(plan: ModelPlan, vectors: Tensor, categories: Sequence[Sequence[str]] | None) -> Task:
    """The plan's task over a catalog.

    Raises:
        PlanError: the task is next-category, but the catalog has fewer than two categories.
    """
    if plan.task == "interest":
        return Interest(vectors, like_weight=plan.like_weight, balance=plan.balance_likes)
    if plan.task == "next-category":
        return NextCategory(vectors, category_membership(categories or [()] * len(vectors)))
    negatives = None
    if plan.negatives is not None and plan.negatives < len(vectors):
        negatives = torch.randperm(len(vectors))[: plan.negatives].sort().values
    return NextItem(vectors, negatives=negatives)


def category_names(categories: Sequence[Sequence[str]]) -> list[str]:
    """The catalog's categories in alphabetical order: the candidates of task `next-category`."""
    return sorted({name for names in categories for name in names})


def category_membership(categories: Sequence[Sequence[str]]) -> Tensor:
    """[items, categories] bool.

    Raises:
        PlanError: there are fewer than two categories.
    """
    names = category_names(categories)
    if len(names) < 2:
        raise PlanError(
            f"model.task next-category needs a catalog with at least two categories, but it has {len(names)}: "
            "give the catalog a categories column, or choose another task"
        )
    place = {name: number for number, name in enumerate(names)}
    member = torch.zeros(len(categories), len(names), dtype=torch.bool)
    for row, of_item in enumerate(categories):
        member[row, [place[name] for name in of_item]] = True
    return member


def build_model(
    plan: ModelPlan,
    texts: list[str],
    folder: Path,
    *,
    cache: Path | None = None,
    categories: Sequence[Sequence[str]] | None = None,
    witness_places: int = 0,
    frozen_precision: FrozenPrecision = "float32",
) -> BuiltModel:
    """The model of a plan at its seeded start.

    Args:
        texts: [items] what the language model reads of each item.
        folder: of the language model.
        cache: where texts' tokens and states are kept, by content; None to compute them anew.
        categories: [items] names of each item's categories; the task `next-category` needs them.
        witness_places: coordinates that carry noise alone, as the plan's privacy section says.
        frozen_precision: of the language model's frozen weights in mode lora.

    Raises:
        LanguageModelError: the language model cannot be read, or not in this mode, or does not know the catalog's
            words.
        PlanError: the catalog lacks what the task needs.
    """
    lm = load_language_model(folder)
    public = item_vectors(lm, texts, plan.width, cache=cache, unknown_tokens=plan.unknown_tokens)
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
                precision=getattr(torch, frozen_precision),
                cache=cache,
            )
        task = make_task(plan, public.vectors, categories)
        model: InterestModel = named(FAMILIES, plan.family).of(
            Ingredients(public.vectors, task, lm, public.projection, encoder, plan)
        )
    model.set_witness(witness_places)
    return BuiltModel(model=model, vectors=public.vectors, projection=public.projection, language_model=lm)
