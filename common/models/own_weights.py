"""Recurrences whose rows may belong to several sites, each with weights of its own.

One site at a time, a layer's weight is [out, in]. In a simulation that trains many sites in one batch
(`client/training_together.py`) it is [sites, out, in], rows stand site after site, and each site has as many.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

OWN_WEIGHTS = "own_weights"
"""Attribute of a Linear layer that holds [sites, out, in] while many sites are trained at once."""


def weight_of(layer: nn.Linear) -> Tensor:
    """[out, in], or [sites, out, in]; without a gradient."""
    own: Tensor | None = getattr(layer, OWN_WEIGHTS, None)
    return layer.weight.detach() if own is None else own


def rows_times(rows: Tensor, weight: Tensor, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Each row by the matrix of its site, and something added.

    Args:
        rows: [rows, in].
        weight: [in, out], or [sites, in, out].
        plus: [rows, out].
        out: [rows, out], written to where given.

    Returns:
        [rows, out].
    """
    if weight.ndim == 2:
        if plus is None:
            return torch.mm(rows, weight) if out is None else torch.mm(rows, weight, out=out)
        return torch.addmm(plus, rows, weight) if out is None else torch.addmm(plus, rows, weight, out=out)
    found = torch.bmm(rows.reshape(len(weight), -1, rows.shape[-1]), weight).flatten(0, 1)
    if plus is not None:
        found += plus
    return found if out is None else out.copy_(found)
