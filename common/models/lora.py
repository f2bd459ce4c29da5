"""Low-rank adapters (Hu et al. 2021) on a frozen language model's attention projections.

By default only the up-projection B is trained: the sites' mean of B A is then exact (the mean of products is
not the product of means), half the coordinates carry noise, and B = 0 at the start leaves A without a gradient
anyway (Sun et al. 2024, FFA-LoRA). A comes from a seed, so every site has the same.

Adapters can be held while the head above them learns first: their gradient passes through the head, and a head at
its start gives it no direction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TARGETS = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn", "Wqkv", "query_key_value")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    return ".lora_up." in name or ".lora_down." in name


class LoraLinear(nn.Module):
    """base(x) + scale * lora_up(lora_down(x)), with `lora_up` zero at the start; float32 whatever the base is."""

    def __init__(self, base: nn.Module, *, rank: int, train_down: bool, generator: torch.Generator) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
        # transformers' Conv1D (GPT-2) stores [in, out], Linear [out, in].
        outputs, inputs = weight.shape if isinstance(base, nn.Linear) else reversed(weight.shape)
        self.base = base
        self.lora_down = nn.Linear(inputs, rank, bias=False)
        self.lora_up = nn.Linear(rank, outputs, bias=False)
        self.scale = 2.0
        with torch.no_grad():
            self.lora_down.weight.copy_(torch.randn(rank, inputs, generator=generator) / inputs**0.5)
            self.lora_up.weight.zero_()
        self._train_down = train_down
        self.hold(False)

    def hold(self, held: bool) -> None:
        """Whether training leaves the adapter as it is."""
        self.lora_up.requires_grad_(not held)
        self.lora_down.requires_grad_(self._train_down and not held)

    def forward(self, x: Tensor) -> Tensor:
        """x: [users, tokens, inputs] -> [users, tokens, outputs]."""
        added = self.scale * self.lora_up(self.lora_down(x.to(self.lora_down.weight.dtype)))
        result: Tensor = self.base(x) + added.to(x.dtype)
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
