"""Writes the files of a site's histories, a part at a time, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ARRAYS = {"offsets": "int64", "items": "int32", "times": "int64", "kinds": "int16", "values": "float32"}
ABOUT = "histories.json"


class HistoriesError(ValueError):
    """Arrays that are no histories, or a folder that holds none."""


class HistoriesWriter:
    """A new folder of .npy files that their owner alone may read; it has its name once `finish` was called.

    Attributes:
        partial: where the files are until then; gone when the writer is left, whatever happens.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.partial = self._folder.with_name(f".{self._folder.name}.{os.getpid()}.partial")
        self._files: dict[str, _ArrayFile] = {}
        self._events = 0

    def __enter__(self) -> HistoriesWriter:
        if self._folder.is_dir() and any(self._folder.iterdir()):
            raise HistoriesError(f"folder {self._folder} is not empty: delete it, or choose another")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(mode=0o700, parents=True)
        self._append("offsets", np.zeros(1, dtype=np.int64))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, users: npt.NDArray[np.str_], lengths: npt.NDArray[np.int64], **events: Any) -> None:
        """Adds users, and `lengths` events of each: items, times, kinds and values."""
        self._append("users", users)
        self._append("offsets", self._events + np.cumsum(lengths, dtype=np.int64))
        for name, array in events.items():
            self._append(name, array)
        self._events += int(lengths.sum())

    def finish(self, kind_names: Sequence[str]) -> None:
        """Completes the files, and gives the folder its name.

        Raises:
            HistoriesError: there is such a folder by now, and it is not empty.
        """
        for file in self._files.values():
            file.complete()
        with open(_private(self.partial / ABOUT), "wb") as about:
            about.write(json.dumps({"version": 1, "kind_names": kind_names}).encode())
            about.flush()
            os.fsync(about.fileno())
        try:
            self.partial.rename(self._folder)
        except FileExistsError as error:
            raise HistoriesError(f"folder {self._folder} exists: delete it, or choose another") from error
        except OSError as error:
            if self._folder.exists() and any(self._folder.iterdir()):
                raise HistoriesError(
                    f"folder {self._folder} is not empty: delete it, or choose another"
                ) from error
            raise

    def _append(self, name: str, array: npt.NDArray[Any]) -> None:
        if name not in self._files:
            self._files[name] = _ArrayFile(self.partial / f"{name}.npy", array.dtype)
        self._files[name].append(array)


class _ArrayFile:
    """A .npy file of one dimension that grows; its header says how long it is once it is complete."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file = open(_private(path), "wb", buffering=0)  # noqa: SIM115 - `complete` or `close` does
        self._dtype, self._length = dtype, 0
        self._write_header()

    def append(self, array: npt.NDArray[Any]) -> None:
        left = np.ascontiguousarray(array, dtype=self._dtype).view(np.uint8).data
        while left:
            left = left[self._file.write(left) :]
        self._length += len(array)

    def complete(self) -> None:
        self._file.seek(0)
        self._write_header()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        # numpy leaves room for the length to grow, so a header takes as much at the end as at the beginning.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
