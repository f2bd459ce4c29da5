"""Family `lstm-vae`: a recurrent state, a random code of it that must explain the event, and a prediction from both.

x_t -> LSTM -> h_t; z_t ~ N(mu(h_t), sigma(h_t)); a decoder reconstructs x_t from z_t; a second recurrence over
[h_t ; z_t] gives the residual state. Loss: the task's + beta KL(z_t || N(0, 1)) + the decoder's (Kingma & Welling
2014; Chung et al. 2015 for codes along a sequence), each a mean over the user's own events. Scoring takes z_t = mu.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from common.models.batches import HistoryBatch
from common.models.heads import zero_linear
from common.models.names import CORES, named
from common.models.row_noise import row_noise
from common.models.sequence import Ingredients, Reading, SequenceModel


class LstmVae(SequenceModel):
    """See the module. The plan's core takes the place of both recurrences."""

    def __init__(self, ingredients: Ingredients) -> None:
        plan = ingredients.plan
        super().__init__(
            ingredients.vectors,
            task=ingredients.task,
            item_prior=plan.item_prior,
            encoder=ingredients.encoder,
            with_times=plan.time_features,
        )
        self.latent_weight, self.reconstruction_weight = plan.latent_weight, plan.reconstruction_weight
        core = named(CORES, plan.core)
        self.core = core(self.input_width, plan.hidden_width)
        state = self.core.output_width
        self.code = nn.Linear(state, 2 * plan.latent_width)
        self.decoder = nn.Linear(plan.latent_width, self.width)
        self.second = core(state + plan.latent_width, plan.hidden_width)
        self.residual = zero_linear(self.second.output_width, self.width)

    @classmethod
    def of(cls, ingredients: Ingredients) -> Self:
        return cls(ingredients)

    def _nonce(self) -> int:
        """Changes with every step of training, and is a function of the public parameters alone."""
        return int(self.code.weight.detach().double().sum().nan_to_num().clamp(-1e6, 1e6).mul(2**30))

    def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
        x = self.task.event_vectors(vectors, batch)  # [users, events, width]
        h = self.core(self.event_inputs(x, batch))  # [users, events, hidden]
        mean, log_variance = self.code(h).chunk(2, dim=-1)  # each [users, events, latent]
        log_variance = log_variance.clamp(-8, 8)
        z, auxiliary = mean, None
        if self.training:
            z = mean + torch.exp(log_variance / 2) * row_noise(batch.items, mean.shape[-1], self._nonce())
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1)
            missed = (self.decoder(z) - x.detach()).square().sum(dim=-1)
            of_event = (self.latent_weight * kl + self.reconstruction_weight * missed) * batch.mask
            auxiliary = of_event.sum(dim=1) / batch.lengths.clamp(min=1)
        states = self.second(torch.cat([h, z], dim=-1))
        return Reading(self.residual(states), auxiliary)
