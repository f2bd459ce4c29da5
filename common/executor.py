"""Flower's loop that asks for tasks, with another way to run them than a program whose arguments tell the task's token.

Every account of a machine can read every process's arguments, and who has a task's token may take the task away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from common.supervision import ANSWERED, Pulse

_LONGEST_WAIT = 2.0
"""Seconds between two tries to reach what gives tasks, which is on this machine."""


class Executor(Protocol):
    """What Flower's loop hands a task to."""

    def launch(self, spec: Any) -> Any:
        """Begins a task; whether it could."""

    def reconcile(self) -> None:
        """Looks after what was begun. Called often."""

    def get_eligible_capacity(self, supported: set[Any], **_: Any) -> tuple[set[Any], set[str]]:
        """The kinds of task that may be given now."""

    def close(self) -> None:
        """The loop ends."""


class _ToldOfWaits:
    """Stands for the module `time` in Flower's loop: it sleeps there when it has just been answered."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse

    def sleep(self, seconds: float) -> None:
        self._pulse.show(ANSWERED)
        time.sleep(seconds)


def _patient(make: Callable[[], Any], pulse: Pulse) -> Callable[[], Any]:
    """A maker of Flower's retries that are never far apart, and show that they are made."""

    def made() -> Any:
        invoker = make()
        wait = invoker.wait_function

        def waited(seconds: float) -> None:
            pulse.show()
            wait(min(seconds, _LONGEST_WAIT))

        invoker.wait_function = waited
        return invoker

    return made


def run_loop(
    executor: Executor, pulse: Pulse, *, address: str, secret: Path, authority: Path | None = None
) -> None:
    """Asks for tasks until the process is ended, and shows that it lives.

    Args:
        address, secret: of what gives tasks, and what it awaits of its executor.
        authority: of its certificate; None where it is asked without TLS, on loopback.

    Raises:
        RuntimeError: this Flower's loop is another.
    """
    from flwr.supercore.auth import load_superexec_auth_secret
    from flwr.supercore.superexec import run_superexec as flower

    for name, own in (
        ("get_executor", lambda *_, **__: executor),
        ("make_simple_http_retry_invoker", _patient(flower.make_simple_http_retry_invoker, pulse)),
        ("time", _ToldOfWaits(pulse)),
    ):
        if not hasattr(flower, name):
            raise RuntimeError(f"this version of Flower has no {name}: install flwr 1.39")
        setattr(flower, name, own)
    flower.run_superexec(
        runtime_api_address=address,
        insecure=authority is None,
        root_certificates_path=None if authority is None else str(authority),
        superexec_auth_secret=load_superexec_auth_secret(secret_file=str(secret)),
    )


def report_failed(spec: Any) -> None:
    """Tells who gave a task that it came to nothing, so that it is not waited for.

    Raises:
        Exception: of whatever kind: it is over there already, or what gave it is.
    """
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import PushTaskOutputRequest
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    client = RuntimeHttpClient.from_server_address(
        server_address=spec.runtime_api_address,
        insecure=spec.insecure,
        root_certificates=None if spec.insecure else Path(spec.root_certificates_path).read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name=spec.task_type),
            RuntimeTokenHttpInterceptor(spec.token),
        ],
    )
    try:
        client.PushTaskOutput(
            PushTaskOutputRequest(sub_status=SubStatus.FAILED, details="it came to nothing")
        )
    finally:
        client.close()
