"""Any Hugging Face encoder or decoder as a frozen reader of texts, and its layers as a list.

`AutoModel` and `AutoTokenizer` do the reading; a model is tried once (`reading_check.py`) before what it says is used.
Weights stay frozen; adapters are added by `lora.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.assets import DEFAULT_LANGUAGE_MODEL
from common.models.model_folder import (
    LanguageModelError,
    check_files,
    digest_of_files,
    read_config,
    unreadable,
)
from common.models.reading_check import check_reading, check_tokenizer, check_weights, reads_one_way
from common.models.text_reading import BY_THE_MEAN, TextReading, text_reading

TOKENS_OF_A_TEXT = 128
"""Of a text that becomes one vector; the model's own bound may be lower."""


@dataclass(frozen=True)
class LanguageModel:
    """A frozen language model with its tokenizer; both are read, and tried, when first asked for.

    Attributes:
        digest: sha256 of all that the reading of a text depends on, for caches.
        width: of a text's vector; of a token's state where `reading` pools in one way.
        load: reads the transformer without a task head, in eval mode for dropout, no trainable parameter, and the
            tokenizer.
        reading: how the model wants texts to be read and pooled.
    """

    digest: str
    width: int
    load: Callable[[], tuple[nn.Module, Any]]
    reading: TextReading = BY_THE_MEAN

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        return self.load()

    @property
    def model(self) -> nn.Module:
        """The transformer.

        Raises:
            LanguageModelError: it cannot be read, or not in the same way each time.
        """
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            LanguageModelError: as for `model`.
        """
        return self._loaded[1]

    @cached_property
    def causal(self) -> bool:
        """Whether tokens see only earlier tokens (a decoder); tried, as no configuration says it reliably."""
        return reads_one_way(self.model, self.tokenizer)

    @property
    def most_tokens(self) -> int:
        """The longest sequence that the model's positions allow."""
        return _most_tokens(self.model)


def _most_tokens(model: nn.Module) -> int:
    positions = int(getattr(model.config, "max_position_embeddings", None) or _POSITIONS)
    if positions < 0:  # XLNet's word for no bound
        positions = _POSITIONS
    # RoBERTa and its kin count positions from the padding id on, so their table is longer than a sequence.
    kept_back = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, nn.Embedding)
        and module.padding_idx is not None
    ]
    return positions - max(kept_back, default=0)


_POSITIONS = 512
"""Of models that do not say how many they have."""


def load_language_model(folder: Path) -> LanguageModel:
    """The model in `folder` (config, weights, tokenizer), from the disk alone.

    Its files are told apart by their bytes; transformers, which takes seconds to import, reads them when the model or
    the tokenizer is asked for, and not where a cache has what they said.

    Raises:
        LanguageModelError: no such folder, no config in it, or a kind of model that cannot be used. From `model` and
            `tokenizer` of what is returned: no weights or not all of them, a model that transformers cannot read, a
            tokenizer of another model, or states that hang on what else is read.
    """
    config = read_config(folder)
    reading = text_reading(folder)
    try:
        digest, files = digest_of_files(folder, reading.parts)
    except OSError as error:
        raise unreadable(folder, error) from error
    if not _DEFAULT_WEIGHTS.isdisjoint(files):
        # Fetched, the default model has no modules.json; with one, at another site, its vectors must be the same.
        reading = BY_THE_MEAN

    def load() -> tuple[nn.Module, Any]:
        return _read(folder, config)

    width = config.get("hidden_size")
    if not isinstance(width, int):  # some architectures have another name for it, which transformers knows
        read = load()
        width = _width(read[0])
        return LanguageModel(digest, width * len(reading.pooling), lambda: read, reading)
    return LanguageModel(digest, width * len(reading.pooling), load, reading)


_DEFAULT_WEIGHTS = frozenset(
    file.sha256 for file in DEFAULT_LANGUAGE_MODEL.files if file.name == "model.safetensors"
)


def _width(model: nn.Module) -> int:
    width = getattr(model.config, "hidden_size", None)
    if not isinstance(width, int):
        raise LanguageModelError(
            f"a model of type {model.config.model_type} has no one width of its states: "  # type: ignore[union-attr]
            "choose another, such as all-MiniLM-L6-v2"
        )
    return width


