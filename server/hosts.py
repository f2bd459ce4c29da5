"""What may be the name that sites reach a server by: it stands in certificates, and in every invitation."""

from __future__ import annotations

import ipaddress
import re

from server.deployment import DeploymentError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_LONGEST = 253
_SAY = "give the name or address that sites reach this machine by, such as fedtide.example.org or 192.0.2.7"


def checked_host(host: str) -> str:
    """A host that sites can reach, as certificates name it: in lower case, without a final dot, names as in DNS.

    Raises:
        DeploymentError: it is none; says why, and what to give.
    """
    text = host.strip()
    if not text:
        raise DeploymentError(f"--host is empty: {_SAY}")
    if "://" in text or "/" in text:
        raise DeploymentError(f"--host {host} is a URL or a path: {_SAY}")
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if "%" in text:
        raise DeploymentError(f"--host {host} names an interface of this machine alone (%): {_SAY}")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        pass
    else:
        return str(_checked_address(host, address))
    if text.count(":") == 1 and text.rpartition(":")[2].isdigit():
        raise DeploymentError(f"--host {host} has a port: give that as --port, and the host without it")
    return _checked_name(host, text)


def _checked_address(host: str, address: Address) -> Address:
    kinds = {
        "stands for every address of this machine, and for none that a site can reach": address.is_unspecified,
        "is a multicast address, which no site can connect to": address.is_multicast,
        "is the broadcast address, which no site can connect to": str(address) == "255.255.255.255",
        "is link-local, and means another machine on every network": address.is_link_local,
    }
    for why, so in kinds.items():
        if so:
            raise DeploymentError(f"--host {host} {why}: {_SAY}")
    return address


def _checked_name(host: str, text: str) -> str:
    try:
        name = text.removesuffix(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    if re.fullmatch(r"[0-9.]+|0x[0-9a-f]+", name):
        raise DeploymentError(f"--host {host} is no whole address of four numbers up to 255: {_SAY}")
    if len(name) > _LONGEST or not _NAME.fullmatch(name):
        raise DeploymentError(f"--host {host} is no host's name: {_SAY}")
    return name
