"""A language model's folder gives the same model each time, or is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.models.item_vectors import item_vectors
from common.models.language_model import LanguageModelError, load_language_model
from tests.common.models.tiny_models import tiny_language_model as tiny_model
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


def test_any_file_of_the_folder_changes_the_digest_and_nothing_else_does(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "model")
    digest = load_language_model(folder).digest
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert load_language_model(copy).digest == digest
    for file in sorted(each for each in copy.iterdir() if each.name != "config.json"):
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert load_language_model(copy).digest != digest
        file.write_bytes(before)
    assert load_language_model(copy).digest == digest


def test_what_a_cache_holds_needs_no_weights_and_no_import_of_transformers(tmp_path: Path) -> None:
    folder, cache = tiny_language_model(tmp_path / "model"), tmp_path / "cache"
    texts = ["red river", "quiet song", "golden lamp"]
    first = item_vectors(load_language_model(folder), texts, 4, cache=cache).vectors
    program = f"""
import sys
from pathlib import Path
from common.models.item_vectors import item_vectors
from common.models.language_model import load_language_model
lm = load_language_model(Path({str(folder)!r}))
print(item_vectors(lm, {texts!r}, 4, cache=Path({str(cache)!r})).vectors.tolist())
assert "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout)), first)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "roberta"])
def test_the_width_is_the_same_by_whatever_name_the_config_has_it(tmp_path: Path, architecture: str) -> None:
    lm = tiny_model(architecture)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert load_language_model(tmp_path).width == lm.width == 16


def test_a_folder_that_lacks_weights_is_refused_and_not_filled_at_random(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lacking = "encoder.layer.1.output.dense.weight"
    del weights[lacking]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LanguageModelError, match=f"lacks 1 weights of its model, such as {lacking}"):
        assert load_language_model(folder).model
