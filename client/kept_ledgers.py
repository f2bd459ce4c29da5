"""Ledgers that a worker of a simulation keeps open between rounds: opening and closing one takes longer than a charge.

A site of an organisation opens its ledger for each request, and so does every process that did not ask for this
(`keep_open`). What is read and written is the same; other processes may have the same ledger open.
"""

from __future__ import annotations

import os
import sqlite3
from collections import OrderedDict
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path

from client.ledger import Ledger
from client.ledger_errors import LedgerError
from common.privacy.faults import ReceiptError

MOST = 128
"""Each takes three or four of the files that a process may have open, of which there are often 1,024."""

_most = 0
_kept: OrderedDict[Path, tuple[Ledger, object]] = OrderedDict()


def keep_open(most: int = MOST) -> None:
    """From now on so many ledgers of this process stay open, those used last; they are closed when it ends."""
    global _most  # noqa: PLW0603
    if not _most:
        Finalize(None, close_all, exitpriority=10)
    _most = most


def opened(folder: Path) -> Ledger:
    """The ledger in a folder, kept or opened; its head and high-water mark are verified either way.

    Raises:
        What `Ledger.open` raises: also where the folder, or a file of it, was replaced or written over meanwhile.
    """
    ledger, known = _kept.pop(folder, (None, None))
    if ledger is not None:
        with suppress(LedgerError, ReceiptError, sqlite3.Error):  # opened anew, it says what is wrong
            if known == _known(folder):
                ledger.check_head()
                ledger.check_mark()
                return ledger
        ledger.disconnect()
    return Ledger.open(folder)


def leave(folder: Path, ledger: Ledger) -> None:
    """Puts a ledger without an open reservation away, for the next time; what is too many is closed."""
    _kept[folder] = (ledger, _known(folder))
    while len(_kept) > _most:
        _kept.popitem(last=False)[1][0].disconnect()


def close_all() -> None:
    """Closes what is kept."""
    while _kept:
        _kept.popitem()[1][0].disconnect()


def _known(folder: Path) -> object:
    """What is another where another ledger stands in the folder, or others may read it. None: it is not there."""
    try:
        facts = [os.stat(path) for path in (folder, *(folder / name for name in Ledger.FILES))]
    except OSError:
        return None
    return [(each.st_dev, each.st_ino, each.st_mode, each.st_uid) for each in facts]
