"""What a simulated run was begun with, so that it can go on, and what of it is for its owner's eyes alone.

Both lie in the run's `private/`, which nobody but the owner may read, and which no auditor is handed: how the command
was given, a digest of the data, and (`by_user.py`) held-out figures of single users.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client.private_files import sync_folder
from common.events.deidentify import Keyed
from common.events.histories import Histories
from server.deployment import open_locked
from server.progress import Progress
from server.runs import BEGUN, PRIVATE, RunError, RunFolder, write_whole
from simulations.datasets import Dataset

_PATIENCE = 30.0
"""Seconds for which the processes of an interrupted run are waited for, to be gone."""
_PAIRING = hashlib.sha256(b"fedtide pairing of users").digest()
"""Under which a user has one key in all simulations, whatever their seed. It hides nothing: keys stay private."""

Key = npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class Begun:
    """What a run was begun with.

    Attributes:
        data: digest of all users' cleaned histories, whatever the seed.
        split, fold: what was held out; fold: (number from 1, folds).
        settings: how the federation was simulated, for a comparison's reader.
        public: whether the data are.
        given: the options of the command; empty where a run was begun by no command.
        resumed: how often the run was gone on with.
    """

    data: str
    plan: str
    split: str
    fold: tuple[int, int] | None
    settings: Mapping[str, Any]
    public: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)
    resumed: int = 0

    def save(self, run: RunFolder) -> None:
        """Writes it into the run's private folder."""
        folder = private_folder(run)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(run.path)
        values = asdict(self) | {"given": {name: _stored(value) for name, value in self.given.items()}}
        write_private_whole(folder / BEGUN, json.dumps(values, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, run: RunFolder) -> Begun:
        """What `save` wrote.

        Raises:
            RunError: it is not there, or damaged.
        """
        try:
            values = json.loads((private_folder(run) / BEGUN).read_bytes())
            fold = values["fold"]
            given = {name: _restored(value) for name, value in values["given"].items()}
            return cls(**values | {"fold": None if fold is None else (fold[0], fold[1]), "given": given})
        except FileNotFoundError as error:
            raise RunError(
                f"{run.path} does not say what it was begun with (it was cut off before that, or made by another "
                "command or an earlier version): give the whole command again, which begins a new run"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{private_folder(run) / BEGUN} is damaged: restore it, or give the whole command again, which "
                "begins a new run"
            ) from error


def private_folder(run: RunFolder) -> Path:
    """Where a run keeps what is for its owner's eyes alone."""
    return run.path / PRIVATE


def write_private_whole(path: Path, data: bytes) -> None:
    """As `write_whole`, for a file that nobody but its owner may read.

    Raises:
        RunError: as for `write_whole`.
    """
    mask = os.umask(0o077)
    try:
        write_whole(path, data)
    finally:
        os.umask(mask)


def _stored(value: Any) -> Any:
    """An option's value as JSON; a path is absolute, for whoever goes on from another folder."""
    return {"path": str(value.expanduser().absolute())} if isinstance(value, Path) else value


def _restored(value: Any) -> Any:
    return Path(value["path"]) if isinstance(value, dict) else value


def pairing_keys(dataset: Dataset, users: npt.NDArray[np.str_], pseudonymised: bytes) -> Key:
    """[users] a key of each user, which is the same in every simulation of the same log.

    Args:
        users: pseudonyms.
        pseudonymised: the secret that made them.
    """
    ours, pairing = Keyed(pseudonymised), Keyed(_PAIRING)
    names = dataset.users["user"].to_list()
    keys = {ours.pseudonym_bytes(name).hex(): pairing.pseudonym_bytes(name).hex() for name in names}
    return np.array([keys.get(user, user) for user in users.tolist()], dtype="S32")


def data_digest(whole: Histories, keys: Key) -> str:
    """Of all users' histories, however events of one time are ordered.

    Args:
        keys: [users] from `pairing_keys`.
    """
    order = np.argsort(keys)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[order] = np.arange(len(keys))
    row = np.repeat(rank, whole.lengths)
    place = np.lexsort((whole.values, whole.kinds, whole.items, whole.times, row))
    digest = hashlib.sha256(json.dumps(whole.kind_names).encode())
    for array in (
        keys[order],
        whole.lengths[order],
        *(each[place] for each in (whole.items, whole.times, whole.kinds, whole.values)),
    ):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def is_trained(run: RunFolder) -> bool:
    """Whether all rounds are over, and their model is there."""
    return (run.path / "model.safetensors").is_file() and len(list(run.records())) == len(
        run.plan().schedule()
    )


def check_same(run: RunFolder, now: Begun, catalog: str) -> Begun:
    """What an unfinished run was begun with, resumed once more, if what there is now is the same.

    Args:
        now: what it would be begun with now.
        catalog: digest of the catalog that there is now.

    Raises:
        RunError: it is not.
    """
    before, plan = Begun.load(run), run.plan()
    anew = "or give the whole command again, which begins a new run"
    if plan.digest() != before.plan:
        raise RunError(
            f"the plan in {run.path} is not the one that the run was begun with: restore plan.json, {anew}"
        )
    if plan.catalog != catalog:
        raise RunError(
            f"the catalog is not the one that {run.name} was begun with: give that one, its items in the same order, "
            f"{anew}"
        )
    if (before.data, before.split) != (now.data, now.split):
        raise RunError(f"the log is not the one that {run.name} was begun with: give that one, {anew}")
    if dict(before.settings) != dict(now.settings):
        raise RunError(f"{run.name} was begun with other options: leave them out, {anew}")
    return replace(before, resumed=before.resumed + 1)


@contextmanager
def alone_in(run: RunFolder) -> Iterator[None]:
    """One command at a time is at work on a simulated run, and what an interrupted one had started is gone.

    Raises:
        RunError: another is.
    """
    folder = private_folder(run)
    folder.mkdir(mode=0o700, exist_ok=True)
    with open_locked(folder / "lock") as mine:
        if not mine:
            raise RunError(
                f"another command is at work on {run.path}: wait for its end, or stop it, then go on with it"
            )
        with open_locked(run.path / ".lock", _PATIENCE) as free:
            if not free:
                raise RunError(f"a process is still at work in {run.path}: stop it, then go on with the run")
        yield


def take_up(run: RunFolder) -> None:
    """Readies an interrupted run's folder: what is half-written goes, and quality that is measured anew.

    Raises:
        RunError: the folder is damaged.
    """
    if run.has_round(0):
        Progress.found(run, run.plan().schedule(), run.round_state(0))
    lines = run.metrics_file.read_bytes().splitlines(keepends=True) if run.metrics_file.is_file() else []
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line).get("released") is True]
    write_whole(run.metrics_file, b"".join(kept))
