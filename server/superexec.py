"""The server's SuperExec: asks SuperLink for runs, and starts a guarded ServerApp for each.

No argument of it tells the token with which a run could be taken away.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.executor import report_failed, run_loop
from common.supervision import Pulse
from server.bundle_guard import GUARDED
from server.deployment import Deployment


class ServerApps:
    """What Flower's loop hands a task to."""

    def __init__(self, server: Deployment, pulse: Pulse) -> None:
        self._server, self._pulse = server, pulse
        self._started: list[subprocess.Popen[bytes]] = []

    def get_eligible_capacity(self, supported: set[Any], **_: Any) -> tuple[set[Any], set[str]]:
        """Any number of any kind: what a server does not run is to be refused here, not waited for."""
        return supported, set()

    def launch(self, spec: Any) -> Any:
        """Starts a run's ServerApp; refuses all else."""
        from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
        from flwr.supercore.superexec.executor import LaunchResult

        program = TASK_TYPE_TO_COMMAND[spec.task_type]
        if program != GUARDED:
            print(
                f"the server was asked to run {program}: refused, as a server runs the ServerApp alone",
                file=sys.stderr,
            )
            with suppress(Exception):  # over already: either way it is not waited for
                report_failed(spec)
            return LaunchResult.failed("a server runs the ServerApp alone")
        started = subprocess.Popen(
            [
                *(sys.executable, "-m", "server.bundle_guard", str(self._server.folder), GUARDED),
                *("--runtime-api-address", spec.runtime_api_address),
                *(
                    "--root-certificates",
                    str(spec.root_certificates_path),
                    "--parent-pid",
                    str(spec.parent_pid),
                ),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if spec.suppress_output else None,
            stderr=subprocess.DEVNULL if spec.suppress_output else None,
        )
        assert started.stdin is not None
        with suppress(BrokenPipeError), started.stdin:
            started.stdin.write(f"{spec.token}\n".encode())
        self._started.append(started)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Shows that it lives, and forgets what has ended."""
        self._pulse.show()
        self._started = [each for each in self._started if each.poll() is None]

    def close(self) -> None:
        """The loop ends, and with it what it started: each looks whether its parent is there."""


def main() -> None:
    """Serves the server whose folder is the argument, until it is ended."""
    from flwr.supercore.utils import disable_process_dumping

    pulse, server = Pulse(), Deployment.load(Path(sys.argv[1]))
    disable_process_dumping(strict=False)
    run_loop(
        ServerApps(server, pulse),
        pulse,
        address=server.control,
        secret=server.secret,
        authority=server.authority,
    )


if __name__ == "__main__":
    main()
