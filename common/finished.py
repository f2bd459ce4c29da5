"""A trained run's model, ready to score: what its folder's plan, catalog, parameters and statistics come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.assets import home, language_model
from common.config import read_recorded_plan
from common.events.catalog import Catalog
from common.model_plan import ModelPlan
from common.models.build import BuiltModel, build_model, category_names, item_texts
from common.models.priors import make_priors
from common.wire import state_from_bytes


class FinishedError(ValueError):
    """A folder holds no run whose training ended; the message says why and what to do."""


@dataclass(frozen=True)
class FinishedModel:
    """A trained model over its public catalog, in eval mode.

    Attributes:
        plan: of the model.
        built: with trained parameters and released priors set.
    """

    plan: ModelPlan
    catalog: Catalog
    built: BuiltModel

    @property
    def candidates(self) -> tuple[str, ...]:
        """What the columns of scores are: the catalog's texts, or the names of its categories."""
        if self.plan.task == "next-category":
            return tuple(category_names(self.catalog.categories))
        return self.catalog.texts


def load_finished(folder: Path, *, offline: bool = False) -> FinishedModel:
    """The final model of a run's folder.

    Raises:
        FinishedError: the folder holds no run whose training ended; its evaluation may be missing.
    """
    if not folder.is_dir():
        raise FinishedError(f"there is no run folder {folder}: `ls runs` shows them")
    parameters, released = folder / "model.safetensors", folder / "released.safetensors"
    if not parameters.is_file():  # it is written when all rounds are over
        raise FinishedError(
            f"the training of the run in {folder} did not end well, so it has no model: go on with the run, or choose "
            "another"
        )
    plan, catalog = read_recorded_plan(folder / "plan.json"), Catalog.load(folder / "catalog.jsonl")
    built = build_model(
        plan.model,
        item_texts(catalog.texts, catalog.categories),
        language_model(plan.model.encoder, offline=offline),
        cache=home() / "item-vectors",
        categories=catalog.categories,
        witness_places=plan.privacy.witness_places,
    )
    built.model.load_trainable(state_from_bytes(parameters.read_bytes()))
    sums = state_from_bytes(released.read_bytes()) if released.is_file() else {}
    built.model.set_released(make_priors(sums, plan.statistics, len(catalog)))
    built.model.eval()
    return FinishedModel(plan.model, catalog, built)
