"""A language model's folder gives the same model each time, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.models.item_vectors import item_vectors
from common.models.language_model import LanguageModelError, load_language_model
from tests.tiny import tiny_language_model


def test_a_checkpoint_without_a_pooler_has_one_digest_and_one_file_in_the_cache(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "model")  # saved without one; transformers draws it at each load
    first, second = load_language_model(folder), load_language_model(folder)
    drawn = [dict(lm.model.state_dict())["pooler.dense.weight"] for lm in (first, second)]
    assert not torch.equal(*drawn)
    assert first.digest == second.digest
    texts = ["red river", "quiet song", "golden lamp"]
    vectors = [item_vectors(lm, texts, 4, cache=tmp_path / "cache").vectors for lm in (first, second)]
    assert torch.equal(*vectors)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_any_weight_that_is_read_changes_the_digest(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "model")
    digest = load_language_model(folder).digest
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_language_model(folder).digest != digest


def test_a_folder_that_lacks_weights_is_refused_and_not_filled_at_random(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lacking = "encoder.layer.1.output.dense.weight"
    del weights[lacking]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LanguageModelError, match=f"lacks 1 weights of its model, such as {lacking}"):
        load_language_model(folder)
