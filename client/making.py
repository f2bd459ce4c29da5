"""Makes a site: a private folder with a secret, cleaned histories, the catalog, the ledger and `site.json`.

Whole or not at all. What a site does afterwards is in `site.py`; what an administrator types, in `cli.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client.connection import NODE_KEY, Connection, new_node_key, public_line, write_connection
from client.ledger import Ledger
from client.policy import Limits, Performance
from client.private_files import FOLDER_MODE, sync_folder
from client.site_folder import SECRET, Site, SiteError
from client.sources import Sources
from client.units import UNITS, write_units
from common.assets import DEFAULT_LANGUAGE_MODEL
from common.events.catalog import read_catalog
from common.events.cleaning import CleaningPolicy, CleaningReport, Progress, clean_to
from common.events.deidentify import load_secret, new_secret
from common.events.histories import Histories
from common.events.readers import scan_log
from common.invitation import Invitation
from common.privacy.accountants import check_promise
from common.privacy.enrolment import enrolment_to_bytes
from common.privacy.mechanisms import Event

CATALOG, ENROLMENT, CERTIFICATE = "catalog.jsonl", "enrolment.json", "closing.json"
_PIECE = 1 << 20


@dataclass(frozen=True)
class MadeSite:
    """A new site, and what its administrator is to see. The report is for the site's eyes only.

    Attributes:
        notes: what is to be said of the files that were read, a line each.
    """

    site: Site
    key_id: str
    report: CleaningReport
    node_key: str | None = None
    notes: tuple[str, ...] = ()


def make_site(
    folder: Path,
    sources: Sources,
    *,
    epsilon: float,
    delta: float,
    users_at_least: int,
    typical_plan: Sequence[Event],
    name: str = "",
    families: tuple[str, ...] = ("recommend",),
    policy: CleaningPolicy | None = None,
    metrics: bool = False,
    language_models: Mapping[str, str] | None = None,
    performance: Performance | None = None,
    invitation: Invitation | None = None,
    progress: Progress | None = None,
) -> MadeSite:
    """A new site in a folder that does not exist yet or is empty.

    Args:
        epsilon, delta: the guarantee for all that will ever be released from this data.
        users_at_least: the public lower bound of users that the site agrees to.
        typical_plan: events of one typical run; the ledger's order is chosen by them.
        name: for the site's own logs; the folder's where empty.
        policy: how the log is cleaned.
        metrics: whether noisy metrics may be released.
        language_models: that a plan may name, beside the default one: name -> the site's own folder.
        performance: how it computes; None: as by default.
        invitation: the server's; None for a site without a connection.
        progress: told how far the log is read and bound, which may take long.

    Raises:
        SiteError: the folder holds something, or there are too few users.
        LogError, SecretError, LedgerError, ValueError: what was given is wrong.
    """
    folder = folder.expanduser().resolve()
    check_budget(epsilon, delta, users_at_least)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SiteError(f"{folder} is not empty: give a new folder, as a site's budget does not reset")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(mode=FOLDER_MODE)
    try:
        node_key = None
        if invitation is not None:
            write_connection(partial, invitation)
            node_key = new_node_key(partial)
        secret = new_secret(partial / SECRET)
        notes: list[str] = []
        catalog = read_catalog(
            sources.catalog,
            sources.catalog_format,
            sources.catalog_columns,
            sources.catalog_layout,
            say=notes.append,
        )
        log = scan_log(
            sources.logs,
            sources.format,
            sources.columns,
            sources.layout,
            partial,
            time_format=sources.time_format,
            sure=sources.sure,
        )
        notes += log.notes
        histories, report = clean_to(
            partial / "histories", log, catalog, policy or CleaningPolicy(), secret, progress
        )
        if len(histories) < users_at_least:
            raise SiteError(
                f"the cleaned log has {len(histories)} users, but --users-at-least is {users_at_least}: "
                "promise fewer, as sums are divided by that public number"
            )
        catalog.save(partial / CATALOG)
        sources.save(partial)
        site = Site(
            folder=partial,
            name=name or folder.name,
            catalog=partial / CATALOG,
            users_at_least=users_at_least,
            families=families,
            metrics=metrics,
            limits=Limits(
                language_models={DEFAULT_LANGUAGE_MODEL.name: "", **(language_models or {})},
                epsilon=min(epsilon, 100.0),
                delta=delta,
            ),
            performance=performance or Performance(),
        )
        site.save()
        with Ledger.create(
            site.ledger_folder,
            epsilon=epsilon,
            delta=delta,
            typical_plan=typical_plan,
            dataset_commitment=commitment(histories, secret, progress),
        ) as ledger:
            (partial / ENROLMENT).write_bytes(enrolment_to_bytes(ledger.entries()[0], node_key) + b"\n")
            key_id = ledger.key_id
        if node_key is not None:
            write_units(partial, folder)
        sync_folder(partial)
        if folder.exists():
            folder.rmdir()  # empty, as was seen above
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return MadeSite(
        replace(site, folder=folder, catalog=folder / CATALOG), key_id, report, node_key, tuple(notes)
    )


def check_budget(epsilon: float, delta: float, users_at_least: int) -> None:
    """Refuses a budget that no ledger can hold.

    Raises:
        SiteError, ValueError: says which number, its bound, and what to choose.
    """
    if users_at_least < 1:
        raise SiteError(f"users_at_least is {users_at_least}, but must be at least 1")
    if not math.isfinite(epsilon):
        raise SiteError(f"epsilon is {epsilon}, but must be finite: choose one such as 8")
    if not 0 < delta < 1:
        raise SiteError(f"delta is {delta}, but must lie in (0, 1): choose one below 1 / users, such as 1e-6")
    check_promise(epsilon, delta)
    if delta * users_at_least >= 1:
        raise SiteError(
            f"delta is {delta:g}, but must be far below 1/users_at_least = {1 / users_at_least:g}: "
            "a delta that large lets a mechanism publish a whole user"
        )


def connect_site(folder: Path, invitation: Invitation | None = None) -> tuple[str, bool]:
    """A connection for a site that exists; ledger, data and policy stay as they are.

    Args:
        invitation: another of the server's, or another server's: the site keeps the node key that it has. None: it gets
            a new node key, and stays with its server.

    Returns:
        The node's public key as one OpenSSH line, and whether it is new: then `enrolment.json` holds it for the server
        to enrol again.

    Raises:
        SiteError: there is no site, or it is up.
        ConnectionSetupError, NoServerKeyError: it has no connection, and is given no invitation.
    """
    from client.agent import alone

    site = Site.load(folder)
    folder = site.folder.expanduser().resolve()
    held = None
    if invitation is None:
        Connection.load(folder)
    elif (folder / NODE_KEY).is_file():
        held = public_line(Connection(folder, invitation.host, invitation.port).private_key())
    with alone(folder):
        partial = Path(tempfile.mkdtemp(prefix=".connection-", dir=folder))
        try:
            if invitation is not None:
                write_connection(partial, invitation)
            node_key = held or new_node_key(partial)
            if held is None:
                with Ledger.open(site.ledger_folder) as ledger:
                    enrolment = enrolment_to_bytes(ledger.entries()[0], node_key) + b"\n"
                (partial / ENROLMENT).write_bytes(enrolment)
            write_units(partial, folder)
            shutil.rmtree(folder / UNITS, ignore_errors=True)
            for each in partial.iterdir():
                each.replace(folder / each.name)
            sync_folder(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return node_key, held is None


def commitment(histories: Histories, secret: bytes, progress: Progress | None = None) -> str:
    """HMAC-SHA-256, hex, of the histories under the site's secret: tells nothing to who lacks the secret."""
    digest = hashlib.sha256(b"fedtide/histories/1\n")
    names = ("users", "offsets", "items", "times", "kinds", "values")
    arrays = [(name, getattr(histories, name)) for name in names]
    done, of = 0, sum(array.nbytes for _, array in arrays)
    for name, array in arrays:
        if name != "values":
            digest.update(f"{array.dtype.str}{array.shape}\n".encode())
        for piece in _pieces(array):
            digest.update(piece)
            done += len(piece)
            if progress is not None:
                progress("fingerprinting", done, of)
    digest.update("\n".join(histories.kind_names).encode())
    return hmac.digest(secret, b"fedtide/commitment\0" + digest.digest(), hashlib.sha256).hex()


def _pieces(array: npt.NDArray[Any]) -> Iterator[memoryview]:
    """The array's bytes; of one that is mapped from a file, no more than a piece is mapped in memory at a time."""
    base: object = array.base
    for first in range(0, len(array), _PIECE):
        piece = array[first : first + _PIECE]
        if isinstance(array, np.memmap) and isinstance(base, mmap.mmap) and array.filename is not None:
            offset = array.offset + first * array.itemsize
            piece = np.memmap(array.filename, array.dtype, "r", offset, piece.shape)
        yield np.ascontiguousarray(piece).view(np.uint8).data


def data_unchanged(site: Site, committed: str | None, progress: Progress | None = None) -> bool | None:
    """Whether the histories are those that the ledger began with; None where there is nothing to compare."""
    if committed is None or not (site.folder / SECRET).is_file():
        return None
    histories = Histories.load(site.histories_folder)
    return commitment(histories, load_secret(site.folder / SECRET), progress) == committed
