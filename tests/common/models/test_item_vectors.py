"""Item vectors: unit norm, one sign on every machine, and odd catalogs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.models.item_vectors import item_vectors, project
from common.models.language_model import embed_texts
from tests.common.models.tiny_models import TEXTS, tiny_language_model


def pooled(items: int = 30, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(items, width, generator=torch.Generator().manual_seed(seed)) + 3.0


@pytest.mark.parametrize("width", [2, 8, 20])
def test_vectors_have_unit_norm_and_the_asked_width(width: int) -> None:
    made = project(pooled(), width)
    assert made.vectors.shape == (30, width)
    assert made.vectors.dtype == torch.float32
    torch.testing.assert_close(made.vectors.norm(dim=1), torch.ones(30), rtol=0, atol=1e-5)


def test_the_largest_entry_of_each_direction_is_positive_whichever_way_the_decomposition_turns() -> None:
    made = project(pooled(), 6)
    largest = made.projection.rotation.gather(0, made.projection.rotation.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    mirrored = project(2 * pooled().mean(dim=0) - pooled(), 6)  # -X has the same directions
    torch.testing.assert_close(mirrored.projection.rotation, made.projection.rotation, rtol=0, atol=1e-4)
    torch.testing.assert_close(mirrored.vectors, -made.vectors, rtol=0, atol=1e-4)


def test_vectors_are_half_whitened_components() -> None:
    x = pooled().double()
    u, spread, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    expected = torch.nn.functional.normalize(u[:, :5] * spread[:5].sqrt(), dim=-1)
    made = project(pooled(), 5).vectors.double()
    torch.testing.assert_close(made @ made.T, expected @ expected.T, rtol=0, atol=1e-5)  # up to signs


def test_other_texts_fall_where_the_same_text_of_the_catalog_lies() -> None:
    made = project(pooled(), 6)
    torch.testing.assert_close(made.projection(pooled()[4]), made.vectors[4])


def test_items_without_text_are_zero_and_move_no_other() -> None:
    x = pooled()
    x[[3, 7]] = 0
    made = project(x, 6)
    assert not made.vectors[[3, 7]].any()
    spoken = [row for row in range(30) if row not in (3, 7)]
    torch.testing.assert_close(made.vectors[spoken], project(x[spoken], 6).vectors)


def test_one_item_or_one_text_for_all_still_gives_unit_vectors() -> None:
    for x in (pooled(1), pooled(1).expand(5, -1)):
        made = project(x, 4)
        torch.testing.assert_close(made.vectors.norm(dim=1), torch.ones(len(x)))
        torch.testing.assert_close(made.vectors, made.vectors[:1].expand_as(made.vectors))


def test_two_items_lie_apart() -> None:
    made = project(pooled(2), 4)
    assert float(made.vectors[0] @ made.vectors[1]) == pytest.approx(-1, abs=1e-5)


def test_a_catalog_without_any_text_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="give the catalog a text column"):
        project(torch.zeros(3, 8), 4)
    with pytest.raises(ValueError, match="give the catalog a text column"):
        item_vectors(tiny_language_model("bert"), ["", "  "], 4)


def test_equal_texts_have_equal_vectors_and_empty_ones_none() -> None:
    texts = ["red sun", "", "blue moon", "red sun", "  ", "千と千尋の神隠し", "紅樓夢", "\n", *TEXTS]
    made = item_vectors(tiny_language_model("bert"), texts, 6)
    torch.testing.assert_close(made.vectors[0], made.vectors[3], rtol=0, atol=1e-5)
    for empty in (1, 4, 7):
        assert not made.vectors[empty].any()
    assert made.vectors.isfinite().all()
    assert float(made.vectors[5].norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama"])
def test_a_texts_vector_does_not_depend_on_its_neighbours_or_their_length(architecture: str) -> None:
    lm = tiny_language_model(architecture)
    texts = ["red sun", "blue moon star river hill tree stone fire rain", "fox"]
    together = embed_texts(lm, texts)
    for row, text in enumerate(texts):
        torch.testing.assert_close(embed_texts(lm, [text])[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_a_text_longer_than_the_models_positions_is_cut(architecture: str) -> None:
    lm = tiny_language_model(architecture, positions=12)
    long = " ".join(["red sun"] * 40)
    assert embed_texts(lm, [long]).isfinite().all()
    assert lm.most_tokens == (10 if architecture == "roberta" else 12)


def test_the_cache_gives_the_same_and_knows_texts_and_models_apart(tmp_path: Path) -> None:
    lm = tiny_language_model("bert")
    first = item_vectors(lm, TEXTS, 6, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    torch.testing.assert_close(item_vectors(lm, TEXTS, 6, cache=tmp_path).vectors, first.vectors)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    item_vectors(lm, TEXTS[1:], 6, cache=tmp_path)
    item_vectors(tiny_language_model("bert", seed=1), TEXTS, 6, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_catalog_read_part_by_part_gives_the_same_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_language_model("bert")
    texts = ["", *TEXTS, " ", "red sun"]
    whole = item_vectors(lm, texts, 6, cache=tmp_path / "whole")
    monkeypatch.setattr("common.models.item_vectors._ROWS_AT_ONCE", 4)
    parts = item_vectors(lm, texts, 6, cache=tmp_path / "parts")
    torch.testing.assert_close(parts.vectors, whole.vectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.projection(torch.ones(16)), whole.projection(torch.ones(16)))


def test_what_the_model_said_is_mapped_from_the_cache_and_never_written_to(tmp_path: Path) -> None:
    lm = tiny_language_model("bert")
    item_vectors(lm, TEXTS, 6, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    assert np.load(file, mmap_mode="r").shape == (len(TEXTS), 16)
    item_vectors(lm, TEXTS, 6, cache=tmp_path).vectors.zero_()
    assert file.read_bytes() == before


def test_rounding_between_texts_that_are_all_alike_is_no_direction() -> None:
    x = pooled(1).expand(40, -1) + 1e-7 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    made = project(x, 4)
    torch.testing.assert_close(made.vectors, made.vectors[:1].expand_as(made.vectors))
