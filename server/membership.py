"""Takes sites out of a federation: removed with their node, or barred for a reason; both on the owner's word.

What a site released stays where it is: its chain, its anchors and its receipts are evidence.
"""

from __future__ import annotations

from server.deployment import Deployment, NotRunningError
from server.nodes import register_nodes
from server.registry import Registry, RegistryError


def remove(server: Deployment, name: str, reason: str = "") -> bool:
    """Takes a site out, now and in later runs: it is asked nothing, and SuperLink forgets its node.

    A site that is barred, by its owner or by proof, stays so: its node alone is taken out. A reason that was given
    before stays where none is given now.

    Returns:
        Whether SuperLink has done so; else the next `fedtide server up` does.

    Raises:
        RegistryError: there is no such site.
        DeploymentError: SuperLink refuses.
    """
    registry = Registry(server.registry)
    site = registry.named(name)
    if not site.barred and site.out != "barred":
        registry.shut_out(name, "removed", reason or site.reason)
    (server.nodes / f"{name}.pub").unlink(missing_ok=True)
    try:
        register_nodes(server)
    except NotRunningError:
        return False
    return True


def bar(server: Deployment, name: str, reason: str) -> None:
    """Asks a site nothing from now on, and admits no answer of it; it stays enrolled and may connect.

    Raises:
        RegistryError: there is no such site, it is barred for good or removed, or no reason is given.
    """
    registry = Registry(server.registry)
    if not reason.strip():
        raise RegistryError("say why with --reason: whoever reads the list of sites later wants to know")
    if registry.named(name).out == "removed":
        raise RegistryError(f"site {name!r} was removed: it is out already")
    registry.shut_out(name, "barred", " ".join(reason.split()))


def unbar(server: Deployment, name: str) -> None:
    """Takes a bar back.

    Raises:
        RegistryError: there is no such site, it was not barred by `bar`, or it was removed.
    """
    registry = Registry(server.registry)
    site = registry.named(name)
    if site.out == "removed":
        raise RegistryError(f"site {name!r} was removed: `fedtide server enroll` takes it in again")
    if not site.shut_out:
        raise RegistryError(
            f"site {name!r} is not barred: `fedtide server sites {server.folder}` lists the sites"
        )
    registry.let_in(name)
