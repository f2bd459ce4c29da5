"""Reads a user's history as one token sequence and pools token states per event into event vectors.

Lower layers are frozen, so their states are computed once for each history (`lower`); the top layers carry
LoRA adapters (`forward`). Attention is causal over events: a token sees its own event and earlier ones, so one
pass a user gives a state after each event that knows nothing of the events to come.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.models.array_cache import Array, cached_array
from common.models.batches import HistoryBatch
from common.models.item_vectors import TextProjection
from common.models.language_model import LanguageModel, texts_key, transformer_layers
from common.models.lora import add_lora
from common.models.model_folder import LanguageModelError

_TEXTS_AT_ONCE = 16_384
_PADDING = 11
"""Tokens of padding behind the history that is tried."""


def item_tokens(lm: LanguageModel, texts: list[str], most: int, cache: Path | None = None) -> Tensor:
    """[items, tokens] int64: each text's first tokens, -1 behind them; an empty text is the padding token.

    Args:
        most: tokens of one text.
        cache: where they are kept, by content; None to cut the texts anew.
    """

    def fill(table: Array) -> None:
        table[:] = -1
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = [
                lm.reading.text(text) if text.strip() else lm.tokenizer.pad_token
                for text in texts[start : start + _TEXTS_AT_ONCE]
            ]
            cut = lm.tokenizer(part, add_special_tokens=False, truncation=True, max_length=most)["input_ids"]
            for row, ids in enumerate(cut, start):
                table[row, : len(ids)] = ids

    if cache is None:
        table: Array = np.empty((len(texts), most), dtype=np.int32)
        fill(table)
    else:
        table = cached_array(
            cache,
            texts_key(f"first {most} tokens, as {lm.reading}", lm, texts),
            (len(texts), most),
            np.int32,
            fill,
        )
    longest = max(1, int((table >= 0).sum(axis=1).max(initial=0)))
    return torch.from_numpy(table[:, :longest].astype(np.int64))


class HistoryEncoder(nn.Module):
    """See the module.

    Args:
        lm: the language model; it is copied, not changed.
        texts: the catalog's texts, by row.
        projection: from pooled token states to the space of item vectors; frozen.
        top_layers: how many layers carry adapters.
        rank: of the adapters.
        train_down: whether A is trained beside B.
        most_tokens: tokens of a history that are read; the most recent whole events that fit.
        tokens_per_item: an item's text is cut after these.
        seed: of A.
        precision: of frozen weights, and of what they compute; adapters, and what they compute, are float32.
        cache: where the texts' tokens are kept, by content; None to cut the texts anew.
    """

    item_tokens: Tensor
    mean: Tensor
    rotation: Tensor

    def __init__(
        self,
        lm: LanguageModel,
        texts: list[str],
        projection: TextProjection,
        *,
        top_layers: int = 2,
        rank: int = 8,
        train_down: bool = False,
        most_tokens: int = 256,
        tokens_per_item: int = 16,
        seed: int = 0,
        precision: torch.dtype = torch.float32,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        _check_pooling(lm)
        model = copy.deepcopy(lm.model).to(precision)
        layers = transformer_layers(model)
        if not 1 <= top_layers <= len(layers):
            raise LanguageModelError(
                f"lora_layers is {top_layers}, but the language model has {len(layers)} layers: "
                f"choose 1 to {len(layers)}"
            )
        generator = torch.Generator().manual_seed(seed)
        added = [
            add_lora(layer, rank=rank, train_down=train_down, generator=generator)
            for layer in list(layers)[len(layers) - top_layers :]
        ]
        if not all(added):
            raise LanguageModelError(
                f"a model of type {model.config.model_type} has no query and value projections that we know; "  # type: ignore[union-attr]
                "use frozen item vectors with it"
            )
        self.model = model
        self.precision = precision
        self.causal = lm.causal
        self.most_tokens = min(most_tokens, lm.most_tokens)
        self._top = top_layers
        self._digest = lm.digest
        self._unit_norm = lm.reading.unit_norm
        table = item_tokens(lm, texts, min(tokens_per_item, self.most_tokens), cache)
        self.register_buffer("item_tokens", table, persistent=False)
        self.register_buffer("mean", projection.mean, persistent=False)
        self.register_buffer("rotation", projection.rotation, persistent=False)
        self._check_reading(len(lm.tokenizer))

    def token_sequences(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and the event of each token, the most recent events that fit.

        Args:
            items: [users, events] int64, -1 where there is no event.

        Returns:
            [users, tokens] ids (0 for padding) and [users, tokens] events (-1 for padding), padded on the right.
        """
        events = items.shape[1]
        tokens = self.item_tokens[items.clamp(min=0)]  # [users, events, tokens per item]
        real = (tokens >= 0) & (items >= 0).unsqueeze(-1)
        counts = real.sum(dim=2)
        after = counts.flip(1).cumsum(dim=1).flip(1)  # tokens of this event and all later ones
        real = real & (after <= self.most_tokens).unsqueeze(-1)
        event = torch.arange(events, device=items.device).view(1, -1, 1).expand_as(tokens)
        flat_real = real.flatten(1)
        order = torch.argsort((~flat_real).to(torch.int8), dim=1, stable=True)[:, : self.most_tokens]
        kept = flat_real.gather(1, order)
        ids = tokens.flatten(1).gather(1, order).masked_fill(~kept, 0)
        of = event.flatten(1).gather(1, order).masked_fill(~kept, -1)
        return ids, of

    def _attention(self, token_events: Tensor) -> Tensor:
        """[users, 1, tokens, tokens] additive mask: own event and earlier ones (and, in a decoder, earlier tokens)."""
        tokens = token_events.shape[1]
        see = token_events.unsqueeze(1) <= token_events.unsqueeze(2)  # [users, query, key]
        see = see & (token_events >= 0).unsqueeze(1)
        if self.causal:
            see = see & torch.ones(tokens, tokens, dtype=torch.bool, device=see.device).tril()
        see = see | torch.eye(
            tokens, dtype=torch.bool, device=see.device
        )  # padding sees itself: no empty row
        nothing = torch.zeros(see.shape, dtype=self.precision, device=see.device)
        return nothing.masked_fill(~see, torch.finfo(self.precision).min).unsqueeze(1)

    @torch.no_grad()
    def lower(self, batch: HistoryBatch) -> HistoryBatch:
        """Adds the frozen lower layers' states of each history."""
        ids, token_events = self.token_sequences(batch.items)
        if len(batch) == 0:
            states = torch.zeros(*ids.shape, self.rotation.shape[0], device=ids.device)
            return replace(batch, token_states=states, token_events=token_events)
        return replace(batch, token_states=self._below(ids, token_events), token_events=token_events)

    def lower_shape(self, items: Tensor) -> tuple[int, int, int]:
        """[users, tokens, encoder width]: the shape of the lower layers' states of such histories."""
        users, events = items.shape
        tokens = min(events * self.item_tokens.shape[1], self.most_tokens)
        return users, tokens, self.rotation.shape[0]

    def lower_key(self, items: Tensor) -> str:
        """For caches: a digest of all that the lower layers' states of these histories depend on."""
        how = (self._digest, self._top, self.most_tokens, self.precision, items.shape, self.item_tokens.shape)
        key = hashlib.sha256(repr(how).encode())
        for tensor in (self.item_tokens, items):
            key.update(tensor.cpu().contiguous().numpy().tobytes())
        return key.hexdigest()

    def _below(self, ids: Tensor, token_events: Tensor) -> Tensor:
        """[users, tokens, encoder width]: what enters the first top layer."""
        kept: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(args[0] if args else kwargs["hidden_states"])
            raise _LowerLayersDoneError

        first_top = transformer_layers(self.model)[-self._top]
        handle = first_top.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._whole(ids, token_events)
        except _LowerLayersDoneError:
            pass
        finally:
            handle.remove()
        return kept[0].detach().float()

    def _above(self, states: Tensor, token_events: Tensor) -> Tensor:
        """[users, tokens, encoder width]: the model's last states, from what enters the first top layer."""
        with _only_top_layers(self.model, self._top, states.to(self.precision)):
            # Which ids stand here does not matter: `states` takes the place of what becomes of them.
            return self._whole(torch.zeros_like(token_events), token_events)

    def _whole(self, ids: Tensor, token_events: Tensor) -> Tensor:
        states: Tensor = self.model(
            input_ids=ids, attention_mask=self._attention(token_events), use_cache=False
        ).last_hidden_state
        return states.float()

    @torch.no_grad()
    def _check_reading(self, vocabulary: int) -> None:
        """Tries the model on made-up tokens: an architecture with masks or layers of its own kind is refused.

        Raises:
            LanguageModelError: it fails, lets an event see a later one, gives other states from its top layers
                than as a whole, hangs on padding or on other rows, or is random.
        """
        kind = self.model.config.model_type  # type: ignore[union-attr]
        token_events = torch.tensor([[0, 0, 1, 1, 2, -1]])
        first = torch.tensor([[3, 4, 5, 6, 7, 0]]) % vocabulary
        second = torch.tensor([[3, 4, 5, 6, 8, 0]]) % vocabulary
        padding = torch.full((1, max(0, min(_PADDING, self.most_tokens - 6))), -1)
        wide = torch.cat([first, torch.zeros_like(padding)], dim=1)
        wide_events = torch.cat([token_events, padding], dim=1)
        other = torch.arange(wide.shape[1]).unsqueeze(0) % vocabulary
        training = self.model.training
        self.model.train()
        try:
            whole, again = self._whole(first, token_events), self._whole(first, token_events)
            later = self._whole(second, token_events)
            beside = self._whole(torch.cat([other, wide]), torch.cat([torch.zeros_like(other), wide_events]))[
                1:
            ]
            parts = self._above(self._below(first, token_events), token_events)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise LanguageModelError(
                f"a model of type {kind} cannot read a history event by event ({type(error).__name__}); "
                "use frozen item vectors with it"
            ) from error
        finally:
            self.model.train(training)
        room = 1e-4 * float(whole.abs().max())
        # Products of other shapes round otherwise, in bfloat16 so that it shows.
        rounding = room * max(1.0, 1e5 * torch.finfo(self.precision).eps)
        for holds, otherwise in (
            (torch.allclose(whole, again, atol=room), "reads the same history differently each time"),
            (torch.allclose(whole[:, :4], later[:, :4], atol=room), "lets an event see later ones"),
            (
                torch.allclose(whole[:, :5], beside[:, :5], atol=rounding),
                "reads a history otherwise beside a longer one",
            ),
            (torch.allclose(whole[:, :5], parts[:, :5], atol=room), "cannot be cut between its layers"),
        ):
            if not holds:
                raise LanguageModelError(
                    f"a model of type {kind} {otherwise}; use frozen item vectors with it"
                )

    def forward(self, batch: HistoryBatch) -> Tensor:
        """Event vectors [users, events, width]; zeros for events that did not fit into `most_tokens`."""
        if batch.token_states is None or batch.token_events is None:
            batch = self.lower(batch)
        states, token_events = batch.token_states, batch.token_events
        assert states is not None
        assert token_events is not None
        top = self._above(states, token_events)  # [users, tokens, encoder width]
        users, events = batch.items.shape
        slot = torch.where(token_events >= 0, token_events, events)  # padding goes to a slot of its own
        pooled = top.new_zeros(users, events + 1, top.shape[-1])
        pooled = pooled.scatter_add(1, slot.unsqueeze(-1).expand_as(top), top)[:, :events]
        counts = top.new_zeros(users, events + 1).scatter_add(
            1, slot, torch.ones_like(slot, dtype=top.dtype)
        )[:, :events]
        read = (counts > 0).unsqueeze(-1)
        pooled = pooled / counts.clamp(min=1).unsqueeze(-1)
        if self._unit_norm:
            pooled = nn.functional.normalize(pooled, dim=-1)
        vectors: Tensor = nn.functional.normalize((pooled - self.mean) @ self.rotation, dim=-1)
        vectors = vectors * read
        return vectors


def _check_pooling(lm: LanguageModel) -> None:
    """Refuses what has no meaning for the tokens of one event among others."""
    own = lm.reading
    way = f"the pooling {' and '.join(own.pooling)}" if own.pooling != ("mean",) else ""
    way = way or (f"the prompt {own.prompt!r}" if own.prompt else "")
    if way:
        raise LanguageModelError(
            f"the language model's folder asks for {way}, and a history is read event by event with the mean and "
            "without a prompt: use frozen item vectors with it (model.mode=vectors)"
        )


class _LowerLayersDoneError(Exception):
    """Ends a forward pass before the first top layer."""


@contextmanager
def _only_top_layers(model: nn.Module, top: int, states: Tensor) -> Iterator[None]:
    """The model's own forward, with lower layers passed over and `states` fed to the first top layer.

    Masks, rotary positions and final norms are thus computed by the model's own code, for any architecture.
    """
    layers = transformer_layers(model)
    lower = list(layers)[: len(layers) - top]
    for layer in lower:
        layer.forward = _pass_over

    def feed(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    handle = layers[-top].register_forward_pre_hook(feed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for layer in lower:
            del layer.forward  # the class's own again


def _pass_over(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
