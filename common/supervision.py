"""A process that is kept alive: started in its own process group, restarted when it dies, ended with all below it."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_SETTLED = 60.0
"""A process that lived this long, seconds, was well: the next one is started without much ado."""
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_LOG_KEPT = 10_000_000
_KILLED = " (killed: look whether memory ran out)"
_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """Has this process get SIGTERM when the one that started it is gone."""
    _libc.prctl(_PARENT_DEATH, signal.SIGTERM)


class Supervised:
    """One process under supervision. Start it from the main thread: it is ended when that thread is gone."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
        logger: logging.Logger,
    ) -> None:
        """Args:
        folder: the process's working directory.
        log: gets what it prints, added at the end.
        """
        self.name, self.log = name, log
        self.restarts = 0
        self._command, self._environment, self._folder = list(command), dict(environment), folder
        self._logger = logger
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._wait = _FIRST_WAIT
        self._next = 0.0

    @property
    def pid(self) -> int | None:
        """Of the living process."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def code(self) -> int | None:
        """What the process ended with; None while it lives."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Starts the process."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 (one call into libc, which takes no lock)
            )
        finally:
            os.close(descriptor)
        self._began, self._next = time.monotonic(), 0.0

    def tend(self) -> bool:
        """Restarts the process if it has died and its wait is over, and keeps its log short. Call it often.

        Returns:
            Whether it was restarted.
        """
        self._keep_log_short()
        if self.pid is not None:
            return False
        now = time.monotonic()
        if not self._next:
            lived = now - self._began
            wait = self._wait = _FIRST_WAIT if lived > _SETTLED else self._wait
            self._next, self._wait = now + wait, min(wait * 2, _LONGEST_WAIT)
            self._logger.warning(
                "%s ended with code %s%s after %.0f s; it is started again in %.0f s; see %s",
                self.name, self.code, _KILLED if self.code == -signal.SIGKILL else "", lived, wait, self.log,
            )  # fmt: skip
            self._end_group(signal.SIGKILL)  # what it had started must not outlive it
        if now < self._next:
            return False
        self.restarts += 1
        self.start()
        return True

    def _keep_log_short(self) -> None:
        """The process holds its log open, so the log is copied aside and emptied; lines between may be lost."""
        if self.log.stat().st_size > _LOG_KEPT:
            shutil.copy(self.log, self.log.with_name(f"{self.log.name}.1"))
            os.truncate(self.log, 0)

    def stop(self, patience: float = 10.0) -> None:
        """Ends the process and all that it started."""
        if self._process is None:
            return
        if self.pid is not None:
            self._end_group(signal.SIGTERM)
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                self._logger.warning("%s did not end within %.0f s: it is killed", self.name, patience)
        self._end_group(signal.SIGKILL)
        self._process.wait()

    def _end_group(self, sent: signal.Signals) -> None:
        if self._process is not None:
            try:
                os.killpg(self._process.pid, sent)
            except (ProcessLookupError, PermissionError):
                return


def wait_until(
    ready: Callable[[], bool], seconds: float, *, unless: Callable[[], bool] = lambda: False
) -> bool:
    """Whether something became so in time; gives up early where `unless` holds."""
    end = time.monotonic() + seconds
    while not ready():
        if unless() or time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
