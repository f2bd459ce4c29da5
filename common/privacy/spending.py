"""What a ledger's charges come to so far, over all runs, in epsilon: by the PLD, and by the ledger's own filter.

Two figures, as they hold for different things. The PLD's is the tightest, and proven for charges fixed in advance. The
filter's is for charges chosen on the way, up to an amount that was fixed in advance: a filter is valid for its cap, and
reading what happens to be spent so far as a bound takes that proviso (Rogers et al. 2016, arXiv 1605.08294, tell
filters from odometers; Lecuyer 2021, arXiv 2103.01379, for Renyi divergence). The cap holds in any case. Charges count
from their reservation, burnt and open ones included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.privacy.accountants import (
    ContradictionError,
    PublishedEpsilon,
    accounting_work,
    published_epsilon,
)
from common.privacy.entries import Genesis, Reserve
from common.privacy.mechanisms import Event
from common.privacy.odds import Odds, odds, right_at_most
from common.privacy.renyi import NANO, renyi_to_epsilon

MOST_MECHANISMS = 300
"""Different sampled mechanisms up to which the PLD is asked: it takes seconds then."""


MEANING = (
    "The PLD's figure is for charges fixed in advance; the filter's is for charges chosen on the way, up to an amount "
    "fixed in advance. What holds in any case is the cap."
)


SHARES = "Shares are of the filter's budget of Renyi divergence, and are no shares of epsilon."


def up_to(epsilon: float) -> str:
    """A bound with three decimals, rounded up."""
    return f"{math.ceil(round(epsilon * 1000, 6)) / 1000:.3f}"


@dataclass(frozen=True, slots=True)
class Spending:
    """A ledger's spending, at its own delta.

    Attributes:
        epsilon: by the PLD, confirmed by the other accountants; None where it was refused, or would take too long.
        by_filter: the epsilon that the filter's charges imply at its one order; 0 where nothing was charged.
        rdp, prv: Opacus' figures beside the PLD's; None where they were not asked.
        cap, delta, order: of the ledger's genesis.
        share: of the filter's budget, spent.
        charges, runs: how many.
        odds: what the whole privacy curve leaves to a guesser; None where there is no PLD figure, or no charge.
        note: why a figure is missing; empty otherwise.
    """

    epsilon: float | None
    by_filter: float
    rdp: float | None
    prv: float | None
    cap: float
    delta: float
    order: int
    share: float
    charges: int
    runs: int
    odds: Odds | None = None
    note: str = ""

    @property
    def right(self) -> float:
        """How often the best guess, in or out at even odds, is right at most: 0.5 is a coin."""
        if not self.charges:
            return 0.5
        return self.odds.right if self.odds is not None else right_at_most(self.by_filter, self.delta)

    @property
    def figures(self) -> str:
        """Both figures beside the cap, in a few words."""
        by_pld = "no figure" if self.epsilon is None else up_to(self.epsilon)
        return f"{by_pld} by the PLD, {up_to(self.by_filter)} by the filter, of {self.cap:g}"

    def sentences(self) -> list[str]:
        """What was spent, for a person at a terminal."""
        if not self.charges:
            return [
                f"Epsilon spent so far: 0 of {self.cap:g} (delta {self.delta:g}): nothing was charged yet."
            ]
        runs = "1 run" if self.runs == 1 else f"all {self.runs} runs"
        said = [
            f"Epsilon spent so far, over {runs}, burnt and open charges included: {self.figures} "
            f"(delta {self.delta:g}; {self.share:.1%} of the filter's budget). {SHARES} {MEANING}"
        ]
        return [*said, f"Note: {self.note}."] if self.note else said

    def as_json(self) -> dict[str, Any]:
        """For scripts; None where there is no figure."""
        return {
            "epsilon_pld": self.epsilon,
            "epsilon_filter": self.by_filter,
            "epsilon_rdp": self.rdp,
            "epsilon_prv": self.prv,
            "epsilon_cap": self.cap,
            "delta": self.delta,
            "share": self.share,
            "charges": self.charges,
            "runs": self.runs,
            "best_guess_right": self.right,
            "note": self.note,
        }


def spending(genesis: Genesis, reserves: Sequence[Reserve], spent: int) -> Spending:
    """What these charges come to.

    Args:
        genesis: of the ledger.
        reserves: every reservation in it, whatever became of it.
        spent: nano-units that the ledger's filter counts as spent.

    Raises:
        ContradictionError: the charges do not add up to what the filter counts: some are missing.
    """
    charged = sum(reserve.charge for reserve in reserves)
    if charged != spent:
        raise ContradictionError(
            f"the charges come to {charged} nano-units, but the ledger counts {spent}: no epsilon is computed from a "
            "part of a ledger"
        )
    bound = renyi_to_epsilon(spent / NANO, genesis.delta, genesis.order) if spent else 0.0
    by_filter = min(bound, genesis.epsilon)  # the cap was rounded down, so it is only ever above by rounding
    events = Counter(reserve.event for reserve in reserves)
    found, guess, note = _by_pld(tuple(sorted(events.items(), key=repr)), genesis.delta)
    if found is not None and found.epsilon > by_filter:
        found, guess = None, None
        note = "the PLD's figure is above the filter's, which cannot be: none is shown"
    return Spending(
        epsilon=None if found is None else found.epsilon,
        by_filter=by_filter,
        rdp=None if found is None else found.rdp,
        prv=None if found is None else found.prv,
        cap=genesis.epsilon,
        delta=genesis.delta,
        order=genesis.order,
        share=spent / genesis.cap,
        charges=len(reserves),
        runs=len({reserve.run for reserve in reserves}),
        odds=guess,
        note=note,
    )


@lru_cache(maxsize=1024)
def _by_pld(
    events: tuple[tuple[Event, int], ...], delta: float
) -> tuple[PublishedEpsilon | None, Odds | None, str]:
    """The figure and the odds, or why there are none. Equal mechanisms are composed once, whatever their number."""
    every = [event for event, times in events for _ in range(times)]
    if (work := accounting_work(every)) > MOST_MECHANISMS:
        return (
            None,
            None,
            f"{work} different mechanisms: the PLD would take minutes, so the filter's figure stands alone",
        )
    try:
        published = published_epsilon(every, delta)
    except ContradictionError as error:
        return None, None, f"the accountants refuse a figure, so the filter's figure stands alone: {error}"
    note = ""
    if published.prv is None and work:
        note = "confirmed by RDP alone: PRV is not asked where it is slow or not reliable"
    return published, odds(every) if every else None, note
