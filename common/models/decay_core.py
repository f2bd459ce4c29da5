"""Temporal core `decay`: a learned mixture of exponential kernels, with two numbers a kernel to learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DecayCore(nn.Module):
    """state_t = sum over kernels of weight * weighted mean of x_s, with weights decay^(t - s) for s <= t.

    Both the decays and the weights are Linear layers on ones, so a gradient has one row a user. Half-lives start
    geometrically spaced from half an event to 64 events; the weights start equal.

    Args:
        input_width: width of an event vector, and of the state.
        hidden_width: number of kernels.
    """

    def __init__(self, input_width: int, hidden_width: int) -> None:
        super().__init__()
        self.output_width = input_width
        self.decays = nn.Linear(1, hidden_width, bias=False)
        self.weights = nn.Linear(1, hidden_width, bias=False)
        half_lives = 2.0 ** torch.linspace(-1, 6, hidden_width)
        decays = 0.5 ** (1 / half_lives)
        with torch.no_grad():
            self.decays.weight.copy_(torch.logit(decays).unsqueeze(1))
            self.weights.weight.fill_(1 / hidden_width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [users, events, input_width] -> [users, events, input_width]."""
        users, events, _ = x.shape
        ones = x.new_ones(users, 1)
        log_decays = nn.functional.logsigmoid(self.decays(ones))  # [users, kernels]
        place = torch.arange(events, device=x.device)
        age = (place.unsqueeze(1) - place.unsqueeze(0)).to(x.dtype)  # [events (now), events (then)]
        past = age >= 0
        kernels = torch.exp(log_decays.view(users, -1, 1, 1) * age.clamp(min=0)) * past
        kernels = kernels / kernels.sum(dim=-1, keepdim=True)  # [users, kernels, events, events]
        mixed = torch.einsum("uk,ukts->uts", self.weights(ones), kernels)
        return mixed @ x
