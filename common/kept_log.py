"""The log of a supervised process: kept short, and made anew where it was deleted or moved; never a reason to end.

The process holds its log open, and writes on into the old file when somebody deletes or moves it. So whoever watches
holds it open too, and carries what is added there over into a new file of the old name.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

_LOG_KEPT = 10_000_000
_CHUNK = 1 << 16
_FLAGS = os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


class KeptLog:
    """One process's log. All that fails with it is said once, and again only after it has gone well in between."""

    def __init__(self, file: Path, name: str, logger: logging.Logger) -> None:
        """Args:
        name: of the process, for what is said.
        """
        self._file, self._name, self._logger = file, name, logger
        self._held = -1
        self._place = 0
        self._said = False

    def open(self) -> int:
        """A descriptor for a new process to write to, for the caller to close; of nothing where there is no log."""
        self.close()
        try:
            self._held = os.open(self._file, os.O_RDONLY | _FLAGS, 0o600)
            self._place = os.fstat(self._held).st_size
            return os.open(f"/proc/self/fd/{self._held}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            self._say(error)
            self.close()
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def tend(self) -> None:
        """Cuts a log that grew long, and makes one anew that is gone. Call it often."""
        if self._held < 0:
            return
        try:
            if self._is_there():
                self._place = os.fstat(self._held).st_size
                self._keep_short()
            else:
                self._carry_over()
        except OSError as error:
            self._say(error)
        else:
            self._said = False

    def close(self) -> None:
        """Lets go of the file."""
        if self._held >= 0:
            os.close(self._held)
        self._held = -1

    def _is_there(self) -> bool:
        """Whether the file of that name is the one that the process writes to."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self._file.stat(), os.fstat(self._held))
        return False

    def _keep_short(self) -> None:
        """The process holds its log open, so the log is copied aside and emptied; lines between may be lost."""
        if self._place > _LOG_KEPT:
            aside = self._file.with_name(f"{self._file.name}.1")
            try:
                shutil.copy(self._file, aside)
            except OSError:
                aside.unlink(missing_ok=True)  # a disk that is full needs the room more than what was logged
                raise
            finally:
                os.truncate(self._file, 0)

    def _carry_over(self) -> None:
        old = os.fstat(self._held)
        target = os.open(self._file, os.O_WRONLY | _FLAGS, 0o600)
        try:
            while data := os.pread(self._held, _CHUNK, self._place):
                self._place += os.write(target, data)
            if os.fstat(target).st_size > _LOG_KEPT:
                os.truncate(target, 0)
        finally:
            os.close(target)
        if not old.st_nlink:  # nobody else will ever see it
            os.truncate(f"/proc/self/fd/{self._held}", 0)
            self._place = 0

    def _say(self, error: OSError) -> None:
        if not self._said:
            self._logger.warning(
                "the log %s cannot be kept (%s), and %s goes on without: free space there, or put its folder back",
                self._file, error.strerror, self._name,
            )  # fmt: skip
        self._said = True
