"""Family `recommend`: a user's state in the space of item vectors, scored against every item.

score(u_t, v_i) = u_t . v_i + prior_i, with u_t = content_t + P_u(core state, mean of events, last event). P_u
and the trained part of the prior start at zero, so the model before any private step is the content-based
recommender. A linear item map P_v would be absorbed by P_u (u . P_v v = P_v' u . v) and would share trainable
computation between users, so item vectors stay frozen and public.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from common.models.batches import HistoryBatch
from common.models.heads import beside, mean_so_far, zero_linear
from common.models.history_encoder import HistoryEncoder
from common.models.names import CORES, named
from common.models.sequence import Ingredients, Reading, SequenceModel
from common.models.tasks.task import Task


class Recommend(SequenceModel):
    """See the module.

    Args:
        core: name of the temporal core.
        hidden_width: width of the core's state.
    """

    def __init__(
        self,
        vectors: Tensor,
        *,
        core: str = "lstm",
        hidden_width: int = 16,
        item_prior: bool = True,
        negatives: Tensor | None = None,
        encoder: HistoryEncoder | None = None,
        task: Task | None = None,
        with_times: bool = False,
    ) -> None:
        super().__init__(
            vectors,
            task=task,
            item_prior=item_prior,
            negatives=negatives,
            encoder=encoder,
            with_times=with_times,
        )
        self.core = named(CORES, core)(self.input_width, hidden_width)
        self.residual = zero_linear(self.core.output_width + 2 * self.width, self.width)

    @classmethod
    def of(cls, ingredients: Ingredients) -> Self:
        plan = ingredients.plan
        return cls(
            ingredients.vectors,
            core=plan.core,
            hidden_width=plan.hidden_width,
            item_prior=plan.item_prior,
            encoder=ingredients.encoder,
            task=ingredients.task,
            with_times=plan.time_features,
        )

    def read(self, vectors: Tensor, batch: HistoryBatch) -> Reading:
        x = self.task.event_vectors(vectors, batch)  # [users, events, width]
        h = self.core(self.event_inputs(x, batch))  # [users, events, hidden]
        return Reading(self.residual(beside(h, mean_so_far(x, batch.mask), x)))
