"""Arrays kept by content: one file each, mapped and not read from there.

A file is numpy's format, and behind it a digest of the key and of all that lies before: a file that was cut off,
damaged, or belongs to another key is noticed, and made anew. It appears under its name at once and whole: processes
that make the same one side by side do not hurt each other, and whoever has mapped one that is replaced keeps the old.
Arrays that are functions of public things go to the machine's cache; what holds users' data is `private`, and goes to
the site's own folder alone.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_DIGEST_BYTES = 32
_READ_AT_ONCE = 1 << 22
_LEFT_OVER_AFTER = 86_400.0
"""Seconds after which an unfinished file's process is taken for dead."""


def cached_array(
    folder: Path,
    key: str,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    fill: Callable[[Array], None],
    *,
    private: bool = False,
) -> Array:
    """The array of a key, from the folder where it lies there whole; else `fill` writes it.

    Args:
        folder: made if it is not there.
        key: hexadecimal; says all that the numbers depend on.
        fill: writes an array of this shape and type in place.
        private: whether the folder and its files are for their owner alone.

    Returns:
        Mapped copy-on-write: what is changed in it never reaches the file.

    Raises:
        OSError: the folder cannot be written to, or has no room.
    """
    file = folder / f"{key[:32]}.npy"
    if not _is_whole(file, key, shape, dtype):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
        _remove_left_overs(folder)
        partial = folder / f"{file.name}.{secrets.token_hex(8)}.partial"
        try:
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
            made = np.lib.format.open_memmap(partial, mode="w+", dtype=np.dtype(dtype), shape=shape)
            with partial.open("rb+") as stream:  # a full disk is said here: a mapped page without room kills
                os.posix_fallocate(stream.fileno(), 0, partial.stat().st_size)
            fill(made)
            made.flush()
            del made
            digest = _digest(partial, key, partial.stat().st_size)
            with partial.open("ab") as stream:
                stream.write(digest)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    mapped: Array = np.load(file, mmap_mode="c", allow_pickle=False)
    return mapped


_seen_whole: dict[Path, tuple[str, int, int, int, int]] = {}
"""Files that this process has read through, with their keys and stamps then."""


def _is_whole(file: Path, key: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> bool:
    try:
        facts = file.stat()
        stamp = (key, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        if mapped.shape != shape or mapped.dtype != np.dtype(dtype):
            return False
        if _seen_whole.get(file) == stamp:
            return True
        size = facts.st_size - _DIGEST_BYTES
        with file.open("rb") as stream:
            stream.seek(size)
            whole = stream.read() == _digest(file, key, size)
        if whole:
            _seen_whole[file] = stamp
        return whole
    except (OSError, ValueError, EOFError):  # not there, or what numpy cannot read
        return False


def _digest(file: Path, key: str, size: int) -> bytes:
    """Of the key and the file's first bytes."""
    digest = hashlib.sha256(key.encode())
    with file.open("rb") as stream:
        while size > 0 and (part := stream.read(min(size, _READ_AT_ONCE))):
            digest.update(part)
            size -= len(part)
    return digest.digest()


def _remove_left_overs(folder: Path) -> None:
    for partial in folder.glob("*.partial"):
        try:
            if time.time() - partial.stat().st_mtime > _LEFT_OVER_AFTER:
                partial.unlink()
        except OSError:  # another process was faster
            continue
