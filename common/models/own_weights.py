"""Linear maps whose rows may belong to several sites, each with weights of its own.

One site at a time, a layer's weight is [out, in]. In a simulation that trains many sites in one batch
(`client/training_together.py`) it is [sites, out, in], rows stand site after site, and each site has as many: a site
that has more than others stands there several times.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

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


def linear_of_sites(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Linear layer's output.

    Args:
        x: [rows, ..., in].
        weight, bias: [out, in] and [out], or [sites, out, in] and [sites, out].

    Returns:
        [rows, ..., out].
    """
    if weight.ndim == 2:
        return linear(x, weight, bias)
    rows = x.reshape(len(weight), -1, x.shape[-1])
    added = rows.new_zeros(1) if bias is None else bias.unsqueeze(1)
    found = torch.baddbmm(added, rows, weight.mT, beta=0 if bias is None else 1)
    return found.view(*x.shape[:-1], weight.shape[1])


def gradient_through(grad: Tensor, weight: Tensor, columns: int) -> Tensor:
    """The gradient of a Linear layer's first inputs.

    Args:
        grad: [rows, ..., out].
        weight: [out, in], or [sites, out, in].
        columns: how many inputs.

    Returns:
        [rows, ..., columns].
    """
    if weight.ndim == 2:
        return grad @ weight[:, :columns]
    rows = grad.reshape(len(weight), -1, grad.shape[-1])
    return torch.bmm(rows, weight[:, :, :columns]).view(*grad.shape[:-1], columns)
