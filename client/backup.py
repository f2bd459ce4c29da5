"""A copy of a site's folder that is right at its moment, whether or not the site is up.

The high-water mark is copied before the ledger's database, which SQLite copies itself: so the copy's database is never
behind its mark, which a ledger refuses for good. The frozen layers' states are left out: they are made again.
"""

from __future__ import annotations

from pathlib import Path

from client.ledger import Ledger
from client.ledger_errors import MarkLostError
from client.lower_states import LOWER_STATES
from client.private_files import check_private
from client.site_folder import Site
from common.backup import copy_database, copy_file, copy_files, new_copy

_LOCKS = ("up.lock",)


def back_up_site(folder: Path, target: Path) -> int:
    """Copies a site's folder and verifies the copy's ledger. Put in the folder's place before the site released more,
    it is the site; an older one is refused (docs/site.md).

    Returns:
        The number of the ledger's newest entry in the copy.

    Raises:
        BackupError: the target exists, or the copy cannot be made.
        SiteError, LedgerError, ReceiptError: the site is not in order.
    """
    folder = folder.expanduser().resolve()
    site = Site.load(folder)
    Ledger.check_files(site.ledger_folder)
    database, key, mark = (site.ledger_folder / name for name in Ledger.FILES)
    if not mark.exists():
        raise MarkLostError(
            f"{mark} is not there, and a copy without it is no copy of the ledger: `fedtide site verify {folder}` says "
            "what to do"
        )
    with new_copy(folder, target) as partial:
        left_out = {site.ledger_folder, folder / LOWER_STATES, *(folder / name for name in _LOCKS)}
        copy_files(folder, partial, lambda path: path in left_out)
        ledger = partial / site.ledger_folder.name
        ledger.mkdir(mode=0o700)
        (ledger / "presences").mkdir(mode=0o700)
        for file in (mark, key):
            copy_file(file, ledger / file.name)
        copy_database(database, ledger / database.name)
        check_private(partial)
        with Ledger.open(ledger) as opened:
            return opened.verify().seq
