"""Epsilon of each site's charges in a run, recomputed by every accountant and held against what was printed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.config import Plan
from common.privacy.accountants import (
    ContradictionError,
    epsilon_pld,
    epsilon_rdp_google,
    published_epsilon,
)
from common.privacy.chain import Chain
from common.privacy.entries import Burnt, Release, Reserve
from common.privacy.mechanisms import Event, event_to_fields
from server.runs import RunFolder
from simulations.audit.findings import TOLERANCE, Figures, Findings, SiteFinding

_ROUNDING = 1e-6
"""Of an epsilon: what a calibration may be off by."""

_OUTCOMES: dict[type[object], str] = {Release: "released", Burnt: "burnt"}


@dataclass(frozen=True, slots=True)
class Charge:
    """One reservation of the run; `late` if the server learned of it after the run had ended."""

    reserve: Reserve
    outcome: str
    late: bool

    def key(self) -> tuple[object, ...]:
        """What privacy.json must say of it, but for what may have become of it since."""
        return (
            self.reserve.round,
            self.reserve.attempt,
            *sorted(event_to_fields(self.reserve.event).items()),
        )


def charges_of(chain: Chain, run: str, seen: int) -> list[Charge]:
    """A run's charges in a chain, in order; those after entry `seen` came to light later."""
    found = []
    for entry in chain.reservations.values():
        if isinstance(body := entry.body, Reserve) and body.run == run:
            end = chain.outcomes.get(entry.hash)
            outcome = "open" if end is None else _OUTCOMES[type(end.body)]
            found.append(Charge(body, outcome, entry.seq > seen))
    return found


@lru_cache(maxsize=256)
def figures_of(events: tuple[Event, ...], delta: float) -> Figures:
    """Every accountant's figure.

    Raises:
        ContradictionError: they contradict one another.
    """
    published = published_epsilon(events, delta)
    return Figures(
        pld=published.epsilon,
        prv=published.prv,
        rdp=published.rdp,
        rdp_google=epsilon_rdp_google(events, delta),
        closed_form=published.closed_form,
    )


def check_epsilons(
    run: RunFolder, plan: Plan, chains: Mapping[str, Chain], seen: Mapping[str, int], findings: Findings
) -> None:
    """Recomputes and compares with what was printed, and with what the plan promised. Notes lies; raises nothing.

    Args:
        chains: key id -> verified chain.
        seen: key id -> the last sequence number that the server had when the run ended.
    """
    printed = _printed(run, findings)
    claimed = 0.0
    for site in findings.sites:
        said = None if printed is None else printed.pop(site.site, None)
        if isinstance(said, dict) and isinstance(said.get("epsilon_pld"), int | float):
            site.printed = float(said["epsilon_pld"])
            claimed = max(claimed, site.printed)
        if site.key_id in chains:
            chain = chains[site.key_id]
            charges = charges_of(chain, findings.run, seen.get(site.key_id, -1))
            _check_site(site, chain, charges, said, printed is not None, findings)
            _check_promise(site, [charge.reserve.event for charge in charges], plan, findings)
    for name in printed or {}:
        if name:
            findings.lie("privacy.json", "unknown_site", f"it tells of {name}, which is not enrolled")
    if printed is not None and abs(printed[""] - claimed) > TOLERANCE:
        findings.lie(
            "privacy.json",
            "wrong_epsilon",
            f"it says epsilon {printed['']:.6g}, but the largest of its sites is {claimed:.6g}",
        )


def _printed(run: RunFolder, findings: Findings) -> dict[str, Any] | None:
    """Site -> what privacy.json says of it; "" -> the whole run's epsilon. None where nothing was claimed."""
    file = run.path / "privacy.json"
    if not file.is_file():
        if run.is_whole:
            findings.lie("privacy.json", "missing", "the run ended well, but says nothing of its epsilon")
        return None
    try:
        said = json.loads(file.read_bytes())
        return {"": float(said["epsilon"]), **{str(each["site"]): each for each in said["sites"]}}
    except (ValueError, KeyError, TypeError) as error:
        findings.lie("privacy.json", "malformed", f"it cannot be read ({type(error).__name__})")
        return None


def _check_site(
    site: SiteFinding,
    chain: Chain,
    charges: list[Charge],
    said: object,
    claims: bool,
    findings: Findings,
) -> None:
    outcomes = Counter(charge.outcome for charge in charges)
    site.charges, site.late = len(charges), sum(charge.late for charge in charges)
    site.released, site.burnt, site.open = (outcomes[each] for each in ("released", "burnt", "open"))
    delta = chain.genesis.delta
    if charges:
        try:
            site.figures = figures_of(tuple(charge.reserve.event for charge in charges), delta)
        except ContradictionError as error:
            findings.lie(f"site {site.site}", "contradiction", str(error), site.site)
    if site.late:
        findings.notes.append(
            f"{site.site}: {site.late} charges of this run came to light after it had ended; the figures here "
            "count them"
        )
    if not claims:
        return
    if not isinstance(said, dict):
        if len(charges) > site.late:
            findings.lie(
                "privacy.json", "missing_site", f"{site.site} was charged, but is not in it", site.site
            )
        return
    try:
        _compare(site, chain, charges, said, findings)
    except (KeyError, TypeError, ValueError) as error:
        findings.lie("privacy.json", "malformed", f"{site.site}: {type(error).__name__}", site.site)


