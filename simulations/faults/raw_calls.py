"""Calls as no gRPC client makes them: begun and never sent, many on one connection, by hand-made HTTP/2 frames."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterable
from pathlib import Path

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _SETTINGS, _END_HEADERS = 1, 4, 4


def connect(host: str, port: int, authority: Path, timeout: float = 10.0) -> ssl.SSLSocket:
    """A TLS connection that is to carry HTTP/2, with nothing sent on it yet."""
    context = ssl.create_default_context(cafile=str(authority))
    context.set_alpn_protocols(["h2"])
    opened = socket.create_connection((host, port), timeout=timeout)
    return context.wrap_socket(opened, server_hostname=host)


def half_open(
    connection: ssl.SSLSocket, method: str, count: int, headers: Iterable[tuple[str, str]] = ()
) -> None:
    """Begins so many calls of a method of the Fleet API on a new connection: headers, and never a message."""
    fields = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", f"/flwr.proto.Fleet/{method}"),
        (":authority", "server"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *headers,
    ]
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)
    sent = _PREFACE + _frame(_SETTINGS, 0, 0, b"")
    sent += b"".join(_frame(_HEADERS, _END_HEADERS, 2 * number + 1, block) for number in range(count))
    connection.sendall(sent)


def closed(connection: ssl.SSLSocket, seconds: float) -> bool:
    """Whether the other side ends a connection within some seconds; what it sends is thrown away."""
    connection.settimeout(seconds)
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, size = len(data) - 127, [127]
    while rest >= 128:
        size.append(rest % 128 + 128)
        rest //= 128
    return bytes([*size, rest]) + data
