"""A gRPC proxy that notes every message that sites send, between real SuperNodes and a real SuperLink, over TLS."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import grpc

_NOT_FORWARDED = ("user-agent", "grpc-accept-encoding", "accept-encoding", "te", "content-type")


@dataclass(frozen=True)
class Call:
    """One call: its method, the node's public key, what stands beside it, and the bytes of request and response."""

    method: str
    node: bytes
    headers: dict[str, str | bytes]
    request: bytes
    response: bytes


class RecordingProxy(grpc.GenericRpcHandler):
    """Listens on a port with the server's own certificate, and forwards to another port."""

    def __init__(self, port: int, target: int) -> None:
        self.calls: list[Call] = []
        self._port, self._target, self._lock = port, target, Lock()

    def start(self, tls: Path) -> None:
        """Begins to listen.

        Args:
            tls: the server's folder of certificates.
        """
        pair = ((tls / "server.key").read_bytes(), (tls / "server.crt").read_bytes())
        no_limit = [("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0)]
        self._server = grpc.server(ThreadPoolExecutor(16), options=no_limit)
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_secure_port(f"127.0.0.1:{self._port}", grpc.ssl_server_credentials((pair,)))
        authority = grpc.ssl_channel_credentials((tls / "ca.crt").read_bytes())
        self._channel = grpc.secure_channel(f"127.0.0.1:{self._target}", authority, options=no_limit)
        self._server.start()

    def stop(self) -> None:
        """Ends."""
        self._server.stop(0).wait()
        self._channel.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        forward: Callable[..., Any] = self._channel.unary_unary(method)

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            given = [(k, v) for k, v in context.invocation_metadata() if k not in _NOT_FORWARDED]
            try:
                response, call = forward.with_call(request, metadata=given, timeout=120)  # type: ignore[attr-defined]
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
                raise
            context.send_initial_metadata(call.initial_metadata())
            node = next((bytes(v) for k, v in given if k.endswith("public-key-bin")), b"")
            with self._lock:
                self.calls.append(Call(method.rsplit("/", 1)[-1], node, dict(given), request, response))
            return bytes(response)

        return grpc.unary_unary_rpc_method_handler(handle)
