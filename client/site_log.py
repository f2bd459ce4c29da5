"""The site's own log, to which its processes add lines: kept short, and shown as it grows."""

from __future__ import annotations

import json
import os
import select
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TextIO

SITE_LOG = "site.log"
_KEPT = 10_000_000


def keep_short(file: Path) -> None:
    """Puts a log that grew long aside, as the one before: whoever adds a line opens the file for it."""
    with suppress(OSError):  # it is gone, or its folder is: the next line says so
        if file.stat().st_size > _KEPT:
            file.rename(file.with_name(f"{file.name}.1"))


class Shown:
    """Follows a file that others add to, and shows what is added; deleted, moved, cut or made anew, it is followed."""

    def __init__(self, file: Path, stream: TextIO, as_json: bool) -> None:
        """From the file's end on."""
        self._file, self._stream, self._as_json = file, stream, as_json
        self._open: BinaryIO | None = None
        self._rest = b""
        with suppress(OSError):
            self._open = file.open("rb")
            self._open.seek(0, os.SEEK_END)

    def show(self) -> None:
        """Shows the whole lines that are new."""
        with suppress(OSError):
            self._show_rest()
            if not self._is_open():
                self._show_rest()  # what came between
                self.close()
                self._rest = b""
                self._open = self._file.open("rb")
                self._show_rest()

    def close(self) -> None:
        """Lets go of the file."""
        if self._open is not None:
            self._open.close()
        self._open = None

    def _is_open(self) -> bool:
        if self._open is None:
            return False
        with suppress(FileNotFoundError):
            return os.path.samestat(self._file.stat(), os.fstat(self._open.fileno()))
        return False

    def _show_rest(self) -> None:
        if self._open is None:
            return
        if os.fstat(self._open.fileno()).st_size < self._open.tell():  # it was cut
            self._open.seek(0)
            self._rest = b""
        data = self._rest + self._open.read()
        whole, _, self._rest = data.rpartition(b"\n")
        for line in whole.decode("utf-8", "replace").splitlines():
            with suppress(OSError, ValueError):  # nobody looks any more; the file has it
                if not _takes_more(self._stream):  # a pager that is paused, a terminal that was stopped
                    continue
                print(line if self._as_json else _plain(line), file=self._stream, flush=True)


def _takes_more(stream: TextIO) -> bool:
    """Whether a line can be written without waiting for somebody to read: a pipe then has room for 4096 bytes."""
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):  # it is no file of the system's
        return True
    look = select.poll()
    look.register(number, select.POLLOUT)
    return bool(look.poll(0))


def _plain(line: str) -> str:
    try:
        fields = json.loads(line)
        return f"{str(fields['time'])[11:19]} {fields['level']} {fields['message']}"
    except (ValueError, KeyError, TypeError):
        return line
