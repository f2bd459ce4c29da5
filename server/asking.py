"""What each site is asked in a round: which sites, under which nonces, by the server's signed word.

Nonces, and the choice of sites where a plan asks a part of them, follow from the server's key and the round alone. So a
server that was restarted or restored asks for the same releases as before, sites answer with the bytes that they sent
then, and nothing is charged twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from common.config import Plan
from common.phases import Exchange
from common.precision import broadcast
from common.wire import Request
from server.progress import Progress
from server.registry import Registry
from server.runs import RunFolder

_log = logging.getLogger("fedtide.server")

_ATTEMPT = 1
"""Of every round: a site that gave a reservation up is not asked to pay again."""


def nonce_of(registry: Registry, run: str, number: int, key_id: str) -> str:
    """A site's nonce in a round, hex."""
    return registry.derived("nonce", run, str(number), str(_ATTEMPT), key_id)[:16].hex()


def requests_of(
    plan: Plan,
    run: RunFolder,
    exchange: Exchange,
    progress: Progress,
    nodes: list[int],
    registry: Registry,
    names: Mapping[int, str],
) -> dict[int, Request]:
    """Node -> what its site is asked; a node that is no enrolled site's is asked nothing.

    Where the plan asks a part of the sites, the server's key chooses them once for each round; it is no part of any
    promise.

    Args:
        names: node -> its site, as enrolled; of others the registry says who answered from them before.
    """
    asked, most = run.asked(exchange.round), plan.server.sites_per_round
    known = known_sites(registry, names)
    out = {site.key_id for site in registry.sites() if site.shut_out}
    if asked and (most is not None or not nodes):  # those asked before a crash; who is away by now is missing
        sites = {
            node: key_id for node, key_id in _one_each(sorted(known), known).items() if key_id in asked - out
        }
    else:
        sites = _one_each(nodes, known)
    if not asked and most is not None and most < len(sites):
        lots = {
            node: registry.derived("lot", run.name, str(exchange.round), key_id)
            for node, key_id in sites.items()
        }
        sites = {node: sites[node] for node in sorted(sorted(sites, key=lots.__getitem__)[:most])}
    if not set(sites.values()) <= asked:
        run.save_asked(exchange.round, asked | set(sites.values()))
    plan_text = plan.model_dump_json()
    statistics = exchange.phase.content == "statistics"
    state = {} if statistics else broadcast(progress.state, plan.wire.parameters)
    requests = {}
    for node, key_id in sites.items():
        anchor = registry.last_anchor(key_id)
        requests[node] = Request(
            run=run.name,
            round=exchange.round,
            attempt=_ATTEMPT,
            nonce=nonce_of(registry, run.name, exchange.round, key_id),
            plan=plan_text,
            state=state,
            anchor=None if anchor is None else anchor.to_bytes(),
            phase=exchange.phase,
            released=progress.released,
            site=key_id,
        )
    return requests


def known_sites(registry: Registry, names: Mapping[int, str]) -> dict[int, str]:
    """Node -> the ledger key of its site."""
    enrolled = {site.name: site.key_id for site in registry.sites()}
    before = {node: site.key_id for node, site in registry.sites_by_node().items() if node not in names}
    return before | {node: enrolled[name] for node, name in names.items() if name in enrolled}


def _one_each(nodes: Sequence[int], known: Mapping[int, str]) -> dict[int, str]:
    """Of these nodes those with a site, one for each site."""
    found: dict[int, str] = {}
    taken: set[str] = set()
    for node in nodes:
        key_id = known.get(node)
        if key_id is None or key_id in taken:
            _log.warning(
                "node %d is asked nothing: it is no enrolled site's, or another one is its site's", node
            )
            continue
        found[node] = key_id
        taken.add(key_id)
    return found
