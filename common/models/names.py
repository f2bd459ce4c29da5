"""Families, tasks and temporal cores by their name in the plan: one line each.

Nothing is imported until it is asked for: a plan is checked against these names in commands that never load torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Literal

FrozenPrecision = Literal["float32", "bfloat16"]
"""Of the language model's frozen weights in mode lora, and of what they compute."""

UnknownTokens = Literal["refuse", "allow"]
"""What becomes of a catalog of which the language model does not know a tenth of the tokens."""

FAMILIES: dict[str, str] = {
    "recommend": "common.models.families.recommend:Recommend",
    "dual": "common.models.families.dual:Dual",
    "lstm-vae": "common.models.families.lstm_vae:LstmVae",
    "lstm-lm": "common.models.families.lstm_lm:LstmLm",
    "classifier": "common.models.families.classifier:Classifier",
    "ensemble": "common.models.families.ensemble:Ensemble",
}
"""Family -> its class, a `common.models.sequence.SequenceModel`. A new one is a file and a line."""

TASKS: dict[str, str] = {
    "next-item": "common.models.tasks.next_item:NextItem",
    "interest": "common.models.tasks.interest:Interest",
    "next-category": "common.models.tasks.next_category:NextCategory",
}
"""Task -> its class, a `common.models.tasks.task.Task`: what is predicted, and the loss that trains it."""

CORES: dict[str, str] = {
    "lstm": "common.models.cores:LstmCore",
    "gru": "common.models.cores:GruCore",
    "attention": "common.models.attention_core:AttentionCore",
    "decay": "common.models.decay_core:DecayCore",
}
"""Core -> its class; each takes (input_width, hidden_width) and has an `output_width`."""


def named(table: Mapping[str, str], name: str) -> Any:
    """The class of a name.

    Raises:
        ValueError: the table has no such name.
    """
    if name not in table:
        raise ValueError(f"{name!r} is unknown: choose one of {', '.join(table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
