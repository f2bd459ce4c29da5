"""A process that is kept alive: started in its own process group, restarted when it dies or falls silent, ended with
all below it. What becomes of its log (deleted, moved, its disk full) ends nothing: `kept_log.py`.

One that is to show signs of life inherits a pipe, into which it writes a byte now and then (`Pulse`): what is stopped
or hangs writes none, is killed, and is started again.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from common.kept_log import KeptLog

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_SETTLED = 60.0
"""A process that lived this long, seconds, was well: the next one is started without much ado."""
_OWN_SLEEP = 10.0
"""Seconds between two looks after which this process itself must have stood still: nobody's silence counts then."""
_FIRST_SIGN = 180.0
"""Seconds that a process may take to its first sign of life: it imports what it needs."""
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_KILLED = " (killed: look whether memory ran out)"
_PULSE = "FEDTIDE_PULSE"
_PIPE = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)

ALIVE, ANSWERED = b".", b"+"
"""What a process shows: that it works; and that what it asks has just answered, which a thread beside may show."""


def end_with_parent(sent: signal.Signals = signal.SIGTERM) -> None:
    """Has this process get a signal when the one that started it is gone."""
    prctl = getattr(_libc, "prctl", None)  # Linux alone has it
    if prctl is not None:
        prctl(_PARENT_DEATH, sent)


class Pulse:
    """Where a supervised process shows that it lives; shows nothing where nobody looks."""

    def __init__(self) -> None:
        """Takes the pipe that this process inherited, so that what it starts does not inherit it too."""
        self._pipe = int(os.environ.pop(_PULSE, -1))
        if self._pipe >= 0:
            os.set_inheritable(self._pipe, False)

    def show(self, sign: bytes = ALIVE) -> None:
        """Shows a sign of life; never waits, and never fails."""
        if self._pipe >= 0:
            with suppress(OSError):  # full, as nobody looks just now; or nobody is there any more
                os.write(self._pipe, sign)

    def close(self) -> None:
        """To be called in a process that was forked: it does not live for the other."""
        if self._pipe >= 0:
            os.close(self._pipe)
        self._pipe = -1


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
        silence: float | None = None,
    ) -> None:
        """Args:
        folder: the process's working directory.
        log: gets what it prints, added at the end.
        silence: seconds without a sign of life after which it is killed, and started again; None: it shows none.
        """
        self.name, self.log = name, log
        self.restarts = 0
        self._command, self._environment, self._folder = list(command), dict(environment), folder
        self._logger, self._silence = logger, silence
        self._kept = KeptLog(log, name, logger)
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._wait = _FIRST_WAIT
        self._next = 0.0
        self._signs = -1
        self._looked = self._sign = 0.0
        self._shown = False
        self._answered: float | None = None
        self._killed = ""

    @property
    def pid(self) -> int | None:
        """Of the living process."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def code(self) -> int | None:
        """What the process ended with; None while it lives."""
        return None if self._process is None else self._process.poll()

    @property
    def lived(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._began

    @property
    def unanswered(self) -> float | None:
        """Seconds since it last showed `ANSWERED`; None where the living process never did."""
        return None if self._answered is None or self.pid is None else time.monotonic() - self._answered

    def start(self) -> None:
        """Starts the process.

        Raises:
            OSError: it cannot be; its log is no reason.
        """
        self._forget_signs()
        theirs: int | None = None
        environment = dict(self._environment)
        if self._silence is not None:
            self._signs, theirs = os.pipe()
            for end in (self._signs, theirs):
                os.set_blocking(end, False)
            environment[_PULSE] = str(theirs)
        descriptor = self._kept.open()
        try:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=() if theirs is None else (theirs,),
                preexec_fn=end_with_parent,  # noqa: PLW1509 (one call into libc, which takes no lock)
            )
        finally:
            os.close(descriptor)
            if theirs is not None:
                os.close(theirs)
        self._began, self._next = time.monotonic(), 0.0
        self._looked = self._sign = self._began

    def tend(self) -> bool:
        """Restarts the process if it has died and its wait is over, and keeps its log short. Call it often.

        Returns:
            Whether it was restarted.
        """
        self._kept.tend()
        if self.pid is not None:
            self._look_for_signs()
            return False
        now = time.monotonic()
        if not self._next:
            lived = now - self._began
            wait = self._wait = _FIRST_WAIT if lived > _SETTLED else self._wait
            self._next, self._wait = now + wait, min(wait * 2, _LONGEST_WAIT)
            why = self._killed or (_KILLED if self.code == -signal.SIGKILL else "")
            self._killed = ""
            self._logger.warning(
                "%s ended with code %s%s after %.0f s; it is started again in %.0f s; see %s",
                self.name, self.code, why, lived, wait, self.log,
            )  # fmt: skip
            self._end_group(signal.SIGKILL)  # what it had started must not outlive it
        if now < self._next:
            return False
        try:
            self.start()
        except OSError as error:  # no memory, no descriptors: another time
            self._next = now + self._wait
            self._logger.error("%s cannot be started (%s): it is tried again", self.name, error.strerror)
            return False
        self.restarts += 1
        return True

    def kill(self, why: str) -> None:
        """Kills the process, so that `tend` starts it again; what is said of its end says why."""
        self._killed = f" ({why})"
        self._end_group(signal.SIGKILL)

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
        self._forget_signs()
        self._kept.close()

    def _look_for_signs(self) -> None:
        if self._silence is None or self._killed:
            return
        now = time.monotonic()
        try:
            shown = os.read(self._signs, _PIPE)
        except OSError:  # none since the last look
            shown = b""
        if now - self._looked > _OWN_SLEEP:
            self._sign = now
        self._looked = now
        if ANSWERED in shown:
            self._answered = now
        if ALIVE in shown:
            self._sign, self._shown = now, True
        elif now - self._sign > (self._silence if self._shown else max(_FIRST_SIGN, self._silence)):
            self.kill(f"killed, as it gave no sign of life for {now - self._sign:.0f} s")

    def _forget_signs(self) -> None:
        if self._signs >= 0:
            os.close(self._signs)
        self._signs, self._shown, self._answered = -1, False, None

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
