"""Enrolled sites: their keys, verified chains and anchored heads, which outlive every run.

One SQLite file beside the server's own signing key. A head that was countersigned is never taken back: without
it a site could rewrite its own history.
"""

from __future__ import annotations

import hmac
import os
import re
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.privacy.anchors import Countersignature
from common.privacy.canonical import encode
from common.privacy.chain import Chain, verified_chain
from common.privacy.entries import Entry
from common.privacy.equivocation import EquivocationProof
from common.privacy.faults import ReceiptError
from common.privacy.rules import check_genesis

if TYPE_CHECKING:
    from common.wire import Request, SignedRequest

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sites (key_id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    barred INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS entries (key_id TEXT NOT NULL, seq INTEGER NOT NULL, entry BLOB NOT NULL,
    PRIMARY KEY (key_id, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS anchors (key_id TEXT NOT NULL, seq INTEGER NOT NULL, countersignature BLOB NOT NULL,
    PRIMARY KEY (key_id, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS nodes (node TEXT PRIMARY KEY, key_id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outs (key_id TEXT PRIMARY KEY, state TEXT NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS proofs (id INTEGER PRIMARY KEY, key_id TEXT NOT NULL, proof BLOB NOT NULL);
"""


_CHAINS_KEPT = 512
_CHOICES = b"fedtide/choices/1"
"""Sets what is derived from the server's key apart from all that it signs."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RegistryError(ValueError):
    """A site cannot be enrolled or found; the message says why and what to do."""


@dataclass(frozen=True)
class EnrolledSite:
    """One site as the server knows it.

    Attributes:
        barred: after a proven equivocation, for good.
        out: "barred" or "removed" by the server's owner; empty where neither.
        reason: the owner's own words for it.
    """

    name: str
    key_id: str
    barred: bool
    out: str = ""
    reason: str = ""

    @property
    def shut_out(self) -> bool:
        """Whether it is asked nothing, and no answer of it is admitted."""
        return self.barred or bool(self.out)


@dataclass(frozen=True)
class Extension:
    """A chain as `check_receipt` extended it.

    Attributes:
        seq: of the entry to countersign, where it is not the head: a receipt that was accepted before.
        node: Flower's id of the node that answered, so that its next request carries this site's anchor.
    """

    chain: Chain
    seq: int | None = None
    node: int | None = None


class RegistryReader:
    """Reads an existing registry, or an auditor's copy of one; needs no key, and writes nothing."""

    def __init__(self, folder: Path) -> None:
        """Raises `RegistryError`: there is no registry in the folder."""
        self._file = folder / "registry.sqlite"
        self._chains: OrderedDict[str, Chain] = OrderedDict()
        self._kept: sqlite3.Connection | None = None
        if not self._file.is_file():
            raise RegistryError(f"{folder} holds no registry: `fedtide server enroll` makes one")

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Within, one connection serves everything; it is closed at the end, so that the file alone is whole then."""
        self._kept = sqlite3.connect(self._file, timeout=30, isolation_level=None)
        try:
            yield
        finally:
            self._kept.close()
            self._kept = None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        kept = self._kept
        db = kept or sqlite3.connect(self._file, timeout=30, isolation_level=None)
        try:
            yield db
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError):
                raise
            raise RegistryError(
                f"the registry {self._file} cannot be read or written ({error}): check its folder, or "
                "restore it from a backup"
            ) from error
        finally:
            if db is not kept:
                db.close()

    def sites(self) -> list[EnrolledSite]:
        """All enrolled sites, by name."""
        with self._open() as db:
            return [site for _, site in _sites(db, "sites", "ORDER BY name")]

    def site(self, key_id: str) -> EnrolledSite | None:
        """The site with this key, if it is enrolled."""
        with self._open() as db:
            found = _sites(db, "sites", "WHERE sites.key_id = ?", key_id)
        return found[0][1] if found else None

    def named(self, name: str) -> EnrolledSite:
        """The site of this name.

        Raises:
            RegistryError: there is none.
        """
        found = next((site for site in self.sites() if site.name == name), None)
        if found is None:
            names = ", ".join(site.name for site in self.sites()) or "none"
            raise RegistryError(f"no site is enrolled as {name!r}: there are {names}")
        return found

    def chain(self, key_id: str) -> Chain:
        """The verified copy of a site's chain, with what other processes have stored meanwhile.

        Raises:
            RegistryError: the key is not enrolled.
            ReceiptError: the stored chain does not verify.
        """
        with self._open() as db:
            known = self._chains.get(key_id)
            stored = _stored(db, key_id, 0 if known is None else len(known.entries))
        if known is None:
            if not stored:
                raise RegistryError(f"no site is enrolled under key {key_id[:16]}")
            heads = {anchor.seq: anchor.head for anchor in self.anchors(key_id)}
            self._keep(verified_chain(stored, anchored_heads=heads, key_id=key_id))
        elif stored:
            self._keep(known.extended(stored))
        return self._chains[key_id]

    def _keep(self, chain: Chain) -> None:
        """In memory: the chains of the sites that answered last, and no more of them."""
        self._chains[chain.key_id] = chain
        self._chains.move_to_end(chain.key_id)
        while len(self._chains) > _CHAINS_KEPT:
            self._chains.popitem(last=False)

    def anchors(self, key_id: str) -> list[Countersignature]:
        """Every head of the site's chain that was countersigned, oldest first."""
        with self._open() as db:
            rows = db.execute(
                "SELECT countersignature FROM anchors WHERE key_id = ? ORDER BY seq", (key_id,)
            ).fetchall()
        return [Countersignature.from_bytes(blob) for (blob,) in rows]

    def proofs(self, key_id: str) -> list[EquivocationProof]:
        """The proofs held against a site."""
        with self._open() as db:
            rows = db.execute("SELECT proof FROM proofs WHERE key_id = ? ORDER BY id", (key_id,)).fetchall()
        return [EquivocationProof.from_bytes(blob) for (blob,) in rows]


class Registry(RegistryReader):
    """See the module. Open it with `Registry(folder)`; the folder and the server's key are made if absent."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._key = _load_or_make_key(folder / "server.key")
        self._choices = hmac.digest(self._key.private_bytes_raw(), _CHOICES, "sha256")
        file = folder / "registry.sqlite"
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        super().__init__(folder)
        with self._open() as db:
            db.execute("PRAGMA journal_mode=WAL")
        with self._transaction() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
        file.chmod(0o600)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time, over all processes; on the disk at the end, or nothing at all."""
        with self._open() as db:
            db.execute("PRAGMA synchronous=FULL")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @property
    def server_key(self) -> str:
        """The server's public key, hex."""
        return self._key.public_key().public_bytes_raw().hex()

    def signed(self, request: Request, *, expires: int, like: SignedRequest | None = None) -> SignedRequest:
        """The server's word for a request: see `SignedRequest.of`."""
        from common.wire import SignedRequest  # of which torch is a part

        return SignedRequest.of(request, self._key, expires=expires, like=like)

    def derived(self, *words: str) -> bytes:
        """32 bytes that these words and the server's key give, the same whenever asked; they do not tell the key."""
        return hmac.digest(self._choices, encode(list(words)), "sha256")

    def enroll(self, name: str, genesis: Entry) -> EnrolledSite:
        """Takes a site's ledger in, by its genesis.

        Raises:
            RegistryError: the name or the key is taken, or the name is none.
            ReceiptError: the genesis is not in order.
        """
        check_genesis(genesis)
        if not _NAME.fullmatch(name):
            raise RegistryError(
                f"a site cannot be named {name!r}: use 1 to 64 letters, digits, points, dashes or underscores"
            )
        try:
            with self._transaction() as db:
                db.execute("INSERT INTO sites (key_id, name) VALUES (?, ?)", (genesis.key_id, name))
                db.execute("INSERT INTO entries VALUES (?, 0, ?)", (genesis.key_id, genesis.to_bytes()))
        except sqlite3.IntegrityError as error:
            raise RegistryError(
                f"site {name!r} or its key is enrolled already: `fedtide server sites --registry "
                f"{self._file.parent}` lists them"
            ) from error
        return EnrolledSite(name, genesis.key_id, barred=False)

    def accept(self, chain: Chain, *, seq: int | None = None, node: int | None = None) -> Countersignature:
        """One site's: see `accept_all`.

        Raises:
            ForkError: meanwhile another process stored another history of this site.
        """
        (found,) = self.accept_all([Extension(chain, seq, node)])
        if isinstance(found, ReceiptError):
            raise found
        return found

    def accept_all(self, extensions: Sequence[Extension]) -> list[Countersignature | ReceiptError]:
        """Stores extended chains and countersigns their heads, durably, before any head counts as seen.

        What is stored already is stored once, and the same head gets the same countersignature.

        Returns:
            For each the countersignature, or the fault where meanwhile another process stored another history of
            that site, of which nothing is stored then.
        """
        known = [self.chain(each.chain.key_id) for each in extensions]
        found: list[Countersignature | ReceiptError] = []
        accepted: list[Chain] = []
        with self._transaction() as db:
            for each, held in zip(extensions, known, strict=True):
                try:
                    anchor, whole = self._accepted(db, each, held)
                except ReceiptError as error:
                    found.append(error)
                else:
                    found.append(anchor)
                    accepted.append(whole)
        for whole in accepted:
            self._keep(whole)
        return found

    def _accepted(
        self, db: sqlite3.Connection, extension: Extension, known: Chain
    ) -> tuple[Countersignature, Chain]:
        """Checks all before it writes any."""
        chain = extension.chain
        stored = _stored(db, chain.key_id, len(known.entries))
        held = known.extended(stored) if stored else known
        same = sum(1 for _ in takewhile(_alike, zip(held.entries, chain.entries, strict=False)))
        # A chain that begins as the one held was verified as it was made; of another, the rest is looked at here.
        whole = chain if same == len(held.entries) else held.extended(chain.entries[same:])
        seen = chain.head if extension.seq is None else whole.entries[extension.seq]
        anchor = Countersignature.sign(self._key, site_key_id=chain.key_id, seq=seen.seq, head=seen.hash)
        db.executemany(
            "INSERT INTO entries VALUES (?, ?, ?)",
            [(chain.key_id, entry.seq, entry.to_bytes()) for entry in whole.entries[len(held.entries) :]],
        )
        db.execute(
            "INSERT OR IGNORE INTO anchors VALUES (?, ?, ?)", (chain.key_id, anchor.seq, anchor.to_bytes())
        )
        if extension.node is not None:
            db.execute("INSERT OR REPLACE INTO nodes VALUES (?, ?)", (str(extension.node), chain.key_id))
        return anchor, whole

    def place(self, nodes: Mapping[int, str]) -> None:
        """Says which site answers from a node: node -> key id. A simulation knows it; a server, from node keys."""
        rows = [(str(node), key_id) for node, key_id in nodes.items()]
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO nodes VALUES (?, ?)", rows)

    def sites_by_node(self) -> dict[int, EnrolledSite]:
        """Node -> the site that last answered from it."""
        with self._open() as db:
            return {
                int(node): site
                for node, site in _sites(db, "nodes JOIN sites ON sites.key_id = nodes.key_id", first="node")
            }

    def last_anchor(self, key_id: str) -> Countersignature | None:
        """The countersignature over the newest head of a site's chain, if there is one."""
        with self._open() as db:
            row = db.execute(
                "SELECT countersignature FROM anchors WHERE key_id = ? ORDER BY seq DESC LIMIT 1", (key_id,)
            ).fetchone()
        return None if row is None else Countersignature.from_bytes(row[0])

    def bar(self, key_id: str, proof: EquivocationProof) -> None:
        """Keeps a proof that a site signed two histories, and takes no more updates from it.

        Raises:
            ReceiptError: it proves nothing against this site.
        """
        genesis = self.chain(key_id).genesis
        proof.verify(genesis.public_key)
        with self._transaction() as db:
            db.execute("INSERT INTO proofs (key_id, proof) VALUES (?, ?)", (key_id, proof.to_bytes()))
            db.execute("UPDATE sites SET barred = 1 WHERE key_id = ?", (key_id,))

    def shut_out(self, name: str, state: Literal["barred", "removed"], reason: str) -> EnrolledSite:
        """Asks a site nothing from now on, and admits no answer of it, on the owner's word; its chain stays.

        Raises:
            RegistryError: there is no such site, or it is out already for another reason.
        """
        site = self.named(name)
        if site.barred:
            raise RegistryError(f"site {name!r} is barred for good: it signed two histories of its ledger")
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO outs VALUES (?, ?, ?)", (site.key_id, state, reason))
        return replace(site, out=state, reason=reason)

    def let_in(self, name: str) -> EnrolledSite:
        """Takes back what `shut_out` did.

        Raises:
            RegistryError: there is no such site, or it is barred by proof.
        """
        site = self.named(name)
        if site.barred:
            raise RegistryError(
                f"site {name!r} signed two histories of its ledger, which is proven: that is not taken back"
            )
        with self._transaction() as db:
            db.execute("DELETE FROM outs WHERE key_id = ?", (site.key_id,))
        return replace(site, out="", reason="")


def _sites(
    db: sqlite3.Connection, source: str, more: str = "", *arguments: str, first: str = "NULL"
) -> list[tuple[str, EnrolledSite]]:
    """Sites of a query over `source`, each with its column `first`; a registry of before may lack the table of outs."""
    known = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'outs'").fetchone()
    state, join = (
        ("COALESCE(state, ''), COALESCE(reason, '')", "LEFT JOIN outs ON outs.key_id = sites.key_id")
        if known
        else ("'', ''", "")
    )
    rows = db.execute(
        f"SELECT {first}, name, sites.key_id, barred, {state} FROM {source} {join} {more}", arguments
    ).fetchall()
    return [
        (str(each), EnrolledSite(name, key_id, bool(barred), out, reason))
        for each, name, key_id, barred, out, reason in rows
    ]


def _alike(pair: tuple[Entry, Entry]) -> bool:
    return pair[0] is pair[1] or pair[0].hash == pair[1].hash


def _stored(db: sqlite3.Connection, key_id: str, first: int) -> list[Entry]:
    rows = db.execute(
        "SELECT entry FROM entries WHERE key_id = ? AND seq >= ? ORDER BY seq", (key_id, first)
    ).fetchall()
    return [Entry.from_bytes(blob) for (blob,) in rows]


def _load_or_make_key(path: Path) -> Ed25519PrivateKey:
    if not path.exists():
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(Ed25519PrivateKey.generate().private_bytes_raw())
            file.flush()
            os.fsync(file.fileno())
    if path.stat().st_mode & 0o077:
        raise RegistryError(f"the server's key {path} can be read by others: run chmod 600 on it")
    raw = path.read_bytes()
    if len(raw) != 32:
        raise RegistryError(f"the server's key {path} is damaged: restore it from a backup")
    return Ed25519PrivateKey.from_private_bytes(raw)
