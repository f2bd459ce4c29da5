"""A model's own pooling, prompt and bounds are followed as its folder says, or refused by name."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.assets import DEFAULT_LANGUAGE_MODEL
from common.models.history_encoder import HistoryEncoder
from common.models.item_vectors import item_vectors
from common.models.language_model import LanguageModel, LanguageModelError, embed_texts, load_language_model
from tests.common.models.folders import said, saved
from tests.common.models.tiny_models import TEXTS

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
NORMALISE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
TEXT = "red sun blue"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("reading") / "plain")


def folder_of(plain: Path, to: Path, pooling: dict[str, Any] | None = None, *more: dict[str, Any]) -> Path:
    """A folder with modules.json, a pooling (None: no such file), and more modules."""
    shutil.copytree(plain, to)
    said(to, "modules.json", lambda _: [*MODULES, *more])
    if pooling is not None:
        said(to, "1_Pooling/config.json", {"word_embedding_dimension": 16, **pooling})
    return to


def states_of(lm: LanguageModel, text: str) -> Tensor:
    """[tokens, width] of a text alone."""
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    return lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


def by_hand(way: str, states: Tensor) -> Tensor:
    places = torch.arange(1.0, len(states) + 1).unsqueeze(1)
    return {
        "cls": states[0],
        "max": states.max(dim=0).values,
        "mean": states.mean(dim=0),
        "mean_sqrt_len": states.sum(dim=0) / len(states) ** 0.5,
        "weightedmean": (states * places).sum(dim=0) / places.sum(),
        "lasttoken": states[-1],
    }[way]


@pytest.mark.parametrize("way", POOLINGS)
def test_each_pooling_is_followed_beside_longer_texts(plain: Path, tmp_path: Path, way: str) -> None:
    off = dict.fromkeys(POOLINGS.values(), False)
    lm = load_language_model(folder_of(plain, tmp_path / "m", {**off, POOLINGS[way]: True}))
    found = embed_texts(lm, [TEXT, "river hill tree stone fire rain", ""])
    torch.testing.assert_close(found[0], by_hand(way, states_of(lm, TEXT)), rtol=0, atol=1e-4)
    assert not found[2].any()


@pytest.mark.parametrize("way", ["mean", "cls", "lasttoken", "max", "weightedmean"])
def test_the_newer_spelling_of_a_pooling_is_read(plain: Path, tmp_path: Path, way: str) -> None:
    lm = load_language_model(folder_of(plain, tmp_path / "m", {"pooling_mode": way}))
    assert lm.reading.pooling == (way,)


def test_several_poolings_stand_side_by_side(plain: Path, tmp_path: Path) -> None:
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    lm = load_language_model(folder_of(plain, tmp_path / "m", both))
    assert lm.width == 32
    states = states_of(lm, TEXT)
    expected = torch.cat([by_hand("cls", states), by_hand("mean", states)])
    torch.testing.assert_close(embed_texts(lm, [TEXT])[0], expected, rtol=0, atol=1e-4)
    assert item_vectors(lm, TEXTS, 4).vectors.shape == (len(TEXTS), 4)


def test_normalisation_is_followed_in_both_modes(plain: Path, tmp_path: Path) -> None:
    lm = load_language_model(folder_of(plain, tmp_path / "m", {"pooling_mode_mean_tokens": True}, NORMALISE))
    torch.testing.assert_close(embed_texts(lm, TEXTS).norm(dim=1), torch.ones(len(TEXTS)))
    projection = item_vectors(lm, TEXTS, 4).projection
    assert HistoryEncoder(lm, TEXTS, projection, top_layers=1)._unit_norm


@pytest.mark.parametrize("counts", [True, False])
def test_the_default_prompt_is_put_before_each_text_and_pooled_or_not(
    plain: Path, tmp_path: Path, counts: bool
) -> None:
    folder = folder_of(plain, tmp_path / "m", {"pooling_mode_mean_tokens": True, "include_prompt": counts})
    prompts = {"query": "moon ", "passage": "star hill "}
    said(folder, "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "passage"})
    lm = load_language_model(folder)
    states = states_of(lm, f"star hill {TEXT}")
    expected = states.mean(dim=0) if counts else states[2:].mean(dim=0)
    found = embed_texts(lm, [TEXT, "river hill tree stone fire rain"])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_prompts_without_a_default_are_left_alone(plain: Path, tmp_path: Path) -> None:
    folder = folder_of(plain, tmp_path / "m", {"pooling_mode_mean_tokens": True})
    said(
        folder,
        "config_sentence_transformers.json",
        {"prompts": {"query": "moon "}, "default_prompt_name": None},
    )
    assert torch.equal(
        embed_texts(load_language_model(folder), TEXTS), embed_texts(load_language_model(plain), TEXTS)
    )


def test_the_models_own_bound_of_tokens_and_lower_case_are_followed(plain: Path, tmp_path: Path) -> None:
    folder = folder_of(plain, tmp_path / "m", {"pooling_mode_mean_tokens": True})
    said(folder, "sentence_bert_config.json", {"max_seq_length": 2, "do_lower_case": True})
    lm = load_language_model(folder)
    torch.testing.assert_close(embed_texts(lm, ["RED Sun blue"]), embed_texts(lm, ["red sun"]))


def test_a_pooling_beside_a_folder_without_modules_is_followed(plain: Path, tmp_path: Path) -> None:
    folder = folder_of(plain, tmp_path / "m", {"pooling_mode_cls_token": True})
    (folder / "modules.json").unlink()
    assert load_language_model(folder).reading.pooling == ("cls",)


REFUSED: dict[str, tuple[Any, str]] = {
    "dense": (
        [*MODULES, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
        "the module Dense",
    ),
    "words": ([{"path": "0_Words", "type": "s.models.WordEmbeddings"}], "WordEmbeddings as its first module"),
    "images": ([{"path": "0_CLIP", "type": "s.models.CLIPModel"}], "CLIPModel as its first module"),
    "below": ([{"path": "0_Transformer", "type": "s.models.Transformer"}], "Transformer as its first module"),
    "sparse": ([MODULES[0], {"path": "1_Splade", "type": "s.SpladePooling"}], "the module SpladePooling"),
    "router": ([{"path": "", "type": "s.models.Router"}], "Router as its first module"),
    "twice": ([*MODULES, NORMALISE, {"path": "3_LayerNorm", "type": "s.LayerNorm"}], "the module LayerNorm"),
    "outside": ([MODULES[0], {**MODULES[1], "path": "../other"}], r"a pooling in '\.\./other'"),
    "nothing": ([], "nothing as its first module"),
    "no-list": ({"a": 1}, "holds no language model that can be read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_modules_that_cannot_be_followed_are_refused_by_name(plain: Path, tmp_path: Path, what: str) -> None:
    modules, expected = REFUSED[what]
    folder = folder_of(plain, tmp_path / "m", {"pooling_mode_mean_tokens": True})
    said(folder, "modules.json", lambda _: modules)
    with pytest.raises(LanguageModelError, match=expected):
        load_language_model(folder)


def test_a_pooling_that_is_not_there_not_known_or_damaged_is_refused(plain: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any] | None, str]] = [
        (None, r"1_Pooling/config\.json is not there: fetch it again, with its sub-folders"),
        ({}, "asks for the pooling none"),
        ({"pooling_mode": "attention"}, "asks for the pooling attention"),
        ({"pooling_mode_median_tokens": True}, "asks for the pooling pooling_mode_median_tokens"),
    ]
    for number, (pooling, expected) in enumerate(cases):
        with pytest.raises(LanguageModelError, match=expected):
            load_language_model(folder_of(plain, tmp_path / str(number), pooling))
    damaged = folder_of(plain, tmp_path / "damaged", {})
    (damaged / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(LanguageModelError, match=r"config\.json cannot be read \(JSONDecodeError\)"):
        load_language_model(damaged)
    prompt = folder_of(plain, tmp_path / "prompt", {"pooling_mode_mean_tokens": True})
    said(prompt, "config_sentence_transformers.json", {"default_prompt_name": "query", "prompts": {}})
    with pytest.raises(LanguageModelError, match="has no prompt 'query'"):
        load_language_model(prompt)


@pytest.mark.parametrize("what", ["cls", "prompt"])
def test_mode_lora_refuses_what_has_no_meaning_for_one_event_among_others(
    plain: Path, tmp_path: Path, what: str
) -> None:
    folder = folder_of(plain, tmp_path / "m", {POOLINGS["cls" if what == "cls" else "mean"]: True})
    if what == "prompt":
        said(
            folder,
            "config_sentence_transformers.json",
            {"default_prompt_name": "a", "prompts": {"a": "red "}},
        )
    lm = load_language_model(folder)
    projection = item_vectors(lm, TEXTS, 4).projection
    with pytest.raises(
        LanguageModelError, match=r"asks for the (pooling cls|prompt 'red ').*model\.mode=vectors"
    ):
        HistoryEncoder(lm, TEXTS, projection, top_layers=1)


def test_the_digest_covers_each_file_that_says_how_to_read(plain: Path, tmp_path: Path) -> None:
    folder = folder_of(plain, tmp_path / "m", {"pooling_mode_mean_tokens": True})
    digests = [load_language_model(folder).digest]
    said(folder, "1_Pooling/config.json", {"include_prompt": False})
    digests.append(load_language_model(folder).digest)
    said(folder, "sentence_bert_config.json", {"max_seq_length": 64})
    digests.append(load_language_model(folder).digest)
    said(folder, "config_sentence_transformers.json", {"default_prompt_name": None})
    digests.append(load_language_model(folder).digest)
    assert len(set(digests)) == 4
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert load_language_model(copied).digest == digests[-1]


def test_the_default_model_is_read_alike_with_and_without_its_modules(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched, it has no modules.json; in a site's own folder it may have: the vectors must be those of the server."""
    import hashlib

    folder = folder_of(plain, tmp_path / "m", {"pooling_mode_mean_tokens": True}, NORMALISE)
    assert load_language_model(folder).reading.unit_norm
    of_weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert any(file.name == "model.safetensors" for file in DEFAULT_LANGUAGE_MODEL.files)
    monkeypatch.setattr("common.models.language_model._DEFAULT_WEIGHTS", frozenset([of_weights]))
    with_modules, without = load_language_model(folder), load_language_model(plain)
    assert with_modules.reading == without.reading
    assert torch.equal(embed_texts(with_modules, TEXTS), embed_texts(without, TEXTS))
    assert copy.deepcopy(without.reading) == without.reading
