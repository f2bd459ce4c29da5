"""What a site's folder holds, whose data that is, and what to do with it once the site has withdrawn."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

KEEP, DELETE, FREE, LOOK = "keep", "delete", "as you like", "look at it"


@dataclass(frozen=True, slots=True)
class Remain:
    """One thing in a site's folder.

    Attributes:
        name: in the folder.
        what: it is.
        users: whether it holds data about users, or may.
        after: a withdrawal: keep, delete, as you like, or look at it.
        there: whether it is there now.
    """

    name: str
    what: str
    users: bool
    after: str
    there: bool


_KNOWN = (
    ("histories", "cleaned histories of users under pseudonyms", True, DELETE),
    ("lower-states", "what a language model's frozen layers say of the histories", True, DELETE),
    ("secret", "the key behind the pseudonyms: with it and a list of ids they can be undone", True, DELETE),
    ("node.key", "the key of the connection to the server", False, DELETE),
    ("superexec.secret", "a password between the connection's own programs", False, DELETE),
    ("ledger", "what was charged and released, signed, and updates as they were sent, with their noise", False, KEEP),
    ("closing.json", "the certificate of the withdrawal", False, KEEP),
    ("logs", "what the site said: nothing about users", False, FREE),
    ("progress", "where the last training stood: a round and a step", False, FREE),
    ("catalog.jsonl", "the public catalog", False, FREE),
    ("site.json", "the site's name", False, FREE),
    ("sources.json", "where the log and the catalog lay, and how they were read", False, FREE),
    ("policy.toml", "what might run here", False, FREE),
    ("enrolment.json", "the ledger's public key and promise, as handed to the server", False, FREE),
    ("node.pub", "the public half of the connection's key", False, FREE),
    ("ca.crt", "the server's authority", False, FREE),
    ("connection.json", "the server's address", False, FREE),
    ("server-key", "the public key that the server's requests are signed with", False, FREE),
    ("units", "files that keep the site up", False, FREE),
    ("flwr", "what the connection's own programs keep", False, FREE),
    ("worker", "sockets between the site's own programs, and whether it is connected", False, FREE),
    ("bin", "what an earlier version started the connection's programs by", False, FREE),
    ("up.lock", "held while the site is up", False, FREE),
)  # fmt: skip


def remains(folder: Path) -> list[Remain]:
    """What a site keeps on its disk, whether it is there now or not; and what is there that no site puts there."""
    found = [Remain(*known, (folder / known[0]).exists()) for known in _KNOWN]
    names = {each.name for each in found}
    others = sorted(each.name for each in folder.iterdir() if each.name not in names)
    return found + [
        Remain(name, "nothing that Fedtide put there: look at it", True, LOOK, True) for name in others
    ]


def deletion(folder: Path) -> str:
    """The command that deletes what holds users' data, and the keys of the connection."""
    names = [each.name for each in remains(folder) if each.after == DELETE]
    return "rm -rf -- " + " ".join(shlex.quote(str(folder / name)) for name in names)


def elsewhere() -> list[str]:
    """What the folder's deletion does not reach."""
    return [
        "The log that the site was made from: it was only read, and lies where it lay.",
        "A folder `.NAME.NUMBER.partial` beside the site's, which a power cut during `site init` may have left.",
        "Backups and snapshots of the folder, and blocks of a disk that were freed and not overwritten.",
        "A model that came back to the site, lists made with it, and texts of the catalog in Fedtide's cache: they "
        "lie where they were put (`FEDTIDE_HOME`, or the user's cache).",
        "What was released: it stays with who received it, and is covered by the promise above.",
    ]
