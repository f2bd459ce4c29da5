"""What can be learned of a server from outside, with nothing changed there: reached, certificate, clock, node key.

The Fleet API looks a node's key up before it looks at the interval of its heartbeats, so asking to be activated with
an interval that no server takes tells whether the key is known, and activates nothing. It takes timestamps in a window
around its own clock; where the window ends tells what that clock shows.
"""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path

from cryptography import x509

from client.authority import dated_fault
from client.connection import Connection

PATIENCE = 10.0
_FARTHEST = 7200
_NO_INTERVAL = -1.0
_INTERVAL_REFUSED, _KEY_UNKNOWN = 2003, 2004


class ProbeError(RuntimeError):
    """The server did not answer as one does; the message says what to do."""


class Heard(Enum):
    """What the Fleet API says to a node that asks to be activated."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    WRONG_TIME = "wrong time"


def reach(connection: Connection) -> str:
    """The address that a connection was opened to.

    Raises:
        ProbeError: none could be.
    """
    try:
        with socket.create_connection((connection.host, connection.port), timeout=PATIENCE) as opened:
            return str(opened.getpeername()[0])
    except socket.gaierror as error:
        raise ProbeError(
            f"the name {connection.host} is not known to this machine's DNS: ask the server's owner for the name in use"
        ) from error
    except ConnectionRefusedError as error:
        raise ProbeError(
            f"{connection.address} refuses connections: its machine answers, and nothing listens there: ask the "
            "server's owner to start it"
        ) from error
    except OSError as error:
        raise ProbeError(
            f"{connection.address} does not answer ({error.strerror or f'nothing came in {PATIENCE:g} s'}): let this "
            "machine out to that port, and ask the server's owner whether it is up"
        ) from error


_DATED = (9, 10)
_CERTIFICATE_FAULTS = dict.fromkeys(
    (18, 19, 20),
    "does not come from ca.crt: ask the server's owner for the invitation of today, and whether the authority is new",
) | {
    62: "is for another name: ask the server's owner for a new invitation.json",
    64: "is for another address: ask the server's owner for a new invitation.json",
}
"""OpenSSL's codes of what may be wrong with a certificate; of a date it does not say whose it is."""


def certificate(connection: Connection) -> datetime:
    """Until when the server's certificate is valid; it verifies against the site's ca.crt, name and dates.

    Raises:
        ProbeError: it does not.
    """
    context = ssl.create_default_context(cafile=str(connection.authority))
    try:
        shown = _shown(connection, context)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _DATED:
            raise ProbeError(_dated(connection)) from error
        fault = _CERTIFICATE_FAULTS.get(error.verify_code, f"does not verify: {error.verify_message}")
        raise ProbeError(f"the server's certificate {fault}") from error
    except (OSError, ssl.SSLError) as error:
        raise ProbeError(
            f"{connection.address} speaks no TLS ({type(error).__name__}): is it the Fleet port of the server?"
        ) from error
    return x509.load_der_x509_certificate(shown).not_valid_after_utc


def _shown(connection: Connection, context: ssl.SSLContext) -> bytes:
    """The certificate that the server shows, DER."""
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((connection.host, connection.port), timeout=PATIENCE) as opened,
        context.wrap_socket(opened, server_hostname=connection.host) as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True) or b""


def _dated(connection: Connection) -> str:
    """Which certificate's date does not hold. What is shown is looked at unverified: it says no more than this."""
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    try:
        return dated_fault(_shown(connection, unverified), connection.authority, datetime.now(UTC))
    except (OSError, ValueError):
        return "the server's certificate, or the authority in ca.crt, has expired or is not valid yet: check the clocks"


def fleet(connection: Connection) -> Callable[[timedelta], Heard]:
    """A function that asks the Fleet API with the node's key, as if this machine's clock were off by so much more."""
    import grpc  # type: ignore[import-untyped]
    from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.supercore.error import FlowerError
    from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    key = connection.private_key()
    public = public_key_to_bytes(key.public_key())
    channel = grpc.intercept_channel(
        grpc.secure_channel(
            connection.address,
            grpc.ssl_channel_credentials(connection.authority.read_bytes()),
            options=[("grpc.enable_http_proxy", 0)],
        ),
        RuntimeVersionClientInterceptor(component_name="SuperNode"),
    )
    stub = FleetStub(channel)

    def ask(shift: timedelta) -> Heard:
        stamp = (datetime.now(UTC) + shift).isoformat()
        metadata = [
            (PUBLIC_KEY_HEADER, public),
            (TIMESTAMP_HEADER, stamp),
            (SIGNATURE_HEADER, sign_message(key, stamp.encode("ascii"))),
        ]
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=_NO_INTERVAL)
        try:
            stub.ActivateNode(request, metadata=metadata, timeout=PATIENCE)
        except grpc.RpcError as error:
            said = str(error.details())
            if error.code() is grpc.StatusCode.UNAUTHENTICATED and "timestamp" in said:
                return Heard.WRONG_TIME
            flower = FlowerError.from_json(said)
            if flower is not None and flower.code == _INTERVAL_REFUSED:
                return Heard.KNOWN
            if flower is not None and flower.code == _KEY_UNKNOWN:
                return Heard.UNKNOWN
            raise ProbeError(
                f"the server answers {error.code().name}: is it `fedtide server up`, of this version?"
            ) from error
        raise ProbeError("the server took a heartbeat interval that none takes: is it `fedtide server up`?")

    return ask


def clock_ahead(ask: Callable[[timedelta], Heard], now: Heard) -> float | None:
    """By how many seconds this machine's clock is ahead of the server's, to two; None where more than two hours.

    Args:
        now: what the server says to an unshifted timestamp.
    """
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    def taken(seconds: float) -> bool:
        return ask(timedelta(seconds=seconds)) is not Heard.WRONG_TIME

    window: int = TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE
    inside = 0.0 if now is not Heard.WRONG_TIME else None
    for far in range(window // 2, _FARTHEST + 1, window // 2) if inside is None else ():
        inside = next((float(each) for each in (far, -far) if taken(each)), None)
        if inside is not None:
            break
    if inside is None:
        return None
    low, high = (
        inside,
        inside + window,
    )  # taken, refused: the latest stamp that is taken is the tolerance ahead
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) else (low, middle)
    return float(SYSTEM_TIME_TOLERANCE) - (low + high) / 2


def main() -> None:
    """Prints what the server says to the node of a site's folder, if it answers."""
    with suppress(ProbeError):
        print(fleet(Connection.load(Path(sys.argv[1])))(timedelta()).value)


if __name__ == "__main__":
    main()
