"""Flower's SuperNode, but for what it would tell the server beside a reply: how long the site's work took.

A step's time depends on how many users were drawn, and the contract lets no wall time leave a site. That the server
sees when a reply arrives is another matter (docs/sharp-edges.md).
"""

from __future__ import annotations

from typing import Any


def without_runtime(make: Any) -> Any:
    """A maker of Flower's PushMessages requests that leaves the run time out."""

    def made(**fields: Any) -> Any:
        fields.pop("clientapp_runtime_list")  # a KeyError where Flower has changed: no site starts unawares
        return make(**fields)

    return made


def main() -> None:
    """`flower-supernode` of a site."""
    from flwr.client.grpc_rere_client import connection
    from flwr.supernode.cli import flower_supernode

    connection.PushMessagesRequest = without_runtime(connection.PushMessagesRequest)
    flower_supernode()


if __name__ == "__main__":
    main()
