"""Temporal core `attention`: each event attends to itself and to earlier ones of the same user."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


class AttentionCore(nn.Module):
    """One pre-norm block of causal self-attention (Vaswani et al. 2017), of Linear layers alone.

    Order enters by a fixed bias that falls with distance, another slope for each head (ALiBi, Press et al. 2022),
    and norms have no parameters, so nothing is trained but the Linear layers. Histories are padded on the right,
    so causality alone keeps padding out of every real event's state.

    Args:
        input_width: width of an event vector.
        hidden_width: width of the state.
    """

    slopes: Tensor

    def __init__(self, input_width: int, hidden_width: int) -> None:
        super().__init__()
        self.output_width = hidden_width
        self.heads = next(heads for heads in (4, 2, 1) if hidden_width % heads == 0)
        self.input_map = nn.Linear(input_width, hidden_width)
        self.query = nn.Linear(hidden_width, hidden_width, bias=False)
        self.key = nn.Linear(hidden_width, hidden_width, bias=False)
        self.value = nn.Linear(hidden_width, hidden_width, bias=False)
        self.output = nn.Linear(hidden_width, hidden_width, bias=False)
        self.up = nn.Linear(hidden_width, 2 * hidden_width)
        self.down = nn.Linear(2 * hidden_width, hidden_width)
        slopes = 2.0 ** -torch.arange(self.heads, dtype=torch.float32)  # 1, 1/2, 1/4, 1/8
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [users, events, input_width] -> [users, events, hidden_width]."""
        h: Tensor = self.input_map(x)
        users, events, width = h.shape
        normed = layer_norm(h, (width,))

        def by_head(y: Tensor) -> Tensor:
            return y.view(users, events, self.heads, -1).transpose(
                1, 2
            )  # [users, heads, events, width / heads]

        query, key, value = (
            by_head(self.query(normed)),
            by_head(self.key(normed)),
            by_head(self.value(normed)),
        )
        place = torch.arange(events, device=x.device)
        age = place.unsqueeze(1) - place.unsqueeze(0)  # [events (now), events (then)]
        bias = -self.slopes.to(h.dtype).view(-1, 1, 1) * age  # [heads, events, events]
        bias = bias.masked_fill(age < 0, float("-inf"))
        weights = torch.softmax(query @ key.transpose(2, 3) / (width / self.heads) ** 0.5 + bias, dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(users, events, width)
        h = h + self.output(mixed)
        return h + self.down(torch.relu(self.up(layer_norm(h, (width,)))))  # type: ignore[no-any-return]
