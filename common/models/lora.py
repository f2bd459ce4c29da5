"""Low-rank adapters (Hu et al. 2021) on a frozen language model's attention projections.

By default only the up-projection B is trained: the sites' mean of B A is then exact (the mean of products is
not the product of means), half the coordinates carry noise, and B = 0 at the start leaves A without a gradient
anyway (Sun et al. 2024, FFA-LoRA). A comes from a seed, so every site has the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TARGETS = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn", "Wqkv", "query_key_value")


class LoraLinear(nn.Module):
    """base(x) + scale * up(down(x)), with `up` zero at the start."""

    def __init__(self, base: nn.Module, *, rank: int, train_down: bool, generator: torch.Generator) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
        # transformers' Conv1D (GPT-2) stores [in, out], Linear [out, in].
        outputs, inputs = weight.shape if isinstance(base, nn.Linear) else reversed(weight.shape)
        self.base = base
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.scale = 2.0
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(rank, inputs, generator=generator) / inputs**0.5)
            self.up.weight.zero_()
        self.down.requires_grad_(train_down)

    def forward(self, x: Tensor) -> Tensor:
        """x: [users, tokens, inputs] -> [users, tokens, outputs]."""
        result: Tensor = self.base(x) + self.scale * self.up(self.down(x))
        return result


def add_lora(layer: nn.Module, *, rank: int, train_down: bool, generator: torch.Generator) -> int:
    """Puts adapters on a transformer layer's query and value projections.

    Returns:
        How many projections now have one.
    """
    added = 0
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if (
                name in _TARGETS
                and isinstance(getattr(child, "weight", None), Tensor)
                and child.weight.ndim == 2
            ):
                setattr(
                    parent, name, LoraLinear(child, rank=rank, train_down=train_down, generator=generator)
                )
                added += 1
    return added
