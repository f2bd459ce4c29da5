"""The part of a plan that says which model is trained; the plan as a whole is in `config.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from common.events.labels import LabelRule
from common.models.names import CORES, FAMILIES, TASKS, UnknownTokens
from common.phases import FROZEN

_REFUSED_ADAPTERS = {
    "dora": "its magnitudes are no Linear layer, and Opacus has no gradient for them",
    "ia3": "its scaling vectors are no Linear layer, and Opacus has no gradient for them",
    "vera": "its scaling vectors are no Linear layer, and Opacus has no gradient for them",
    "prompttuning": "one prompt is shared by the batch, so Opacus gives one gradient for all users, silently",
    "prefixtuning": "one prefix is shared by the batch, so its gradient has no row for each user",
    "ptuning": "one prompt is shared by the batch, so its gradient has no row for each user",
    "gradientcheckpointing": "Opacus' hooks fail on layers that are computed twice",
}
"""Adapters known to be wrong or unsupported under per-user gradients (measured: notes of the project), and why."""


class ModelPlan(BaseModel):
    """Which model is trained. The catalog and the language model are public."""

    model_config = FROZEN

    family: str = "recommend"
    core: str = "lstm"
    task: Literal["next-item", "interest", "next-category"] = Field(
        default="next-item",
        description="what is predicted: the next item, whether it is liked, or its category",
    )
    encoder: str = Field(
        default="all-MiniLM-L6-v2", description="language model: a known name, a folder or a hub id"
    )
    unknown_tokens: UnknownTokens = Field(
        default="refuse",
        description="allow: train even where the encoder does not know a tenth of the catalog's tokens",
        exclude_if=lambda said: bool(
            said == "refuse"
        ),  # plans of before say the same, and have the same digest
    )
    mode: Literal["vectors", "lora"] = Field(
        default="vectors", description="vectors: frozen item vectors; lora: adapters on the top layers"
    )
    width: Annotated[int, Field(ge=4, le=1024, multiple_of=4)] = 64
    hidden_width: Annotated[int, Field(ge=4, le=4096, multiple_of=4)] = 16
    max_events: Annotated[int, Field(ge=2, le=2000)] = 50
    time_features: bool = Field(default=True, description="gaps and ages of events beside event vectors")
    item_prior: bool = Field(default=True, description="train a prior for each item beside the residual")
    negatives: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="public negatives in the loss; none: the whole catalog"
    )
    adapter: str = Field(
        default="lora", description="how a language model is adapted; only lora is vouched for"
    )
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 8
    lora_layers: Annotated[int, Field(ge=1, le=128)] = 2
    lora_train_down: bool = False
    most_tokens: Annotated[int, Field(ge=8, le=8192)] = 160
    session_gap: Annotated[int, Field(ge=1)] = Field(
        default=1800, description="dual: seconds without an event that end a session"
    )
    latent_width: Annotated[int, Field(ge=1, le=1024)] = Field(default=8, description="lstm-vae: width of z")
    latent_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="lstm-vae: beta, the weight of KL(z)"
    )
    reconstruction_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="lstm-vae: weight of the decoder's loss"
    )
    soft_tokens: Annotated[int, Field(ge=1, le=256)] = Field(
        default=4, description="lstm-lm: how many latest soft tokens the language model reads"
    )
    members: tuple[str, ...] = Field(
        default=("recommend", "dual"), description="ensemble: families whose scores are averaged"
    )
    liked_from: float = Field(default=4.0, description="interest: the least value of a liked event")
    liked_kinds: tuple[str, ...] = Field(
        default=(), description="interest: kinds of event that are liked; values then play no part"
    )
    like_weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="interest: public weight of a liked event in the loss"
    )
    balance_likes: bool = Field(
        default=False, description="interest: weigh both classes equally within each user's own row"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _known(self) -> ModelPlan:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is unknown: choose one of {', '.join(FAMILIES)}")
        if self.core not in CORES:
            raise ValueError(f"core {self.core!r} is unknown: choose one of {', '.join(CORES)}")
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is unknown: choose one of {', '.join(TASKS)}")
        if self.adapter != "lora":
            reason = _REFUSED_ADAPTERS.get(
                self.adapter.casefold().replace("-", "").replace("_", ""), "nobody has tested its gradients"
            )
            raise ValueError(
                f"adapter {self.adapter!r} is refused: per user, {reason}; choose lora, whose are tested"
            )
        if self.family == "ensemble":
            possible = [name for name in FAMILIES if name != "ensemble"]
            for name in self.members:
                if name not in possible:
                    raise ValueError(
                        f"{name!r} cannot be a member of an ensemble: choose among {', '.join(possible)}"
                    )
                if self.members.count(name) > 1:
                    raise ValueError(
                        f"{name!r} stands {self.members.count(name)} times among the members of the ensemble: name "
                        "each family once, its weight is learned"
                    )
            if len(self.members) < 2:
                raise ValueError(
                    f"an ensemble needs 2 to {len(possible)} members, not {len(self.members)}: choose among "
                    f"{', '.join(possible)}"
                )
        return self

    @property
    def label_rule(self) -> LabelRule | None:
        """How events are labelled, where the task needs labels."""
        if self.task != "interest":
            return None
        return LabelRule(liked_from=self.liked_from, liked_kinds=self.liked_kinds)
