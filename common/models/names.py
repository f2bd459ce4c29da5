"""Families and temporal cores by their name in the plan: one line each, and nothing imported until it is asked for.

A plan is checked against these names on machines and in commands that never load torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

FAMILIES: dict[str, str] = {
    "recommend": "common.models.families.recommend:Recommend",
}
"""Family -> its class, a `common.models.interface.InterestModel`. A new one is a file and a line."""

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
