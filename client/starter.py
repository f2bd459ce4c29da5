"""A site's executor: asks the SuperNode beside it for tasks, and forks a ClientApp for each.

Flower's own executor starts a program a task, which imports for longer than all else in a round takes, and whose
arguments every account of the machine can read: the task's token, with which its holder may take the task away. Here
Flower's loop runs in a process that has imported all that a ClientApp takes, and the token stays in its memory. The
guard is asked anew for each task, in the forked process. A ClientApp that was killed, and a task that a site never
runs, are reported at once, so that the SuperNode waits for neither.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.executor import report_failed, run_loop
from common.supervision import Pulse, end_with_parent

_FAILED = 1
_OUTDATED = 10.0
"""Seconds that a ClientApp may take to end once the SuperNode gives the next task: it gives one at a time."""
_log = logging.getLogger("fedtide.site")


@dataclass
class _Child:
    """A ClientApp that runs.

    Attributes:
        outdated: since when another task was given, by the monotonic clock; None where none was.
    """

    pid: int
    spec: Any
    outdated: float | None = None


class ForkingExecutor:
    """What Flower's loop hands a task to."""

    def __init__(
        self,
        run: Callable[[Any], int],
        fresh: Callable[[], bool],
        elsewhere: Callable[[Any], subprocess.Popen[bytes]],
        pulse: Pulse,
    ) -> None:
        """Args:
        run: runs a task's ClientApp, in a process that was just forked; its exit code.
        fresh: whether the code that is installed now is the code that was imported.
        elsewhere: starts a task's ClientApp with the code that is installed now.
        """
        self._run, self._fresh, self._elsewhere, self._pulse = run, fresh, elsewhere, pulse
        self._children: list[_Child] = []

    def get_eligible_capacity(self, supported: set[Any], **_: Any) -> tuple[set[Any], set[str]]:
        """Any number of any kind: what a site does not run is to be refused here, not waited for."""
        return supported, set()

    def launch(self, spec: Any) -> Any:
        """Forks a task's ClientApp. Where other code was installed since, starts that, waits, and ends.

        Raises:
            SystemExit: the process is to be started again.
        """
        from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
        from flwr.supercore.superexec.executor import LaunchResult

        if spec.task_type != TaskType.CLIENT_APP:
            name = TASK_TYPE_TO_COMMAND[spec.task_type]
            _log.error(
                "the server asked this site to run %s: refused, as a site runs the ClientApp alone", name
            )
            _report_failed(spec)
            return LaunchResult.failed("a site runs the ClientApp alone")
        now = time.monotonic()
        for each in self._children:
            each.outdated = each.outdated or now
        if not self._fresh():
            self._end_with(spec)
        parent = os.getpid()
        if pid := os.fork():
            self._children.append(_Child(pid, spec))
            return LaunchResult.accepted()
        self._be_the_client_app(spec, parent)

    def _be_the_client_app(self, spec: Any, parent: int) -> NoReturn:
        code = _FAILED
        try:
            from flwr.supercore.exit import exit_handler

            self._pulse.close()
            for each in exit_handler.SIGNAL_TO_EXIT_CODE:
                signal.signal(each, signal.SIG_DFL)
            exit_handler.registered_exit_handlers.clear()  # those of the process that was forked
            end_with_parent()
            if os.getppid() == parent:
                code = self._run(spec)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 255)

    def _end_with(self, spec: Any) -> NoReturn:
        _log.warning(
            "another version was installed: what starts ClientApps ends, to be started again with it"
        )
        last = self._elsewhere(spec)
        while self._children or last.poll() is None:
            self.reconcile()
            time.sleep(0.2)
        if last.returncode < 0:
            _say_killed()
            _report_failed(spec)
        sys.exit(0)

    def reconcile(self) -> None:
        """Looks after the ClientApps that were forked. Flower's loop calls it often."""
        self._pulse.show()
        for child in list(self._children):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                self._children.remove(child)
                if os.WIFSIGNALED(status) and child.outdated is None:
                    _say_killed()
                if os.WIFSIGNALED(status):
                    _report_failed(child.spec)
            elif child.outdated is not None and time.monotonic() - child.outdated > _OUTDATED:
                os.kill(
                    child.pid, signal.SIGKILL
                )  # nobody awaits it; what stands still may wake up at any time

    def close(self) -> None:
        """Flower's loop ends; so does the process, and its ClientApps with it."""


def _say_killed() -> None:
    _log.error(
        "a ClientApp was killed before its answer was sent: look whether memory ran out. What was charged stays "
        "charged; the site goes on by itself at its next round"
    )


def _report_failed(spec: Any) -> None:
    """Tells the SuperNode that a task came to nothing, so that it does not wait for it."""
    try:
        report_failed(spec)
    except Exception as error:  # it is over already, or the SuperNode is: either way it does not wait
        _log.info("a task that came to nothing was over at the SuperNode: %s", type(error).__name__)


def _given(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Starts a site's ClientApps; started by `fedtide site up`.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--address", required=True, help="of the SuperNode's Runtime API, on loopback")
    parser.add_argument("--secret", type=Path, help="that the SuperNode awaits of its executor")
    parser.add_argument(
        "--one", action="store_true", help="one ClientApp, its task's token on standard input"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Serves a site until it is ended, or until another version is installed."""
    pulse, given = Pulse(), _given(arguments)

    from flwr.supercore.utils import disable_process_dumping

    from client.bundle_guard import guarded_clientapp
    from common.logs import set_up_logs

    disable_process_dumping(strict=False)
    set_up_logs(given.log, json=True)
    if given.one:
        token = sys.stdin.buffer.readline().decode("ascii").strip()
        sys.exit(guarded_clientapp(given.folder, given.address, token))

    # All that a ClientApp needs, imported before the first.
    import flwr.cli.build
    import flwr.supernode.runtime.run_clientapp  # noqa: F401

    import client.app
    import client.policy  # noqa: F401
    from client.bundle_guard import allowed_bundles
    from common.bundle import installed_code

    code = installed_code.__wrapped__()
    _log.info("bundles allowed here: %s", ", ".join(allowed_bundles(given.folder)))

    def run(spec: Any) -> int:
        return guarded_clientapp(given.folder, spec.runtime_api_address, spec.token)

    def fresh() -> bool:
        return bool(installed_code.__wrapped__() == code)

    def elsewhere(spec: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "client.starter", given.folder, given.log]
        started = subprocess.Popen(
            [*command, "--address", spec.runtime_api_address, "--one"],
            stdin=subprocess.PIPE,
            preexec_fn=end_with_parent,  # noqa: PLW1509 (one call into libc, which takes no lock)
        )
        assert started.stdin is not None
        with suppress(BrokenPipeError), started.stdin:
            started.stdin.write(f"{spec.token}\n".encode())
        return started

    executor = ForkingExecutor(run, fresh, elsewhere, pulse)
    run_loop(executor, pulse, address=given.address, secret=given.secret)


if __name__ == "__main__":
    main()
