"""What a finished simulation found, and the names of the recommenders that it compares."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import Plan
from server.privacy_record import PrivacyRecord
from server.runs import RunFolder
from simulations.quality import Quality
from simulations.sites import SimulatedSite
from simulations.splits import Part

FEDTIDE = "Fedtide"
"""The private model's row in tables."""

CONTENT, POPULARITY, OPEN = "content only", "popularity", "no privacy"


@dataclass(frozen=True)
class Outcome:
    """What a finished simulation found.

    Attributes:
        run: its folder, finished.
        validation, epsilons: quality and PLD epsilon after each exchange, from the start.
        final_validation: name -> quality at the end.
        test: name -> quality, looked at once, at the end; empty where it was not looked at.
        open_settings: how many settings of its statistics the recipe without privacy was the best of; 0 for none.
        split: which events were held out, in words.
        public: whether the data are, so that exact figures of them tell nothing new.
        privacy: events and epsilons of every site.
    """

    run: RunFolder
    plan: Plan
    sites: list[SimulatedSite]
    validation: list[Quality]
    epsilons: list[float]
    baselines_validation: dict[str, Quality]
    final_validation: dict[str, Quality]
    test: dict[str, Quality]
    open_settings: int
    split: str
    public: bool
    privacy: PrivacyRecord
    bytes_down: int
    bytes_up: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def part(self) -> Part:
        """What the results are of: the test split, or the validation where nobody looked at the test."""
        return "test" if self.test else "validation"

    @property
    def results(self) -> dict[str, Quality]:
        """name -> quality at the end, of `part`."""
        return self.test or self.final_validation
