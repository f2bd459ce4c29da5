"""A copy of a folder whose owner is at work: its files, and its databases as SQLite itself copies them while in use.

Which order makes a copy right is the business of whoever knows what the files say of one another: `server/backup.py`
and `client/backup.py`.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

_SECONDS = 60.0


class BackupError(RuntimeError):
    """A copy cannot be made, or is not right; nothing is left of it, and the message says what to do."""


@contextmanager
def new_copy(folder: Path, target: Path) -> Iterator[Path]:
    """A private folder to copy into, which gets the target's name at the end: whole, on the disk, or not there.

    Raises:
        BackupError: the target exists, lies within the folder, or cannot be written.
    """
    folder, target = folder.resolve(), target.expanduser().absolute()
    if target.exists() or target.is_symlink():
        raise BackupError(f"{target} is there already: name a new folder for the copy")
    if folder == target.resolve() or folder in target.resolve().parents:
        raise BackupError(f"{target} lies within {folder}: put the copy elsewhere, best on another disk")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)
        yield partial
        os.sync()
        partial.rename(target)
    except (OSError, sqlite3.Error) as error:
        shutil.rmtree(partial, ignore_errors=True)
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = (
            "free space there, and begin again"
            if full
            else "nothing was left there; mend that, and begin again"
        )
        raise BackupError(f"the copy of {folder} to {target} failed ({said}): {way_out}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_files(source: Path, target: Path, skip: Callable[[Path], bool] = lambda path: False) -> None:
    """Brings a copy of a folder up to what the folder holds now; what is there alike already is not read again.

    Modes and times are kept. Sockets, and what is half written (`.*.partial`), are left out, and so is what vanishes
    meanwhile. The copy keeps nothing that the folder has not.

    Args:
        skip: of a path below the source, whether it is left out, with all below it.
    """
    target.mkdir(mode=0o700, exist_ok=True)
    names = set()
    for path in _listed(source):
        if skip(path) or (path.name.startswith(".") and path.name.endswith(".partial")):
            continue
        copy = target / path.name
        try:
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode):
                copy_files(path, copy, skip)
            elif stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
                if not _alike(found, copy):
                    copy_file(path, copy)
            else:
                continue
        except FileNotFoundError:
            continue
        names.add(path.name)
    for copy in _listed(target):
        if copy.name not in names and not skip(source / copy.name):
            shutil.rmtree(copy) if copy.is_dir() and not copy.is_symlink() else copy.unlink()
    shutil.copystat(source, target)


def copy_file(source: Path, target: Path) -> None:
    """One file, with its mode and times, in the place of what was there.

    Raises:
        FileNotFoundError: it is not there.
    """
    aside = target.with_name(f".{target.name}.copy")
    shutil.copy2(source, aside, follow_symlinks=False)
    aside.replace(target)


def copy_database(source: Path, target: Path) -> None:
    """An SQLite database as it is after its newest commit, in one file, whoever writes to it; for its owner alone.

    Raises:
        BackupError: what was copied is no sound database.
        sqlite3.Error: it cannot be read.
    """
    target.unlink(missing_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_EXCL, stat.S_IMODE(source.stat().st_mode)))
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=rw", uri=True, timeout=_SECONDS)) as read,
        closing(sqlite3.connect(target)) as written,
    ):
        read.backup(written)
        found = [row[0] for row in written.execute("PRAGMA integrity_check")]
        if found != ["ok"]:
            raise BackupError(
                f"{source} is damaged ({found[0]}): no copy of it is any use, so keep your last one"
            )
    shutil.copystat(source, target)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _alike(found: os.stat_result, copy: Path) -> bool:
    try:
        kept = copy.lstat()
    except FileNotFoundError:
        return False
    return (kept.st_size, kept.st_mtime_ns, kept.st_mode) == (found.st_size, found.st_mtime_ns, found.st_mode)
