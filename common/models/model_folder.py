"""What a language model's folder tells before anything of it is loaded: faults that many folders have, in words.

Whatever is not known here is caught where the folder is loaded (`language_model.py`).
"""

from __future__ import annotations

import hashlib
import json
import struct
from importlib.metadata import version
from pathlib import Path
from typing import Any


class LanguageModelError(ValueError):
    """The language model cannot be used; the message says why and what to do."""


_POINTER = b"version https://git-lfs"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json", "*.model", "*.vocab")
_OTHER_SENSES = ("vision_config", "audio_config", "vision_tower", "image_size", "patch_size", "num_mel_bins")
_PLAIN_NUMBERS = frozenset({"F64", "F32", "F16", "BF16"})
_LARGEST_HEADER = 100_000_000
"""Bytes: safetensors' own bound."""


def unreadable(folder: Path, error: BaseException) -> LanguageModelError:
    """One sentence for any exception of loading."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    return LanguageModelError(
        f"{folder} holds no language model that can be read ({reason}); "
        "it needs config.json, weights (*.safetensors) and the tokenizer's files"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        LanguageModelError: it is not there, or says that the model is of a kind that cannot be used.
    """
    _no_pointers(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json holds no object")
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from error
    kind = config.get("model_type", "without a name")
    if "quantization_config" in config or "compression_config" in config:
        said = config.get("quantization_config") or config.get("compression_config")
        method = said.get("quant_method", "unnamed") if isinstance(said, dict) else "unnamed"
        raise _quantised(folder, f"method {method}")
    if (folder / "quantize_config.json").exists() or (folder / "quant_config.json").exists():
        raise _quantised(folder, "it has a quantize_config.json or quant_config.json")
    if config.get("is_encoder_decoder"):
        raise LanguageModelError(
            f"{folder} is an encoder-decoder (type {kind}), which reads a text beside a second one only: "
            "choose an encoder or a decoder, such as all-MiniLM-L6-v2"
        )
    senses = [name for name in _OTHER_SENSES if config.get(name)]
    if senses:
        raise LanguageModelError(
            f"{folder} reads images or sound (type {kind}, {senses[0]} in its config.json), and a catalog has texts: "
            "choose a model of texts alone, such as all-MiniLM-L6-v2"
        )
    return config


def check_files(folder: Path, config: dict[str, Any]) -> None:
    """What can be told of weights and tokenizer without transformers.

    Raises:
        LanguageModelError: weights are of another kind, cut off or quantised; there is no tokenizer.
    """
    if not any(file.is_file() for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise LanguageModelError(
            f"{folder} has no file of a tokenizer (tokenizer.json, vocab.txt, vocab.json or *.model): "
            "copy it from where the model came from"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("pytorch_model*.bin")):
        others = sorted({file.suffix for file in folder.rglob("*") if file.suffix in _OTHER_WEIGHTS})
        held = f", only {' and '.join(others)}" if others else ""
        raise LanguageModelError(
            f"{folder} holds no language model that can be read (no weights{held}): put its model.safetensors there"
        )
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _check_parts(folder, index)
    for file in weights:
        _check_tensors(file, quantised=lambda reason: _quantised(folder, reason))
    _check_code(folder, config)


_OTHER_WEIGHTS = frozenset(
    [".onnx", ".h5", ".msgpack", ".gguf", ".ot", ".pt", ".pth", ".ckpt", ".tflite", ".xml"]
)


def digest_of_files(folder: Path, parts: tuple[str, ...]) -> tuple[str, frozenset[str]]:
    """Of the name and bytes of each file of the folder and of `parts` of it, and of the library that reads them.

    Returns:
        The digest, and the sha256 of each file.
    """
    digest = hashlib.sha256(f"transformers {version('transformers')}".encode())
    found = set()
    for place in (folder, *(folder / part for part in parts)):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.is_file():
                with file.open("rb") as stream:
                    of_file = hashlib.file_digest(stream, "sha256").hexdigest()
                digest.update(f"\n{file.relative_to(folder).as_posix()} {of_file}".encode())
                found.add(of_file)
    return digest.hexdigest(), frozenset(found)


def _quantised(folder: Path, how: str) -> LanguageModelError:
    return LanguageModelError(
        f"the weights in {folder} are quantised ({how}), and only float32, float16 and bfloat16 are read: "
        "take the model that it was made from"
    )


def _no_pointers(folder: Path) -> None:
    for file in sorted([*folder.glob("*"), *folder.glob("[0-9]*/*")]):
        if file.is_file() and file.stat().st_size < 1024:
            with file.open("rb") as stream:
                if stream.read(len(_POINTER)) == _POINTER:
                    raise LanguageModelError(
                        f"{file} is a pointer of Git LFS and not the file itself: run `git lfs pull` in the clone, "
                        "or fetch the file"
                    )


def _check_parts(folder: Path, index: Path) -> None:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(folder, error) from error
    lacking = [name for name in names if not (folder / str(name)).is_file()]
    if lacking:
        raise LanguageModelError(
            f"{folder} lacks {len(lacking)} of the {len(names)} files of its weights, such as {lacking[0]}: "
            "fetch it again"
        )


def _check_tensors(file: Path, quantised: Any) -> None:
    """Reads a safetensors file's header (8 bytes of length, JSON, numbers)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 1
        if length > _LARGEST_HEADER:
            raise LanguageModelError(f"{file} is no safetensors file: fetch it again")
        header = stream.read(length)
    if len(header) < length:
        raise LanguageModelError(f"{file} is cut off within its header, after {size} bytes: fetch it again")
    try:
        tensors = {name: of for name, of in json.loads(header).items() if name != "__metadata__"}
        whole = 8 + length + max((of["data_offsets"][1] for of in tensors.values()), default=0)
        odd = [
            (name, of["dtype"])
            for name, of in sorted(tensors.items())
            if name.endswith("weight") and of["dtype"] not in _PLAIN_NUMBERS
        ]
    except (ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
        raise LanguageModelError(
            f"{file} is no safetensors file ({type(error).__name__}): fetch it again"
        ) from error
    if size != whole:
        how = "cut off" if size < whole else "too long"
        raise LanguageModelError(f"{file} is {how}: {size} bytes of {whole}; fetch it again")
    if odd:
        raise quantised(f"{odd[0][0]} is of type {odd[0][1]}")


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if "auto_map" in config and kind not in CONFIG_MAPPING:
        raise LanguageModelError(
            f"{folder} needs code of its own (auto_map in its config.json, type {kind}), and code of a model is never "
            "run: choose a model that transformers knows, such as all-MiniLM-L6-v2"
        )
