"""What every family of interest model can do. Training, evaluation and audit know models by this alone."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.models.batches import HistoryBatch
from common.models.lora import LoraLinear
from common.models.priors import Priors
from common.witness import WITNESS


class InterestModel(nn.Module, ABC):
    """`score = head(core(encoder(events)), encoder(candidate)) + priors`, for one row a user.

    `released` holds what released statistics add to each score: a public constant, the same in training (of
    whatever rank-giving loss) and in scoring. None: nothing. A family adds it in both.
    """

    released: Priors | None = None
    witness: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter(WITNESS, None)

    def set_witness(self, places: int) -> None:
        """Gives the model so many coordinates that no loss reads and no gradient reaches; 0 takes them away.

        They travel in every update and get its noise, and nothing else: see `common/witness.py`.
        """
        tensor = next(itertools.chain(self.buffers(), self.parameters()), None)
        device = None if tensor is None else tensor.device
        zeros = torch.zeros(places, device=device)
        self.witness = nn.Parameter(zeros, requires_grad=False) if places else None

    def set_released(self, priors: Priors | None) -> None:
        """Sets the priors from released statistics, on the model's own device."""
        if priors is not None:
            tensor = next(itertools.chain(self.buffers(), self.parameters()), None)
            priors = priors if tensor is None else priors.to(tensor.device)
        self.released = priors

    def prepare(self, batch: HistoryBatch) -> HistoryBatch:
        """Adds what frozen parts compute once for each history; row by row, no gradient."""
        return batch

    @abstractmethod
    def per_user_loss(self, batch: HistoryBatch) -> Tensor:
        """[users]: each user's loss, of that user's row and public tensors only."""

    @abstractmethod
    def scores(self, batch: HistoryBatch) -> Tensor:
        """[users, candidates]: how likely each item of the catalog is next, or liked (or each category, next).

        A user without events gets the priors.
        """

    @abstractmethod
    def last_states(self, batch: HistoryBatch) -> Tensor:
        """[users, width]: each user's state after the last event, in the space of item vectors; zeros without one."""

    @abstractmethod
    def interest(self, batch: HistoryBatch, items: Tensor) -> Tensor:
        """[users]: the probability that each user likes one item, for a model of the task `interest`.

        Args:
            items: [users] int64 rows of the catalog.

        Raises:
            ValueError: the model has another task.
        """

    def hold_adapters(self, held: bool) -> None:
        """Whether training leaves the language model's adapters as they are: they are then not in `trainable`."""
        for module in self.modules():
            if isinstance(module, LoraLinear):
                module.hold(held)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves and that an update carries, by name, in a fixed order.

        The witness is one of them, though it needs no gradient: noise alone moves it.
        """
        return {name: p for name, p in sorted(self.named_parameters()) if p.requires_grad or name == WITNESS}

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies of the trainable parameters, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.trainable().items()}

    @torch.no_grad()
    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Sets the trainable parameters.

        Raises:
            ValueError: a name, shape or dtype differs from the model's own.
        """
        own = self.trainable()
        if set(own) != set(state):
            odd = ", ".join(sorted(set(own) ^ set(state))[:4])
            raise ValueError(f"parameters do not fit the model: {odd} stand on one side only")
        for name, parameter in own.items():
            value = state[name]
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                raise ValueError(
                    f"parameter {name} has shape {tuple(value.shape)} and dtype {value.dtype}, "
                    f"but the model's has {tuple(parameter.shape)} and {parameter.dtype}"
                )
        for name, parameter in own.items():  # all, or none
            parameter.copy_(state[name])
