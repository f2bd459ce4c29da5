"""What a ledger refuses for reasons of its own; faults of entries and chains are in `privacy/faults.py`."""

from __future__ import annotations

from typing import ClassVar

RESTORE = (
    "put the newest copy of the site's folder back (docs/site.md, Backup); a new ledger for the same users would be a "
    "new budget, which breaks what they were promised"
)
"""The one way out where a ledger is lost."""


class LedgerError(Exception):
    """The ledger cannot do what was asked. `reason` is the machine name."""

    reason: ClassVar[str] = "ledger"


class BudgetRefusedError(LedgerError):
    """The charge does not fit under the cap. Nothing was written."""

    reason = "budget_refused"


class LedgerExistsError(LedgerError):
    """There is something in that folder already: a budget is not reset by making a new ledger over it."""

    reason = "ledger_exists"


class LedgerMissingError(LedgerError):
    """There is no ledger in that folder, or not all of it."""

    reason = "ledger_missing"


class ForeignProcessError(LedgerError):
    """The ledger was opened by another process: after a fork, open it again."""

    reason = "foreign_process"


class LedgerDamagedError(LedgerError):
    """The database contradicts its own signed entries."""

    reason = "ledger_damaged"


class LedgerBehindError(LedgerError):
    """The database lacks entries that it once held: its journal was lost, or an old copy put back."""

    reason = "ledger_behind"


class MarkLostError(LedgerError):
    """The high-water mark is not there, cannot be read, or is another ledger's."""

    reason = "mark_lost"


class LedgerVersionError(LedgerError):
    """The database was made by a version that this program does not know."""

    reason = "ledger_version"


class LedgerDiskError(LedgerError):
    """The disk is full or fails: the ledger cannot be opened or written, and what was not committed is not there."""

    reason = "ledger_disk"


class LedgerBusyError(LedgerError):
    """Another process held the ledger for longer than we wait."""

    reason = "ledger_busy"
