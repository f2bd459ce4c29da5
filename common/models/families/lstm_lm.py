"""Family `lstm-lm`: behaviour as soft tokens in a frozen language model's input.

Event vectors and features -> LSTM -> one soft token an event -> the frozen language model, whose attention lets
each place see the latest k soft tokens -> state. One pass a user gives the state after every event. The model's
weights never move; gradients go through it to the LSTM (Lester et al. 2021's idea, but each user's tokens are
computed from the user's own row, so no token is shared by a batch).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.models.batches import HistoryBatch
from common.models.heads import zero_linear
from common.models.model_folder import LanguageModelError
from common.models.names import CORES, named
from common.models.sequence import Ingredients, Reading, SequenceModel


class LstmLm(SequenceModel):
    """See the module. The plan's core takes the LSTM's place."""

    mean: Tensor
    rotation: Tensor
    usual_token: Tensor

    def __init__(self, ingredients: Ingredients) -> None:
        plan, lm = ingredients.plan, ingredients.language_model
        super().__init__(
            ingredients.vectors,
            task=ingredients.task,
            item_prior=plan.item_prior,
            encoder=ingredients.encoder,
            with_times=plan.time_features,
        )
        if plan.max_events + 1 > lm.most_tokens:
            raise LanguageModelError(
                f"max_events is {plan.max_events}, but the language model has {lm.most_tokens} positions, one for "
                f"each soft token of the family lstm-lm: choose at most {lm.most_tokens - 1}"
            )
        self.soft_tokens = plan.soft_tokens
        self.core = named(CORES, plan.core)(self.input_width, plan.hidden_width)
        words = lm.model.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
        self.to_token = nn.Linear(self.core.output_width, words.shape[1], bias=False)
        self.language_model = lm.model
        self.register_buffer("usual_token", words.mean(dim=0), persistent=False)
        self.token_scale = float(words.std())  # soft tokens as large as words
        self.register_buffer("mean", ingredients.projection.mean, persistent=False)
        self.register_buffer("rotation", ingredients.projection.rotation, persistent=False)
        self.residual = zero_linear(self.width, self.width)
        self._check_soft_tokens()

    @classmethod
    def of(cls, ingredients: Ingredients) -> Self:
        return cls(ingredients)

    def _attention(self, events: int, users: int) -> Tensor:
        """[users, 1, events, events] additive mask: the latest `soft_tokens` tokens, one's own included."""
        place = torch.arange(events, device=self.mean.device)
        age = place.unsqueeze(1) - place.unsqueeze(0)
        see = (age >= 0) & (age < self.soft_tokens)
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(age.shape, device=age.device).masked_fill(~see, lowest).expand(users, 1, -1, -1)

    def _seen(self, tokens: Tensor) -> Tensor:
        """[users, events, encoder width]: the language model's last states at soft tokens."""
        users, events, _ = tokens.shape
        self.language_model.eval()
        states: Tensor = self.language_model(
            inputs_embeds=tokens, attention_mask=self._attention(events, users), use_cache=False
        ).last_hidden_state
        return states

    @torch.no_grad()
    def _check_soft_tokens(self) -> None:
        """Tries the model on made-up tokens: an architecture that takes none, or ignores the mask, is refused.

        Raises:
            LanguageModelError: it fails, or lets an event see a later one.
        """
        kind = self.language_model.config.model_type  # type: ignore[union-attr]
        wave = torch.arange(4 * len(self.usual_token)).view(1, 4, -1).sin()
        tokens = self.usual_token + self.token_scale * wave
        changed = torch.cat([tokens[:, :3], self.usual_token - self.token_scale * wave[:, 3:]], dim=1)
        try:
            seen, other = self._seen(tokens), self._seen(changed)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise LanguageModelError(
                f"a model of type {kind} takes no soft tokens ({type(error).__name__}): choose another language "
                "model, or another family than lstm-lm"
            ) from error
        if not torch.allclose(seen[:, :3], other[:, :3], atol=1e-4 * float(seen.abs().max())):
            raise LanguageModelError(
                f"a model of type {kind} lets an event see later ones: choose another language model, or another "
                "family than lstm-lm"
            )

    def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
        x = self.task.event_vectors(vectors, batch)  # [users, events, width]
        if len(x) == 0:  # transformers cannot run on no rows
            return Reading(x)
        h = self.core(self.event_inputs(x, batch))  # [users, events, hidden]
        tokens = self.usual_token + self.token_scale * self.to_token(h)  # [users, events, encoder width]
        state = normalize((self._seen(tokens) - self.mean) @ self.rotation, dim=-1)  # [users, events, width]
        return Reading(self.residual(state))
