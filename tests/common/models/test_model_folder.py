"""Folders of language models as people have them: read, or refused in one sentence with cause and way out."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.models.language_model import LanguageModelError, embed_texts, load_language_model
from tests.common.models.folders import said, saved
from tests.common.models.tiny_models import TEXTS, tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n"


def refusal(folder: Path) -> str:
    """The one sentence with which the folder is refused."""
    with pytest.raises(LanguageModelError) as caught:
        embed_texts(load_language_model(folder), TEXTS)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def spoil_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


WORD_WEIGHT = "embeddings.word_embeddings.weight"


def numbers(value: float) -> Callable[[Path], None]:
    return spoil_weights(lambda weights: weights[WORD_WEIGHT][9].__setitem__(3, value))


def cut(share: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return spoil


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: said(folder, "config.json", fields)


def quantised(method: str, **more: Any) -> Callable[[Path], None]:
    return config(quantization_config={"quant_method": method, **more})


def instead_of_weights(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"other weights")

    return spoil


def whole_numbers(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    return spoil_weights(lambda weights: weights.update({name: weights[WORD_WEIGHT].to(dtype)}))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def special_tokens_alone(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]",
    ).save_pretrained(folder)  # fmt: skip


def more_tokens(count: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([f"new{number}" for number in range(count)])
        tokenizer.save_pretrained(folder)

    return spoil


def padding_outside(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(folder)


def wide_embedding(folder: Path) -> None:
    said(folder, "config.json", {"vocab_size": 400})
    spoil_weights(lambda weights: weights.update({WORD_WEIGHT: torch.randn(400, 16)}))(folder)


def lacking_part(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {WORD_WEIGHT: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    torch.save({"a": Path("anything but weights")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    # pointers of Git LFS
    "pointer-weights": (written("model.safetensors", POINTER), r"pointer of Git LFS .* `git lfs pull`"),
    "pointer-tokenizer": (written("tokenizer.json", POINTER), r"tokenizer\.json is a pointer of Git LFS"),
    "pointer-config": (written("config.json", POINTER), r"config\.json is a pointer of Git LFS"),
    "pointer-bin": (written("pytorch_model.bin", POINTER), "pointer of Git LFS"),
    # cut off or damaged
    "cut-half": (cut(0.5), r"is cut off: \d+ bytes of \d+; fetch it again"),
    "cut-last": (cut(0.999), "is cut off"),
    "cut-header": (cut(0.01), "is cut off within its header"),
    "empty": (written("model.safetensors", b""), "is cut off within its header"),
    "a-page": (written("model.safetensors", b"<!DOCTYPE html><html>not found</html>"), "no safetensors file"),
    "no-header": (written("model.safetensors", struct.pack("<Q", 4) + b"oops"), "no safetensors file"),
    "too-long": (lambda f: (f / "model.safetensors").open("ab").write(b"more") and None, "is too long"),
    "lacking-part": (lacking_part, "lacks 1 of the 1 files of its weights"),
    "damaged-tokenizer": (written("tokenizer.json", '{"version": "1.0", "model": '), "that can be read"),
    "damaged-config": (written("config.json", '{"model_type": '), r"can be read \(JSONDecodeError"),
    "list-config": (written("config.json", "[]"), "config.json holds no object"),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "it needs config.json"),
    "pickle": (pickled, "holds no language model that can be read"),
    # weights of other kinds
    "onnx": (instead_of_weights("model.onnx"), r"no weights, only \.onnx\): put its model\.safetensors there"),
    "onnx-folder": (instead_of_weights("onnx/model.onnx"), r"only \.onnx"),
    "tensorflow": (instead_of_weights("tf_model.h5"), r"only \.h5"),
    "flax": (instead_of_weights("flax_model.msgpack"), r"only \.msgpack"),
    "gguf": (instead_of_weights("model.Q4_K_M.gguf"), r"only \.gguf"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), r"\(no weights\)"),
    # quantised
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), "quantised .method bitsandbytes"),
    "gptq": (quantised("gptq", bits=4), "quantised .method gptq"),
    "awq": (quantised("awq", bits=4), "quantised .method awq"),
    "fp8": (quantised("fp8"), "quantised .method fp8"),
    "compressed": (quantised("compressed-tensors"), "method compressed-tensors"),
    "mxfp4": (quantised("mxfp4"), "method mxfp4"),
    "unnamed": (config(quantization_config={"bits": 8}), "method unnamed"),
    "old-gptq": (written("quantize_config.json", "{}"), r"it has a quantize_config\.json"),
    "int8": (whole_numbers(WORD_WEIGHT, torch.int8), f"{WORD_WEIGHT} is of type I8"),
    "float8": (whole_numbers(WORD_WEIGHT, torch.float8_e4m3fn), f"{WORD_WEIGHT} is of type F8_E4M3"),
    "packed": (whole_numbers("encoder.layer.0.qweight", torch.int32), "qweight is of type I32"),
    # sizes
    "more-words": (config(vocab_size=100), f"weights in .*, such as {WORD_WEIGHT}, have another size"),
    "wider": (config(hidden_size=32), "have another size than its config.json says"),
    "more-positions": (config(max_position_embeddings=512), "position_embeddings.weight, have another size"),
    "more-layers": (config(num_hidden_layers=4), r"lacks \d+ weights of its model"),
    "odd-heads": (config(num_attention_heads=3), r"can be read \(ValueError"),
    # numbers
    "nan": (numbers(float("nan")), f"1 of 384 numbers of the model's weight {WORD_WEIGHT}"),
    "infinite": (numbers(float("inf")), "infinite or no numbers: fetch the model again"),
    "overflow": (spoil_weights(lambda w: w[WORD_WEIGHT].fill_(3e38)), "states that are infinite or no numbers"),
    # kinds and code
    "unknown-kind": (config(model_type="nobody-knows"), "holds no language model that can be read"),
    "own-code": (
        config(model_type="nobody-knows", auto_map={"AutoModel": "modeling.Own"}),
        r"code of its own \(auto_map in its config\.json, type nobody-knows\)",
    ),
    "no-kind": (lambda f: (f / "config.json").write_text('{"hidden_size": 16}') and None, r"can be read \(ValueError"),
    # tokenizers
    "no-tokenizer": (without_tokenizer, "has no file of a tokenizer"),
    "settings-alone": (lambda folder: (folder / "tokenizer.json").unlink(), "has no file of a tokenizer"),
    "special-alone": (special_tokens_alone, "knows 3 special tokens and no other"),
    "one-more-token": (more_tokens(1), "counts tokens up to 24, but the model has rows up to 23"),
    "many-more-tokens": (more_tokens(60), "counts tokens up to 83, but the model has rows up to 23"),
    "padding-outside": (padding_outside, "counts tokens up to 24, but the model has rows up to 23"),
    "far-smaller": (wide_embedding, r"knows 24 tokens, less than 20% of the model's 400"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("folders") / "whole")


def test_the_folder_is_read_before_it_is_spoilt(whole: Path) -> None:
    assert embed_texts(load_language_model(whole), TEXTS).isfinite().all()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_a_fault_is_refused_in_one_sentence(whole: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    spoil, expected = FAULTS[fault]
    spoil(folder)
    message = refusal(folder)
    with pytest.raises(LanguageModelError, match=expected):
        raise LanguageModelError(message)


@pytest.mark.parametrize("kind", ["t5", "mt5", "bart", "whisper"])
def test_a_kind_that_needs_decoder_inputs_is_refused(tmp_path: Path, kind: str) -> None:
    assert f"is an encoder-decoder (type {kind})" in refusal(saved(tmp_path / "model", kind))


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_kind_that_needs_images_is_refused(tmp_path: Path, kind: str) -> None:
    assert f"reads images or sound (type {kind}" in refusal(saved(tmp_path / "model", kind))


def test_any_exception_of_the_first_reading_is_one_sentence_with_its_type(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertModel

    for error in (
        ImportError("no such package\nmore"),
        IndexError("index out of range"),
        TypeError(),
        OverflowError("x"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(BertModel, "forward", fail)
        assert type(error).__name__ in refusal(whole)


def test_a_model_without_a_bound_of_positions_is_read(tmp_path: Path) -> None:
    lm = load_language_model(saved(tmp_path / "model", "xlnet"))
    assert lm.width == 16
    assert lm.most_tokens == 512
    assert embed_texts(lm, TEXTS).isfinite().all()


def test_half_precision_is_no_quantisation(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: w.half() for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    assert embed_texts(load_language_model(tmp_path / "model"), TEXTS).isfinite().all()


def test_the_command_says_the_sentence_and_ends_with_a_code(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.cli import main
    from tests.tiny import own_cache, tiny_files

    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    cut(0.5)(folder)
    log, catalog = tiny_files(tmp_path / "data")
    with own_cache(tmp_path / "cache"), pytest.raises(SystemExit) as end:
        main(
            [
                *("simulate", "--log", str(log), "--catalog", str(catalog), "--encoder", str(folder)),
                *("--runs", str(tmp_path / "runs"), "--engine", "inline", "--n-sites", "2", "--offline"),
                *("--users-per-site", "15", "--rounds", "1", "--steps", "2"),
            ]
        )
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert "Traceback" not in errors
    assert "model.safetensors is cut off" in errors.splitlines()[-1]
