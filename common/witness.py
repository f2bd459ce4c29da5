"""The witness: places of a release that no user can reach, so that they hold noise alone.

An update carries them as a parameter of the model, a sum over users as places beyond its end. They get their noise in
the same draw as everything else in the release, so whoever holds the release can measure the noise level without
knowing anything about users (`fedtide audit noise`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

WITNESS = "witness"
"""Name of the model's parameter, and, after a dot, ending of the name of a sum's."""


def witness_name(of: str) -> str:
    """The name of the witness that travels with a sum."""
    return f"{of}.{WITNESS}"


def is_witness(name: str) -> bool:
    """Whether a tensor of a release is its witness."""
    return name == WITNESS or name.endswith(f".{WITNESS}")


def without_witness(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a release says beside its witness."""
    return {name: value for name, value in state.items() if not is_witness(name)}
