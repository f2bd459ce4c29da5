"""What a finished simulation found, and the names of the recommenders that it compares."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import Plan
from server.runs import RunFolder
from simulations.privacy_record import PrivacyRecord
from simulations.quality import Quality
from simulations.sites import SimulatedSite

FEDTIDE = "Fedtide"
"""The private model's row in tables."""

CONTENT, POPULARITY, OPEN = "content only", "popularity", "no privacy"


@dataclass(frozen=True)
class Outcome:
    """What a finished simulation found.

    Attributes:
        run: its folder, finished.
        validation, epsilons: quality and PLD epsilon after each exchange, from the start.
        test: name -> quality, looked at once, at the end.
        privacy: events and epsilons of every site.
    """

    run: RunFolder
    plan: Plan
    sites: list[SimulatedSite]
    validation: list[Quality]
    epsilons: list[float]
    baselines_validation: dict[str, Quality]
    test: dict[str, Quality]
    privacy: PrivacyRecord
    bytes_down: int
    bytes_up: int
    seconds: float
    notes: tuple[str, ...]
