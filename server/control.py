"""What is asked of SuperLink over its control port, in this process: nodes taken in and out, runs begun, seen, ended.

Flower's `flwr` asks the same, but each time as a process of its own, which took ten seconds on a loaded machine.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from server.deployment import Deployment, DeploymentError, NotRunningError

_SECONDS = 60.0

Answer = TypeVar("Answer")


class _Direct(ControlHttpClient):  # type: ignore[misc]
    """Flower's client, without a proxy on the way to this machine, whatever the environment says."""

    def __init__(self, server: Deployment, context: ssl.SSLContext) -> None:
        super().__init__(
            f"https://{server.control}",
            interceptors=[RuntimeVersionHttpInterceptor("flwr CLI")],
            verify=context,
        )
        self._client.close()
        self._client: httpx.Client = httpx.Client(verify=context, timeout=_SECONDS, trust_env=False)


@dataclass(frozen=True)
class Control:
    """A connection to a server's control port; from `control`."""

    _server: Deployment
    _client: Any

    def register(self, name: str, key: str) -> None:
        """Makes SuperLink know a site's node.

        Args:
            key: public, one OpenSSH line.
        """
        public = load_ssh_public_key(key.encode("ascii"))
        assert isinstance(public, EllipticCurvePublicKey)
        request = RegisterNodeRequest(public_key=public_key_to_bytes(public), name=name)
        self._asked("to register a node", lambda: self._client.RegisterNode(request))

    def unregister(self, node_id: int) -> None:
        """Takes a node out."""
        request = UnregisterNodeRequest(node_id=node_id)
        self._asked("to take a node out", lambda: self._client.UnregisterNode(request))

    def start(self, bundle: bytes, config: Mapping[str, str]) -> int:
        """Begins a run of a bundle; Flower's number of it."""
        request = StartRunRequest(
            fab=fab_to_proto(Fab(sha256(bundle).hexdigest(), bundle, {})),
            override_config=user_config_to_proto(dict(config)),
        )
        begun = self._asked("to begin a run", lambda: self._client.StartRun(request))
        if not begun.HasField("run_id"):
            raise DeploymentError(f"Flower did not begin the run: {begun.note or 'without a word'}")
        return int(begun.run_id)

    def stop(self, run_id: int) -> None:
        """Ends a run."""
        if not self._asked(
            "to stop a run", lambda: self._client.StopRun(StopRunRequest(run_id=run_id))
        ).success:
            raise DeploymentError(f"Flower did not stop run {run_id}: `fedtide server status` shows it")

    def run_says(self, run_id: int) -> tuple[str, str]:
        """A run's status in Flower's word, such as "running" or "finished:failed", and its details."""
        request = ListRunsRequest(run_id=run_id)
        found = self._asked("to show a run", lambda: self._client.ListRuns(request)).run_dict
        if run_id not in found:
            raise DeploymentError(f"Flower knows no run {run_id}: `fedtide server status` lists the runs")
        status = found[run_id].status
        return ":".join(filter(None, (status.status, status.sub_status))), status.details

    def _asked(self, what: str, ask: Callable[[], Answer]) -> Answer:
        try:
            return ask()
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            reason = f"HTTP status {error.response.status_code}" if said is None else said.message
            raise DeploymentError(f"Flower refused {what}: {reason}") from error
        except httpx.HTTPError as error:
            if not self._server.running():
                raise NotRunningError(
                    f"the server is not running: start it with `fedtide server up {self._server.folder}`"
                ) from error
            raise NotRunningError(
                f"the server is up, but does not answer on {self._server.control}: `fedtide server up` starts it again "
                f"where it died, so wait a minute; then see {self._server.logs}"
            ) from error


@contextmanager
def control(server: Deployment) -> Iterator[Control]:
    """A connection to a server's control port. Whatever is asked over it raises

    Raises:
        NotRunningError: the server does not answer.
        DeploymentError: Flower says no; with its words. Or the authority cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=str(server.authority))
    except OSError as error:
        raise DeploymentError(
            f"{server.authority} holds no certificate that can be read: restore it"
        ) from error
    with _Direct(server, context) as client:
        yield Control(server, client)
