"""How a model wants a text to be read and its tokens' states made into one vector, as its own folder says.

The folder of a sentence-transformers model says it in modules.json, 1_Pooling/config.json, sentence_bert_config.json
and config_sentence_transformers.json; any other is read by the mean of its tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.models.model_folder import LanguageModelError, unreadable

_ORDER = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")
"""Of several, side by side, as sentence-transformers has them."""

_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class TextReading:
    """From a text to what the model reads, and from its tokens' states to the text's vector.

    Attributes:
        pooling: ways of pooling; the vectors of several stand side by side.
        prompt: put before each text.
        prompt_counts: whether the prompt's tokens are pooled too.
        unit_norm: whether a vector is scaled to norm 1.
        most_tokens: of a text; None for no bound of the model's own.
        lower_case: whether texts are put into lower case.
        parts: sub-folders that say this.
    """

    pooling: tuple[str, ...] = ("mean",)
    prompt: str = ""
    prompt_counts: bool = True
    unit_norm: bool = False
    most_tokens: int | None = None
    lower_case: bool = False
    parts: tuple[str, ...] = ()

    def text(self, text: str) -> str:
        """What is read of a text."""
        return self.prompt + (text.lower() if self.lower_case else text)

    def left_out(self, tokenizer: Any) -> int:
        """How many tokens at a text's start, the prompt's, are not pooled."""
        if not self.prompt or self.prompt_counts:
            return 0
        ids = tokenizer(self.prompt)["input_ids"]
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
        return len(ids) - (1 if ids and ids[-1] in ends else 0)

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """One vector a text.

        Args:
            states: [texts, tokens, width] float32, padded on the right.
            mask: [texts, tokens], 1 for tokens that are pooled.

        Returns:
            [texts, width times ways of pooling].
        """
        pooled = torch.cat([_pooled(way, states, mask) for way in self.pooling], dim=-1)
        return normalize(pooled, dim=-1) if self.unit_norm else pooled


BY_THE_MEAN = TextReading()
"""Of a model that says nothing."""


def _pooled(way: str, states: Tensor, mask: Tensor) -> Tensor:
    """[texts, tokens, width] -> [texts, width]."""
    weight = mask.to(states.dtype)  # [texts, tokens]
    rows = torch.arange(len(states), device=states.device)
    if way == "cls":
        return states[rows, mask.argmax(dim=1)]
    if way == "lasttoken":
        places = torch.arange(mask.shape[1], device=states.device)
        return states[rows, (places * mask).argmax(dim=1)]
    if way == "max":
        return states.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(states.dtype).min).amax(dim=1)
    if way == "weightedmean":
        weight = weight * torch.arange(1, mask.shape[1] + 1, device=states.device)
    summed = (states * weight.unsqueeze(-1)).sum(dim=1)
    count = weight.sum(dim=1, keepdim=True).clamp(min=1)
    return summed / (count.sqrt() if way == "mean_sqrt_len" else count)


def text_reading(folder: Path) -> TextReading:
    """What a model's folder says of how it is read.

    Raises:
        LanguageModelError: it asks for what cannot be followed; the message names it.
    """
    modules = _json(folder, "modules.json")
    place = "1_Pooling" if (folder / "1_Pooling" / "config.json").is_file() else None
    unit_norm = False
    if modules is not None:
        place, unit_norm = _modules(folder, modules)
    elif place is None:
        return BY_THE_MEAN
    pooling: tuple[str, ...] = ("mean",)
    counts = True
    if place is not None:
        said = _json(folder, f"{place}/config.json")
        if not isinstance(said, dict):
            raise LanguageModelError(
                f"{folder} names its own pooling, but {place}/config.json is not there: fetch it again, with its "
                "sub-folders"
            )
        pooling, counts = _pooling(folder, place, said), said.get("include_prompt") is not False
    limits = _object(folder, "sentence_bert_config.json")
    most = limits.get("max_seq_length")
    return TextReading(
        pooling=pooling,
        prompt=_prompt(folder),
        prompt_counts=counts,
        unit_norm=unit_norm,
        most_tokens=most if isinstance(most, int) and most > 0 else None,
        lower_case=limits.get("do_lower_case") is True,
        parts=() if place is None else (place,),
    )


def _modules(folder: Path, modules: Any) -> tuple[str | None, bool]:
    """The sub-folder of the pooling, if any, and whether vectors are scaled to norm 1."""
    try:
        listed = [(str(each["type"]).rsplit(".", 1)[-1], str(each.get("path", ""))) for each in modules]
    except (TypeError, KeyError, AttributeError) as error:
        raise unreadable(folder, error) from error
    kinds = [kind for kind, _ in listed]
    if kinds[:1] != ["Transformer"] or listed[0][1] not in ("", "."):
        raise _not_followed(folder, f"{kinds[0] if kinds else 'nothing'} as its first module")
    place = None
    if kinds[1:2] == ["Pooling"]:
        place = listed[1][1]
        inside = (folder / place).resolve().is_relative_to(folder.resolve())
        if not place or not inside:
            raise _not_followed(folder, f"a pooling in {place!r}")
    rest = kinds[1 if place is None else 2 :]
    for kind in rest:
        if kind != "Normalize":
            raise _not_followed(folder, f"the module {kind}")
    return place, bool(rest)


def _not_followed(folder: Path, what: str) -> LanguageModelError:
    return LanguageModelError(
        f"{folder / 'modules.json'} asks for {what}, which is not followed: choose a model of Transformer, Pooling "
        "and Normalize, such as all-MiniLM-L6-v2"
    )


def _pooling(folder: Path, place: str, said: dict[str, Any]) -> tuple[str, ...]:
    named = said.get("pooling_mode")
    if named is not None:
        asked = {named} if isinstance(named, str) else set(named)
        ways = {"mean_sqrt_len" if way == "mean_sqrt_len_tokens" else str(way) for way in asked}
    else:
        unknown = [k for k, on in said.items() if k.startswith("pooling_mode_") and on and k not in _KEYS]
        ways = {way for key, way in _KEYS.items() if said.get(key) is True} | set(unknown)
    odd = sorted(ways - set(_ORDER))
    if odd or not ways:
        raise LanguageModelError(
            f"{folder / place / 'config.json'} asks for the pooling {odd[0] if odd else 'none'}, which is not "
            f"followed: choose a model with one of {', '.join(_ORDER)}"
        )
    return tuple(way for way in _ORDER if way in ways)


def _prompt(folder: Path) -> str:
    said = _object(folder, "config_sentence_transformers.json")
    name, prompts = said.get("default_prompt_name"), said.get("prompts")
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise LanguageModelError(
            f"{folder / 'config_sentence_transformers.json'} has no prompt {name!r}, its default_prompt_name: "
            "fetch it again"
        )
    return str(prompts[name])


def _object(folder: Path, name: str) -> dict[str, Any]:
    said = _json(folder, name)
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise LanguageModelError(f"{folder / name} holds no object: fetch it again")
    return said


def _json(folder: Path, name: str) -> Any:
    """What a JSON file says; None where there is none."""
    file = folder / name
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LanguageModelError(f"{file} cannot be read ({type(error).__name__}): fetch it again") from error
