"""What is said of a key that a schema does not have: the nearest one that it has."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

_NEAR = 0.7


def unknown_key(schema: type[BaseModel], place: str, what: str) -> str:
    """One sentence of a key that a schema has not.

    Args:
        place: of the key, as in "privacy.epsilno".
        what: is read by that schema, for the message: "a plan".
    """
    *sections, name = place.split(".")
    table: Any = schema
    for section in sections:
        field = table.model_fields.get(section) if hasattr(table, "model_fields") else None
        table = None if field is None else field.annotation
    if not hasattr(table, "model_fields"):
        return f"{place}: {what} has no such key"
    near = get_close_matches(name, list(table.model_fields), n=1, cutoff=_NEAR)
    elsewhere = [
        f"{section}.{name}"
        for section, field in schema.model_fields.items()
        if name in getattr(field.annotation, "model_fields", {})
    ]
    where = f"[{'.'.join(sections)}] of {what}" if sections else what
    if near:
        hint = f"did you mean {'.'.join([*sections, near[0]])}?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    else:
        hint = f"it has {', '.join(table.model_fields)}"
    return f"{place}: {where} has no such key; {hint}"
