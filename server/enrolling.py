"""Enrols a site: its ledger's genesis in the registry, and its node's key with SuperLink, now or when that is up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.privacy.enrolment import enrolment_from_bytes, enrolment_node_key, fingerprint, node_fingerprint
from common.privacy.entries import Entry, Genesis
from server.deployment import Deployment, NotRunningError
from server.nodes import check_unused, enrolled_keys, keep_node_key, register_nodes
from server.registry import Registry, RegistryError


@dataclass(frozen=True)
class Enrolled:
    """A site that was taken in.

    Attributes:
        node: "registered", "pending" (the server is down), "none" (the file names no node key); None without a server.
    """

    name: str
    fingerprint: str
    node_fingerprint: str | None
    epsilon: float
    delta: float
    node: str | None

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def enroll(data: bytes, name: str, server: Deployment | None, registry: Path | None) -> Enrolled:
    """Takes a site in.

    Args:
        data: the enrolment file.
        server: whose SuperLink is to know the node.
        registry: where there is no server.

    Raises:
        RegistryError: the name or the key is taken.
        ReceiptError: the file is not in order.
        DeploymentError: the node key is another site's, or SuperLink refuses it.
    """
    genesis, key = enrolment_from_bytes(data), enrolment_node_key(data)
    folder = server.registry if server is not None else registry
    assert folder is not None
    known = Registry(folder.expanduser().resolve())
    site = known.site(genesis.key_id)
    if site is not None and site.barred:
        raise RegistryError(
            f"the site was enrolled as {site.name!r}, and signed two histories of its ledger, which is proven: it is "
            "not taken in again"
        )
    if site is not None and site.shut_out and site.out != "removed":
        place = "DIR" if server is None else server.folder
        raise RegistryError(
            f"the site is enrolled as {site.name!r} and barred: `fedtide server unbar {place} {site.name}` comes first"
        )
    if server is not None and key is not None:
        check_unused(server, name, key)
    if site is not None and site.name == name and site.out == "removed":
        known.let_in(name)
    elif not _only_node_key_is_new(known, genesis, name, key, server):
        known.enroll(name, genesis)
    node = None if server is None else "none"
    if server is not None and key is not None:
        keep_node_key(server, name, key)
        try:
            register_nodes(server)
            node = "registered"
        except NotRunningError:
            node = "pending"
    body = genesis.body
    assert isinstance(body, Genesis)
    return Enrolled(
        name=name,
        fingerprint=fingerprint(genesis.key_id),
        node_fingerprint=None if key is None else node_fingerprint(key),
        epsilon=body.epsilon,
        delta=body.delta,
        node=node,
    )


def _only_node_key_is_new(
    registry: Registry, genesis: Entry, name: str, key: str | None, server: Deployment | None
) -> bool:
    """Whether this very site is enrolled already, and brings another node key."""
    site = registry.site(genesis.key_id)
    if site is None or site.name != name or server is None or key is None:
        return False
    return enrolled_keys(server).get(name) != key
