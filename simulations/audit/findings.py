"""What an audit finds: lies, notes, and for each site what its verified chain comes to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

TOLERANCE = 1e-3
"""How far a printed epsilon may lie from the recomputed one."""


@dataclass(frozen=True, slots=True)
class Lie:
    """Something that does not hold.

    Attributes:
        place: file, line, site or round where it stands.
        reason: one word; a fault's of `privacy/faults.py`, or one of the audit's own.
        explanation: one line.
    """

    place: str
    reason: str
    explanation: str


@dataclass(frozen=True, slots=True)
class Figures:
    """Epsilon of one site's charges in a run, by every accountant; None where one has nothing to say."""

    pld: float
    prv: float | None
    rdp: float
    rdp_google: float
    closed_form: float | None


@dataclass(slots=True)
class SiteFinding:
    """One site in the run, from its verified chain.

    Attributes:
        charges, released, burnt, open: reservations of this run, and what became of them.
        receipts: how many of its receipts were admitted and verify.
        late: charges of this run that the server learned of after the run had ended.
        figures: over all charges of this run.
        printed: the PLD epsilon that the run printed, or None.
        share: of the Renyi budget, spent by all runs.
    """

    site: str
    key_id: str
    barred: bool = False
    epsilon: float = 0.0
    delta: float = 0.0
    order: int = 0
    entries: int = 0
    anchors: int = 0
    charges: int = 0
    released: int = 0
    burnt: int = 0
    open: int = 0
    receipts: int = 0
    late: int = 0
    figures: Figures | None = None
    printed: float | None = None
    share: float = 0.0
    lies: int = 0


@dataclass(slots=True)
class Findings:
    """All of it."""

    run: str
    rounds: int = 0
    sites: list[SiteFinding] = field(default_factory=list)
    lies: list[Lie] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    server_key: str | None = None

    def lie(self, place: str, reason: str, explanation: str, site: str | None = None) -> None:
        """Notes a lie, and counts it for a site."""
        self.lies.append(Lie(place, reason, explanation))
        for each in self.sites:
            each.lies += each.site == site

    @property
    def epsilon(self) -> float | None:
        """The largest recomputed PLD epsilon of any site in this run."""
        found = [site.figures.pld for site in self.sites if site.figures is not None]
        return max(found, default=None)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "run": self.run,
            "verified": not self.lies,
            "rounds": self.rounds,
            "epsilon": self.epsilon,
            "server_key": self.server_key,
            "lies": [asdict(lie) for lie in self.lies],
            "notes": self.notes,
            "sites": [asdict(site) for site in self.sites],
        }
