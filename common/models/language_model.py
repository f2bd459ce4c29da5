"""Any Hugging Face encoder or decoder as a frozen reader of texts, and its layers as a list.

`AutoModel` and `AutoTokenizer` do the reading. Weights stay frozen; adapters are added by `lora.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class LanguageModelError(ValueError):
    """The language model cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class LanguageModel:
    """A frozen language model with its tokenizer; both are read when first asked for.

    Attributes:
        digest: sha256 of all that the reading of a text depends on, for caches.
        width: of a token's state.
        load: reads the transformer without a task head, in eval mode for dropout, no trainable parameter, and the
            tokenizer.
    """

    digest: str
    width: int
    load: Callable[[], tuple[nn.Module, Any]]

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        return self.load()

    @property
    def model(self) -> nn.Module:
        """The transformer.

        Raises:
            LanguageModelError: it cannot be read.
        """
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            LanguageModelError: it cannot be read.
        """
        return self._loaded[1]

    @property
    def causal(self) -> bool:
        """Whether tokens see only earlier tokens (a decoder)."""
        config: Any = self.model.config
        return bool(getattr(config, "is_decoder", False)) or config.model_type not in _TWO_WAY

    @property
    def most_tokens(self) -> int:
        """The longest sequence that the model's positions allow."""
        positions = int(getattr(self.model.config, "max_position_embeddings", 512) or 512)
        # RoBERTa and its kin count positions from the padding id on, so their table is longer than a sequence.
        kept_back = [
            module.padding_idx + 1
            for name, module in self.model.named_modules()
            if name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ]
        return positions - max(kept_back, default=0)


def load_language_model(folder: Path) -> LanguageModel:
    """The model in `folder` (config, weights, tokenizer), from the disk alone.

    Its files are told apart by their bytes; transformers, which takes seconds to import, reads them when the model or
    the tokenizer is asked for, and not where a cache has what they said.

    Raises:
        LanguageModelError: no such folder, or no config in it. From `model` and `tokenizer` of what is returned: no
            weights or not all of them, or a model that transformers cannot read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        digest = _digest_of_files(folder)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    width = config.get("hidden_size") if isinstance(config, dict) else None
    if not isinstance(width, int):  # some architectures have another name for it, which transformers knows
        model, tokenizer = _read(folder)
        return LanguageModel(digest, int(model.config.hidden_size), lambda: (model, tokenizer))  # type: ignore[union-attr, arg-type]
    return LanguageModel(digest, width, lambda: _read(folder))


def _digest_of_files(folder: Path) -> str:
    """Of the name and bytes of each file, and of the library that reads them."""
    digest = hashlib.sha256(f"transformers {version('transformers')}".encode())
    for file in sorted(folder.iterdir()):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(f"\n{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def _unreadable(folder: Path, error: Exception) -> LanguageModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return LanguageModelError(
        f"{folder} holds no language model that can be read ({reason}); "
        "it needs config.json, weights (*.safetensors) and the tokenizer's files"
    )


def _read(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, loaded = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error
    lacking = sorted(name for name in loaded["missing_keys"] if not name.startswith(_UNREAD))
    if lacking:  # transformers would draw them at random, other ones at every site
        raise LanguageModelError(
            f"{folder} lacks {len(lacking)} weights of its model, such as {lacking[0]}: fetch it again"
        )
    return _frozen(model, tokenizer)


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
        raise LanguageModelError("the tokenizer has neither a padding, nor an end, nor an unknown token")
    return model, tokenizer


def freeze(model: nn.Module, tokenizer: Any) -> LanguageModel:
    """A model in memory: its digest is over the weights that are read, the vocabulary, and how texts are cut."""
    model, tokenizer = _frozen(model, tokenizer)
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

_TWO_WAY = frozenset(
    [
        "bert",
        "roberta",
        "xlm-roberta",
        "distilbert",
        "mpnet",
        "electra",
        "albert",
        "deberta",
        "deberta-v2",
        "camembert",
        "modernbert",
        "nomic_bert",
    ]
)


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
def embed_texts(lm: LanguageModel, texts: list[str], *, batch: int = 64, most_tokens: int = 128) -> Tensor:
    """Mean-pooled states of each text's tokens.

    Returns:
        [texts, width] float32; a row of zeros for an empty text.
    """
    device = next(lm.model.parameters()).device
    out = torch.zeros(len(texts), lm.width)
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        tokens = lm.tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=min(most_tokens, lm.most_tokens),
            return_tensors="pt",
            padding_side="right",
        ).to(device)
        mask = tokens["attention_mask"]
        states = lm.model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state.float()
        weight = mask.unsqueeze(-1).to(states.dtype)
        out[rows] = ((states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)).cpu()
    return out
