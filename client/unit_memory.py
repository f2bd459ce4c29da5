"""What one unit of rows takes in memory while a step computes it: of a plan and a site's `[performance]` alone.

A step computes whole units, whoever was drawn (`common.models.batches.HistoryBatch.unit`), so this is a function of
public constants and follows no user. It is for refusing plans, so it must not be too low: it is one and a half to three
times what was measured (`tests/client/test_unit_memory.py` measures again). Histories, the catalog, the model and the
libraries are not in it: a site holds them whatever the plan.
"""

from __future__ import annotations

from client.policy import Performance
from common.config import Plan
from common.model_plan import ModelPlan

_NUMBER = 4
"""Bytes of a float32."""
_LARGEST_MODEL = 1_000_000
"""Trainable coordinates: above, the noise vouches for no model."""
_TOKENS_PER_ITEM = 16
_ENCODER_WIDTH, _ENCODER_LAYERS, _ENCODER_HEADS = 384, 6, 12
"""Of the default language model. With a larger one the owner of the site lowers `micro_batch` or `most_tokens`."""


def unit_memory(plan: Plan, performance: Performance, *, items: int = 0, categories: int = 0) -> int:
    """Bytes that a step of private fine-tuning needs for one unit, or metrics for one; 0 where there is neither.

    Args:
        items, categories: of the catalog; 0 where it is not known yet: then what grows with them is left out.
    """
    model = plan.model
    if not plan.training.rounds and not plan.metrics.share:
        return 0
    candidates = {"next-item": items, "next-category": categories}.get(model.task, 0)
    ranked = candidates if model.task != "next-item" or model.negatives is None else model.negatives
    if items and model.task == "next-item":
        ranked = min(ranked, items)
    if not plan.training.rounds:  # metrics rank after the last event alone
        ranked = 0
    lifts = (plan.statistics.top_items or 0) if plan.statistics.transition_share else 0
    events = model.max_events + 4  # rounded up to whole tiles
    numbers = 30 * events * model.width + 7 * events * (ranked + lifts) + 12 * candidates + 4 * 32 * events
    members = model.members if model.family == "ensemble" else (model.family,)
    numbers += sum(_of_family(each, model, events) for each in members)
    if model.mode == "lora":
        tokens = min(model.most_tokens, _TOKENS_PER_ITEM * events)
        numbers += model.lora_layers * _of_layer(tokens)
    if performance.engine == "opacus":  # holds each user's gradient
        numbers += 8 * min(_LARGEST_MODEL, _coordinates(model, members) + candidates)
    return _NUMBER * performance.micro_batch * numbers


def _of_family(family: str, model: ModelPlan, events: int) -> int:
    if family in ("dual", "classifier"):
        return 20 * events * model.width
    core = _of_core(model, events)
    if family == "lstm-vae":
        return 2 * core + 20 * events * (model.latent_width + model.width)
    if family == "lstm-lm":
        return core + _ENCODER_LAYERS * _of_layer(events)
    return core


def _of_core(model: ModelPlan, events: int) -> int:
    if model.core == "decay":  # a kernel over all pairs of events, for each of `hidden_width`
        return 16 * model.hidden_width * events**2
    pairs = 32 * events**2 if model.core == "attention" else 0
    return 60 * events * model.hidden_width + pairs


def _of_layer(tokens: int) -> int:
    """Of a transformer's layer that is trained through."""
    return 32 * tokens * _ENCODER_WIDTH + 2 * _ENCODER_HEADS * tokens**2


def _coordinates(model: ModelPlan, members: tuple[str, ...]) -> int:
    """No fewer than the model trains, but for the candidates' prior."""
    width, hidden = model.width, model.hidden_width
    inputs = max(width, hidden) + model.latent_width + 16
    a_core = hidden * inputs + 8 * hidden**2 if model.core == "attention" else 4 * hidden * (inputs + hidden)
    if model.core == "decay":
        a_core = 2 * hidden
    of_state = max(width, hidden) * (2 * model.latent_width + width) + hidden * _ENCODER_WIDTH
    adapters = 4 * model.lora_layers * model.lora_rank * _ENCODER_WIDTH if model.mode == "lora" else 0
    cores = sum(2 if family == "lstm-vae" else 1 for family in members)
    return cores * (a_core + of_state + 3 * width**2) + adapters
