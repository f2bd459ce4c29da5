"""What is tried with a language model once, before anything that it says is used.

A folder may hold a tokenizer of another model, weights that are no numbers, or an architecture that lets padding in:
each gives vectors, and none gives the same vectors at every site.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.models.model_folder import LanguageModelError

LEAST_SHARE = 0.2
"""A vocabulary that has less than this part of the embedding's rows is another model's (measured: models round their
rows up by 3 % at most; BERT's vocabulary has 12 % of XLM-RoBERTa's rows)."""

_ROOM = 1e-3
"""Part of the largest number by which rounding may move a state: float32 over many layers, with products of other
shapes, moves it by 1e-5; padding that is let in by 1e-1."""

_SHORT = 3


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Holds a tokenizer against the embedding of its model.

    Raises:
        LanguageModelError: the vocabulary is special tokens alone, far smaller than the embedding, or reaches beyond
            it.
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    words = len(set(vocabulary.values()) - special)
    rows = _rows(model)
    if not words:
        raise LanguageModelError(
            f"the tokenizer knows {len(vocabulary)} special tokens and no other: copy the model's own tokenizer "
            "(tokenizer.json, or vocab.txt, vocab.json or *.model) into its folder"
        )
    outside = {number for number in (*vocabulary.values(), *special) if number >= rows}
    if outside:
        raise LanguageModelError(
            f"the tokenizer counts tokens up to {max(outside)}, but the model has rows up to {rows - 1}: "
            "copy the model's own tokenizer into its folder"
        )
    if len(vocabulary) < LEAST_SHARE * rows:
        raise LanguageModelError(
            f"the tokenizer knows {len(vocabulary)} tokens, less than {LEAST_SHARE:.0%} of the model's {rows}: "
            "copy the model's own tokenizer into its folder"
        )


def check_weights(model: nn.Module) -> None:
    """Looks through all weights.

    Raises:
        LanguageModelError: one is infinite or no number.
    """
    for name, tensor in model.named_parameters():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise LanguageModelError(
                f"{bad} of {tensor.numel()} numbers of the model's weight {name} are infinite or no numbers: "
                "fetch the model again"
            )


@torch.no_grad()
def check_reading(model: nn.Module, tokenizer: Any, most_tokens: int) -> None:
    """Tries a short, a middling and the longest text: alone, together, and in another order.

    Args:
        most_tokens: of the longest text.

    Raises:
        LanguageModelError: the model gives no state for each token, or a text's states hang on what stands beside it.
    """
    kind = getattr(model.config, "model_type", "unknown")
    ids = _ordinary_tokens(model, tokenizer)
    lengths = sorted({min(length, most_tokens) for length in (_SHORT, 3 * _SHORT, most_tokens)})
    rows = [ids[torch.arange(length) * (row + 2) % len(ids)] for row, length in enumerate(lengths)]
    alone = [_states(model, [row], tokenizer.pad_token_id)[0] for row in rows]
    for state, row in zip(alone, rows, strict=True):
        expected = (len(row), getattr(model.config, "hidden_size", state.shape[-1]))
        if state.shape != expected:
            raise LanguageModelError(
                f"a model of type {kind} gives states of shape {tuple(state.shape)} for {len(row)} tokens, where "
                f"{expected} was expected: choose another, such as all-MiniLM-L6-v2"
            )
        if not state.isfinite().all():
            raise LanguageModelError(
                f"a model of type {kind} gives states that are infinite or no numbers for ordinary tokens: fetch it "
                "again, or choose another, such as all-MiniLM-L6-v2"
            )
    for order in (list(range(len(rows))), list(reversed(range(len(rows)))), list(range(len(rows) - 1))):
        if not order:
            continue
        together = _states(model, [rows[row] for row in order], tokenizer.pad_token_id)
        for place, which in enumerate(order):
            moved = float((together[place, : len(rows[which])] - alone[which]).abs().max())
            if moved > _ROOM * float(alone[which].abs().max()):
                raise LanguageModelError(
                    f"a model of type {kind} reads a text of {len(rows[which])} tokens otherwise beside one of "
                    f"{together.shape[1]} (states move by {moved:.2g}), so vectors would differ from site to site: "
                    "choose another, such as all-MiniLM-L6-v2"
                )


@torch.no_grad()
def reads_one_way(model: nn.Module, tokenizer: Any) -> bool:
    """Whether tokens see earlier tokens alone: found by changing the last one and looking at the others' states."""
    ids = _ordinary_tokens(model, tokenizer)
    first = ids[torch.arange(2 * _SHORT) % len(ids)]
    before = _states(model, [first], tokenizer.pad_token_id)[0, :-1]
    for other in ids.tolist():
        if other == int(first[-1]):
            continue
        second = first.clone()
        second[-1] = other
        after = _states(model, [second], tokenizer.pad_token_id)[0, :-1]
        if not torch.allclose(before, after, rtol=0, atol=1e-6 * float(before.abs().max())):
            return False
    return True


def _rows(model: nn.Module) -> int:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def _ordinary_tokens(model: nn.Module, tokenizer: Any) -> Tensor:
    """[tokens] int64: up to seven ids that no special token has, from all over the vocabulary."""
    special = set(tokenizer.all_special_ids)
    rows = _rows(model)
    ids = sorted(
        number for number in tokenizer.get_vocab().values() if number not in special and number < rows
    )
    ids = ids or list(range(rows))
    return torch.tensor(ids[:: max(1, len(ids) // 7)][:7])


def _states(model: nn.Module, rows: list[Tensor], padding: int) -> Tensor:
    """[texts, tokens, width] float32, on the CPU."""
    device = next(model.parameters()).device
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    states: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    return states.float().cpu()