def _read(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, frozen and tried; any exception of theirs becomes one sentence."""
    try:
        check_files(folder, config)
        return _tried(*_loaded_by_transformers(folder))
    except LanguageModelError:
        raise
    except (
        Exception
    ) as error:  # safetensors, pickle, tokenizers, torch and each architecture have errors of their own
        raise unreadable(folder, error) from error


def _tried(model: nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    model, tokenizer = _frozen(model, tokenizer)
    check_weights(model)
    check_tokenizer(model, tokenizer)
    check_reading(model, tokenizer, min(TOKENS_OF_A_TEXT, _most_tokens(model)))
    return model, tokenizer


def _loaded_by_transformers(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model, loaded = AutoModel.from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are told of below, by name
    )
    differing = sorted(str(each[0]) for each in loaded["mismatched_keys"])
    if differing:
        raise LanguageModelError(
            f"{len(differing)} weights in {folder}, such as {differing[0]}, have another size than its config.json "
            "says: fetch both from one place"
        )
    lacking = sorted(name for name in loaded["missing_keys"] if not name.startswith(_UNREAD))
    if lacking:  # transformers would draw them at random, other ones at every site
        raise LanguageModelError(
            f"{folder} lacks {len(lacking)} weights of its model, such as {lacking[0]}: fetch it again"
        )
    return model, tokenizer


def _frozen(model: nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Every parameter frozen and every dropout off, whatever mode the model is put in later; a padding token."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _without_dropout(module)
    _without_dropout(model.config)
    model.eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise LanguageModelError(
            "the tokenizer has neither a padding, nor an end, nor an unknown token: name one in its "
            "tokenizer_config.json"
        )
    return model, tokenizer


def freeze(model: nn.Module, tokenizer: Any) -> LanguageModel:
    """A model in memory: its digest is over the weights that are read, the vocabulary, and how texts are cut.

    Raises:
        LanguageModelError: as for `LanguageModel.model`.
    """
    model, tokenizer = _tried(model, tokenizer)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(_UNREAD):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = {} if backend is None else json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # left by the last call
        cuts.pop(state, None)
    digest.update(json.dumps(cuts, sort_keys=True).encode())
    return LanguageModel(digest.hexdigest(), int(model.config.hidden_size), lambda: (model, tokenizer))  # type: ignore[union-attr, arg-type]


def _without_dropout(owner: object) -> None:
    """Sets the rates that an object keeps as plain numbers to zero: Llama and others call dropout by function."""
    for name, value in vars(owner).items():
        if "drop" in name and isinstance(value, float):
            setattr(owner, name, 0.0)


_UNREAD = "pooler."
"""A head that nothing here reads; checkpoints often lack it, and transformers then draws it at random."""


def transformer_layers(model: nn.Module) -> nn.ModuleList:
    """The list of the model's transformer layers, bottom first.

    Raises:
        LanguageModelError: the model has no single list of `num_hidden_layers` layers.
    """
    expected = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == expected]
    if len(found) != 1:
        raise LanguageModelError(
            f"a model of type {model.config.model_type} has {len(found)} lists of {expected} layers, "  # type: ignore[union-attr]
            "so its lower layers cannot be told from its upper ones; use frozen item vectors with it"
        )
    return found[0]


def texts_key(what: str, lm: LanguageModel, texts: list[str]) -> str:
    """For caches: a digest of what is kept, of the model, and of each text in its place."""
    key = hashlib.sha256(json.dumps([what, lm.digest]).encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    return key.hexdigest()


@torch.no_grad()
def embed_texts(
    lm: LanguageModel, texts: list[str], *, batch: int = 64, most_tokens: int = TOKENS_OF_A_TEXT
) -> Tensor:
    """Each text's vector: its tokens' states, pooled as the model wants it.

    Returns:
        [texts, width] float32; a row of zeros for an empty text.
    """
    device = next(lm.model.parameters()).device
    out = torch.zeros(len(texts), lm.width)
    left_out = lm.reading.left_out(lm.tokenizer)
    bounds = (most_tokens + left_out, lm.most_tokens, lm.reading.most_tokens)
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        tokens = lm.tokenizer(
            [lm.reading.text(texts[i]) for i in rows],
            padding=True,
            truncation=True,
            max_length=min(bound for bound in bounds if bound is not None),
            return_tensors="pt",
            padding_side="right",
        ).to(device)
        mask = tokens["attention_mask"]
        states = lm.model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state.float()
        mask[:, :left_out] = 0
        out[rows] = lm.reading.pool(states, mask).cpu()
    return out
