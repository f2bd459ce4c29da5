"""A run's privacy in one record: every event of every site, and the epsilons recomputed from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.config import Plan
from common.privacy.accountants import PublishedEpsilon, epsilon_pld, published_epsilon
from common.privacy.entries import Burnt, Release, Reserve
from common.privacy.mechanisms import Event, event_from_fields, event_to_fields
from common.privacy.spending import Spending
from server.registry import RegistryReader
from server.runs import RunFolder


@dataclass(frozen=True)
class SiteEvent:
    """One charge of this run at a site, and what became of it: "released", "burnt" or "open"."""

    round: int
    attempt: int
    event: Event
    outcome: str


@dataclass(frozen=True)
class SitePrivacy:
    """A site's promise and what this run took of it.

    Attributes:
        published: PLD epsilon of this run's events, with its cross-checks.
        budget_epsilon, delta, order: the ledger's guarantee, whatever happens next.
        budget_share: of the ledger's Renyi budget, spent by all runs so far.
        over_all_runs: what all charges of the ledger come to, this run's and others', as far as receipts told: until
            its entry `seen_until_entry`.
    """

    site: str
    events: tuple[SiteEvent, ...]
    published: PublishedEpsilon
    budget_epsilon: float
    delta: float
    order: int
    budget_share: float
    over_all_runs: Spending
    seen_until_entry: int


@dataclass(frozen=True)
class PrivacyRecord:
    """All sites of a run."""

    sites: tuple[SitePrivacy, ...]

    @property
    def epsilon(self) -> float:
        """The largest epsilon of any site's users in this run; one person at k sites composes over the k."""
        return max((site.published.epsilon for site in self.sites), default=0.0)

    @property
    def budget_epsilon(self) -> float:
        """The largest lifetime guarantee among the sites."""
        return max((site.budget_epsilon for site in self.sites), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """Everything needed to recompute, and nothing about a user."""
        return {
            "unit": "user",
            "adjacency": "add or remove one user of one site",
            "model": "site-level DP: central at each site, with the site as curator",
            "counts": "this run; budget_share and over_all_runs: all runs in a site's ledger, as far as receipts tell",
            "epsilon": self.epsilon,
            "sites": [
                {
                    "site": site.site,
                    "delta": site.delta,
                    "epsilon_pld": site.published.epsilon,
                    "epsilon_rdp": site.published.rdp,
                    "epsilon_prv": site.published.prv,
                    "epsilon_closed_form": site.published.closed_form,
                    "budget_epsilon": site.budget_epsilon,
                    "renyi_order": site.order,
                    "budget_share": site.budget_share,
                    "over_all_runs": {
                        **site.over_all_runs.as_json(),
                        "seen_until_entry": site.seen_until_entry,
                    },
                    "events": [
                        {
                            "round": each.round,
                            "attempt": each.attempt,
                            "outcome": each.outcome,
                            **event_to_fields(each.event),
                        }
                        for each in site.events
                    ],
                }
                for site in self.sites
            ],
        }


def privacy_record(
    run: RunFolder,
    plan: Plan,
    registry: RegistryReader,
    on_sites: Callable[[int, int], None] = lambda done, of: None,
) -> PrivacyRecord:
    """From the chains that the server verified: charges count from their reservation, released or not.

    Args:
        on_sites: told of how many sites it is made, and of how many it is to be.
    """
    found = []
    cache: dict[tuple[Event, ...], PublishedEpsilon] = {}
    enrolled = registry.sites()
    for done, site in enumerate(enrolled):
        on_sites(done, len(enrolled))
        chain = registry.chain(site.key_id)
        events = []
        for reservation in chain.reservations.values():
            body = reservation.body
            if not isinstance(body, Reserve) or body.run != run.name:
                continue
            end = chain.outcomes.get(reservation.hash)
            outcome = {Release: "released", Burnt: "burnt"}.get(type(end.body), "open") if end else "open"
            events.append(SiteEvent(body.round, body.attempt, body.event, outcome))
        if not events:
            continue
        charged = tuple(each.event for each in events)
        if charged not in cache:
            cache[charged] = published_epsilon(charged, chain.genesis.delta)
        found.append(
            SitePrivacy(
                site=site.name,
                events=tuple(events),
                published=cache[charged],
                budget_epsilon=chain.genesis.epsilon,
                delta=chain.genesis.delta,
                order=chain.genesis.order,
                budget_share=chain.filter.spent / chain.filter.cap,
                over_all_runs=chain.spending(),
                seen_until_entry=chain.head.seq,
            )
        )
    return PrivacyRecord(sites=tuple(found))


class Releases:
    """What a run's sites were seen to release, round by round, and what that comes to.

    Charges without a release come to light later, and are in `privacy_record`.
    """

    def __init__(self) -> None:
        self._events: defaultdict[str, list[Event]] = defaultdict(list)
        self._delta = 0.0

    def add(self, lines: Iterable[Mapping[str, Any]]) -> float:
        """PLD epsilon at the site that released most so far.

        Args:
            lines: of receipts.jsonl, of one round.
        """
        for line in lines:
            self._events[str(line["key_id"])].append(event_from_fields(line["event"]))
            self._delta = float(line["delta"])
        different = {tuple(each) for each in self._events.values()}
        return max((epsilon_pld(each, self._delta) for each in different), default=0.0)
