"""Language models' folders as people have them: tiny random models of many kinds, saved, and then spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.common.models.tiny_models import tiny_tokenizer

_SMALL: dict[str, Any] = {
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 160,
}
_OF_KIND: dict[str, dict[str, Any]] = {
    "roformer": {"embedding_size": 16},
    "rembert": {"input_embedding_size": 16},
    "convbert": {"embedding_size": 16, "head_ratio": 1},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 160},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 160},
    "bloom": {"n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "mamba": {"state_size": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {
        **{"attn_layers": ["local"], "axial_pos_shape": [10, 16], "axial_pos_embds_dim": [8, 8]},
        **{"attention_head_size": 8, "feed_forward_size": 32},
    },
}
_OWN: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 32},
    "mt5": {"d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 32},
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 1},
    "whisper": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    | {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 1},
    "clip": {
        "text_config": {**_SMALL, "vocab_size": 24},
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
        }
        | {"intermediate_size": 32, "patch_size": 16},
    },
    "vit": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    | {"image_size": 32, "patch_size": 16},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
}


@cache
def random_model(kind: str) -> Any:
    """A random model of a kind, sixteen wide, for the words of `tiny_models`: do not change it."""
    from transformers import AutoConfig, AutoModel

    words = {"vocab_size": len(tiny_tokenizer())}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = _OWN.get(kind, {**_SMALL, **_OF_KIND.get(kind, {})})
        model = AutoModel.from_config(AutoConfig.for_model(kind, **{**words, **fields}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3)
    return model


def saved(folder: Path, kind: str = "bert") -> Path:
    """The folder of such a model, with its tokenizer."""
    random_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def said(folder: Path, name: str, change: Callable[[Any], Any] | dict[str, Any]) -> None:
    """Writes a JSON file of the folder: what `change` makes of what it says, or a dictionary's entries added."""
    file = folder / name
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    after = {**before, **change} if isinstance(change, dict) else change(before)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(after), encoding="utf-8")
