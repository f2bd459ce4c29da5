"""The cache of public arrays: kept by content, damage noticed, processes side by side unharmed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.models.array_cache import Array, cached_array
from common.models.history_encoder import HistoryEncoder, item_tokens
from common.models.item_vectors import item_vectors
from common.models.language_model import LanguageModel, freeze, texts_key
from tests.common.models.tiny_models import TEXTS, tiny_language_model, tiny_tokenizer

KEY, SHAPE = "ab" * 32, (300, 7)


def numbers(key: str = KEY) -> npt.NDArray[np.float32]:
    return np.random.default_rng(int(key[:8], 16)).standard_normal(SHAPE, dtype=np.float32)


class Filled:
    """Fills an array, and counts how often it had to."""

    def __init__(self, key: str = KEY) -> None:
        self.key, self.times = key, 0

    def __call__(self, array: Array) -> None:
        self.times += 1
        array[:] = numbers(self.key)


def kept(folder: Path, fill: Callable[[Array], None] | None = None, key: str = KEY) -> Array:
    return cached_array(folder, key, SHAPE, np.float32, fill or Filled(key))


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_an_array_is_made_once_for_each_key_and_mapped(tmp_path: Path) -> None:
    fill, other = Filled(), Filled("cd" * 32)
    for _ in range(3):
        assert np.array_equal(kept(tmp_path, fill), numbers())
        assert np.array_equal(kept(tmp_path, other, other.key), numbers(other.key))
    assert (fill.times, other.times) == (1, 1)
    assert isinstance(kept(tmp_path), np.memmap)
    kept(tmp_path)[:] = 0
    assert np.array_equal(kept(tmp_path), numbers())


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def foreign(data: bytes) -> bytes:
    """What lies under another key."""
    folder = Path(os.environ["FOREIGN"])
    kept(folder, key="cd" * 32)
    return the_file(folder).read_bytes()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:50],
    "cut in the numbers": lambda data: data[:2000],
    "cut by a byte": lambda data: data[:-1],
    "without the digest": lambda data: data[:-32],
    "longer": lambda data: data + b"\0",
    "zeros in the middle": lambda data: data[:4096] + bytes(1000) + data[5096:],
    "a bit of the header": flipped(20),
    "a bit of the numbers": flipped(3000),
    "a bit of the digest": flipped(-5),
    "foreign": foreign,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cut_or_foreign_file_is_noticed_and_made_anew(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREIGN", str(tmp_path / "foreign"))
    folder, fill = tmp_path / "cache", Filled()
    kept(folder, fill)
    right = the_file(folder).read_bytes()
    the_file(folder).write_bytes(damage(right))
    assert the_file(folder).read_bytes() != right
    assert np.array_equal(kept(folder, fill), numbers())
    assert fill.times == 2
    assert the_file(folder).read_bytes() == right


def test_without_the_look_at_the_digest_damage_would_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(tmp_path)
    the_file(tmp_path).write_bytes(flipped(3000)(the_file(tmp_path).read_bytes()))
    monkeypatch.setattr("common.models.array_cache._is_whole", lambda file, *_: file.is_file())
    assert not np.array_equal(kept(tmp_path), numbers())


def test_another_shape_or_type_under_the_same_key_is_made_anew(tmp_path: Path) -> None:
    kept(tmp_path)
    for shape, dtype in (((2100,), np.float32), (SHAPE, np.int32)):
        found = cached_array(tmp_path, KEY, shape, dtype, lambda array: array.fill(1))
        assert found.shape == shape
        assert found.dtype == dtype
        assert (found == 1).all()


def test_a_making_that_fails_leaves_nothing_and_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    def fail(array: Array) -> None:
        array[:100] = 1
        raise RuntimeError("the encoder stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        kept(tmp_path, fail)
    assert not list(tmp_path.iterdir())
    old, fresh = tmp_path / "a.npy.1.partial", tmp_path / "a.npy.2.partial"
    for partial in (old, fresh):
        partial.write_bytes(b"half")
    os.utime(old, (0, 0))
    kept(tmp_path)
    assert not old.exists()
    assert fresh.exists()  # its process may live


def test_who_has_mapped_a_file_keeps_its_numbers_when_it_is_replaced(tmp_path: Path) -> None:
    before = kept(tmp_path)
    cached_array(tmp_path, KEY, SHAPE, np.int32, lambda array: array.fill(1))
    assert np.array_equal(before, numbers())


def _side_by_side(folder: Path, barrier: Any, answers: Any) -> None:
    def slowly(array: Array) -> None:
        barrier.wait(timeout=60)  # both are inside, half done
        array[:150] = numbers()[:150]
        barrier.wait(timeout=60)
        array[150:] = numbers()[150:]

    answers.put(bool(np.array_equal(kept(folder, slowly), numbers())))


def test_two_processes_that_make_the_same_array_at_once_both_get_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_side_by_side, args=(tmp_path, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [True, True]
    for process in processes:
        process.join()
    assert the_file(tmp_path).suffix == ".npy"
    fill = Filled()
    assert np.array_equal(kept(tmp_path, fill), numbers())
    assert fill.times == 0


# What is kept: texts' tokens and states.


def never(*_: object, **__: object) -> None:
    raise AssertionError("texts were read again")


class Unread:
    """A tokenizer that may be asked how it cuts, but not to."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return 24

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_texts_are_cut_and_encoded_once_for_a_catalog_and_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_language_model("bert")
    first = item_vectors(lm, TEXTS, 6, cache=tmp_path)
    encoder = HistoryEncoder(lm, TEXTS, first.projection, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    unread = LanguageModel(lm.digest, lm.width, lambda: (lm.model, Unread(lm.tokenizer)))
    monkeypatch.setattr("common.models.item_vectors.embed_texts", never)
    again = item_vectors(LanguageModel(lm.digest, lm.width, never), TEXTS, 6, cache=tmp_path)
    assert torch.equal(again.vectors, first.vectors)
    tokens = HistoryEncoder(unread, TEXTS, again.projection, cache=tmp_path).item_tokens
    assert torch.equal(tokens, encoder.item_tokens)
    assert torch.equal(tokens, item_tokens(lm, TEXTS, 16))
    with pytest.raises(TypeError, match="not callable"):
        item_tokens(unread, TEXTS[1:], 16, tmp_path)  # another catalog


def test_an_empty_text_and_a_long_one_are_cut_the_same_with_a_cache_and_without(tmp_path: Path) -> None:
    lm = tiny_language_model("gpt2")
    texts = ["", " ".join(TEXTS), "  ", *TEXTS]
    for most in (3, 16):
        plain = item_tokens(lm, texts, most)
        assert plain.shape == (len(texts), most)
        for _ in range(2):
            assert torch.equal(item_tokens(lm, texts, most, tmp_path), plain)


def test_a_tokenizer_with_the_same_words_that_cuts_otherwise_has_a_key_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tokenizers.normalizers import Lowercase

    lm = tiny_language_model("bert")
    lowering = tiny_tokenizer()
    lowering.backend_tokenizer.normalizer = Lowercase()
    other = freeze(lm.model, lowering)
    texts = ["RED sun", "blue"]
    assert not torch.equal(item_tokens(lm, texts, 4), item_tokens(other, texts, 4))
    assert texts_key("tokens", lm, texts) != texts_key("tokens", other, texts)
    key = texts_key("tokens", lm, texts)
    lm.tokenizer(texts, truncation=True, max_length=2)  # the last call is no part of how it cuts
    assert texts_key("tokens", freeze(lm.model, lm.tokenizer), texts) == key
    for fields in (("states", lm, texts), ("tokens", lm, texts[::-1]), ("tokens", lm, [*texts, ""])):
        assert texts_key(*fields) != key