def _check_promise(site: SiteFinding, events: Sequence[Event], plan: Plan, findings: Findings) -> None:
    """A record may be sound, and its epsilon yet be above what the plan promised: burnt rounds, other noise."""
    promise = plan.privacy
    if not events or site.figures is None:
        return
    spent = site.figures.pld if promise.delta == site.delta else epsilon_pld(events, promise.delta)
    if spent > promise.epsilon + _ROUNDING:
        burnt = f", {site.burnt} that burnt included" if site.burnt else ""
        findings.lie(
            f"site {site.site}",
            "over_promise",
            f"its charges{burnt} come to epsilon {spent:.4f} at delta {promise.delta:g}, but the plan promised "
            f"{promise.epsilon:g}; the site's own cap is {site.epsilon:g}",
            site.site,
        )


def _compare(
    site: SiteFinding, chain: Chain, charges: list[Charge], said: dict[str, Any], findings: Findings
) -> None:
    listed = Counter(_listed(each) for each in said["events"])
    known = Counter(charge.key() for charge in charges if not charge.late)
    every = Counter(charge.key() for charge in charges)
    if known - listed or listed - every:
        findings.lie(
            "privacy.json",
            "wrong_events",
            f"{site.site}: it lists {listed.total()} charges, but the chain holds {known.total()} of this run, "
            "and they are not the same",
            site.site,
        )
        return
    _check_all_runs(site, chain, known, said.get("over_all_runs"), findings)
    genesis = chain.genesis
    promised = (float(said["delta"]), float(said["budget_epsilon"]), int(said["renyi_order"]))
    if promised != (genesis.delta, genesis.epsilon, genesis.order):
        findings.lie(
            "privacy.json",
            "wrong_promise",
            f"{site.site}: delta, budget or order are not the ledger's",
            site.site,
        )
    events = tuple(charge.reserve.event for charge in charges if listed[charge.key()])
    try:
        figures = figures_of(events, genesis.delta)
    except ContradictionError:
        return  # told above
    pairs = {
        "epsilon_pld": figures.pld,
        "epsilon_rdp": figures.rdp,
        "epsilon_prv": figures.prv,
        "epsilon_closed_form": figures.closed_form,
    }
    for name, truth in pairs.items():
        value = said[name]
        if (value is None) != (truth is None) or (
            value is not None and truth is not None and not abs(float(value) - truth) <= TOLERANCE
        ):
            findings.lie(
                "privacy.json",
                "wrong_epsilon",
                f"{site.site}: it says {name} {value}, but the charges come to {truth}",
                site.site,
            )


def _check_all_runs(
    site: SiteFinding,
    chain: Chain,
    here: Counter[tuple[object, ...]],
    said: dict[str, Any] | None,
    findings: Findings,
) -> None:
    """What was printed of the ledger's whole spending, against the ledger as far as it was seen then."""
    if said is None:  # a run of before this was printed
        return
    until = int(said["seen_until_entry"])
    truth = chain.spending(until)
    if not max(here.total(), 1) <= truth.charges or until >= len(chain.entries):
        findings.lie(
            "privacy.json",
            "wrong_epsilon",
            f"{site.site}: over all runs it counts until entry {until}, where the ledger, of {len(chain.entries)} "
            f"entries, holds {truth.charges} charges; {here.total()} are of this run alone",
            site.site,
        )
    pairs = (
        ("epsilon_pld", truth.epsilon),
        ("epsilon_filter", truth.by_filter),
        ("best_guess_right", truth.right),
        ("runs", truth.runs),
        ("charges", truth.charges),
    )
    for name, known in pairs:
        value = said[name]
        if (value is None) != (known is None) or (
            known is not None and not abs(float(value) - known) <= TOLERANCE
        ):
            findings.lie(
                "privacy.json",
                "wrong_epsilon",
                f"{site.site}: over all runs, until entry {until}, it says {name} {value}, but its ledger comes to "
                f"{known}",
                site.site,
            )


def _listed(each: dict[str, Any]) -> tuple[object, ...]:
    event = {name: value for name, value in each.items() if name not in ("round", "attempt", "outcome")}
    return (int(each["round"]), int(each["attempt"]), *sorted(event.items()))
