"""Parts: the files of a log or catalog, in folders and Hive partitions, and the format that their names say."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from urllib.parse import unquote

from common.events.layout import Asked, Format, format_names
from common.events.schema import LogError

SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".inter": "recbole",
    ".item": "recbole",
    ".user": "recbole",
    ".dat": "movielens",
    ".data": "movielens",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""Endings that say how a file is packed, after the one that says its format."""

_ELSEWHERE = {
    ".xlsx": "export the sheet as CSV",
    ".xls": "export the sheet as CSV",
    ".ods": "export the sheet as CSV",
    ".tar": "unpack it, and give the folder or the file in it",
    ".tgz": "unpack it, and give the folder or the file in it",
    ".7z": "unpack it, and give the folder or the file in it",
    ".rar": "unpack it, and give the folder or the file in it",
    ".lz4": "unpack it, and give the file in it",
    ".br": "unpack it, and give the file in it",
    ".snappy": "unpack it, and give the file in it",
    ".arrow": "write it as Parquet",
    ".feather": "write it as Parquet",
    ".ipc": "write it as Parquet",
    ".orc": "write it as Parquet",
    ".avro": "write it as Parquet",
    ".pkl": "write it as Parquet",
    ".pickle": "write it as Parquet",
    ".npy": "write it as Parquet",
    ".npz": "write it as Parquet",
    ".h5": "write it as Parquet",
    ".hdf5": "write it as Parquet",
    ".mat": "write it as Parquet",
    ".sqlite": "export the table as CSV",
    ".db": "export the table as CSV",
}
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a table.

    Attributes:
        path: of the file.
        shown: its name in messages, from the folder that was given.
        keys: what the names of its folders say of all of its rows: column -> value ("date=2017-07-15").
    """

    path: Path
    shown: str
    keys: Mapping[str, str | None]


def find_parts(path: Path, format: str, asked: Asked, otherwise: str | None = None) -> tuple[list[Part], str]:
    """The files of a table, in the order of their names, and their one format.

    Of a folder, all files in it and in its folders; names that begin with "." or "_" are passed over, and so are
    empty files beside others that are not.

    Args:
        otherwise: the format where a name says none.

    Raises:
        LogError: there is none, they are empty, of several formats, or of one that is not read.
    """
    if format not in get_args(Format):
        raise LogError(f"{asked.option('format')} {format!r} is unknown: choose {format_names()}")
    if not path.exists():
        raise LogError(f"{path} does not exist: check the path")
    parts = [Part(path, path.name, {})]
    if path.is_dir():
        parts = [_part_of(path, file) for file in _files_under(path)]
        if not parts:
            raise LogError(f"folder {path} holds no files: give a {asked.noun} file, or a folder of parts")
    full = [part for part in parts if part.path.stat().st_size > 0]
    if not full:
        raise LogError(f"{parts[0].path} is empty: give a file with rows")
    if format == "auto":
        formats = {format_of(part.path, asked, otherwise) for part in full}
        if len(formats) > 1:
            raise LogError(f"folder {path} mixes formats ({', '.join(sorted(formats))}): name one file of it")
        format = formats.pop()
    return full, format


def _files_under(folder: Path) -> Iterator[Path]:
    met: set[str] = set()

    def fault(error: OSError) -> None:
        raise LogError(f"folder {error.filename} cannot be opened: {error.strerror}") from error

    for here, folders, files in os.walk(folder, onerror=fault, followlinks=True):
        real = os.path.realpath(here)
        if real in met:  # a link back to where the walk has been
            folders.clear()
            continue
        met.add(real)
        if "_delta_log" in folders or any(name.endswith(".metadata.json") for name in files):
            raise LogError(
                f"folder {here} is of a table with versions (Delta or Iceberg), whose files hold deleted rows too: "
                "export the version that is meant as Parquet"
            )
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(files):
            if not name.startswith((".", "_")) and (Path(here) / name).is_file():
                yield Path(here) / name


def _part_of(folder: Path, file: Path) -> Part:
    relative = file.relative_to(folder)
    keys: dict[str, str | None] = {}
    for name in relative.parts[:-1]:
        key, equals, value = name.partition("=")
        if equals and key:
            keys[unquote(key)] = None if value == _NULL_PARTITION else unquote(value)
    return Part(file, str(relative), keys)


def format_of(path: Path, asked: Asked, otherwise: str | None = None) -> str:
    """The format that a file's name says; of a `.zip`, its member's name.

    Raises:
        LogError: the name says none, or one that is not read.
    """
    name = path.name.lower()
    inner = next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)
    suffix = Path(inner).suffix
    if name.endswith(".zip") and suffix not in SUFFIXES:
        inner = Path(only_member(path)).name.lower()
        suffix = Path(inner).suffix
    if inner in ("ratings.csv", "u.item"):
        return "movielens"
    way_out = _ELSEWHERE.get(suffix, _ELSEWHERE.get(Path(name).suffix))
    if way_out is not None:
        raise LogError(f"{path} ends in {suffix}, which is not read: {way_out}")
    if suffix not in SUFFIXES:
        if otherwise is not None:
            return otherwise
        raise LogError(
            f"{path} has no known format by its name: say which with {asked.option('format')}, {format_names()}"
        )
    return SUFFIXES[suffix]


def only_member(path: Path) -> str:
    """The name of the one file in a `.zip`.

    Raises:
        LogError: it holds none or several, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [
                each.filename
                for each in archive.infolist()
                if not each.is_dir()
                and not each.filename.startswith("__MACOSX/")
                and not Path(each.filename).name.startswith((".", "_"))
            ]
    except (zipfile.BadZipFile, OSError) as error:
        raise LogError(f"{path} is cut off or damaged: fetch or write it again") from error
    if len(members) != 1:
        listed = ", ".join(members[:10]) + (", ..." if len(members) > 10 else "")
        raise LogError(
            f"{path} holds {len(members)} files ({listed}), and one is read: unpack it, and give the one that is meant"
            if members
            else f"{path} holds no file: give one that does"
        )
    return members[0]
