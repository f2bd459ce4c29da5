"""A copy of a server's folder that is right while the server is up and runs are at work.

What is written last is copied first: a round's line in rounds.jsonl says that its checkpoint is there, a line in
receipts.jsonl that its update is there and that the registry holds the site's chain up to it. So within a run the lines
come before what they speak of, and the registry after all runs: it may know more than they, as after a crash, but never
less. A run that ended a round meanwhile is copied again, what is new alone, so that a copy never mixes two rounds. In
the copy of Flower's database no run is at work and nothing is on its way: all of it is asked for again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.backup import BackupError, copy_database, copy_file, copy_files, new_copy
from common.privacy.receipts import Receipt
from server.deployment import Deployment
from server.nodes import enrolled_keys, forget_what_is_at_work
from server.overview import INCOMPLETE
from server.registry import RegistryReader
from server.runs import RunFolder

_LINES = ("privacy.json", "ending.json", "metrics.jsonl", "rounds.jsonl", "receipts.jsonl")
"""Of a run, in the order of copying: each speaks only of what is copied after it."""
_DATABASE_PARTS = ("-wal", "-shm", "-journal")
_TRIES = 100


@dataclass(frozen=True)
class BackedUp:
    """What a copy holds.

    Attributes:
        runs, unfinished: names.
        sites: enrolled ones.
    """

    folder: Path
    sites: list[str]
    runs: list[str]
    unfinished: list[str]


def back_up(server: Deployment, target: Path) -> BackedUp:
    """Copies a server's folder, whether or not it is up, and checks the copy: in the folder's place it is the server.

    Raises:
        BackupError: the target exists, the copy is not right, or runs end rounds faster than they can be copied.
        DeploymentError, RegistryError, ReceiptError: the folder itself is not in order.
    """
    with new_copy(server.folder, target) as partial:
        copy = Deployment(
            partial, server.host, **{f"{name}_port": port for name, port in server.ports().items()}
        )
        own = {server.runs, server.registry, server.folder / "up.lock", server.folder / "submit.lock"}
        copy_files(server.folder, partial, lambda path: path in own or _is_database(path, server.database))
        copy_files(
            server.registry,
            copy.registry,
            lambda path: _is_database(path, server.registry / "registry.sqlite"),
        )
        for _ in range(_TRIES):
            before = _copied_runs(server, copy)
            copy_database(server.registry / "registry.sqlite", copy.registry / "registry.sqlite")
            if before == _ends(server):
                break
        else:
            raise BackupError(
                f"runs in {server.runs} end rounds faster than they are copied: choose a faster disk for the copy, or "
                f"stop them meanwhile by `fedtide server run {server.folder} --stop --resume RUN`"
            )
        if server.database.is_file():
            copy_database(server.database, copy.database)
            forget_what_is_at_work(copy.database)
        return _checked(copy, target)


def _copied_runs(server: Deployment, copy: Deployment) -> dict[str, int]:
    """Brings the copies of the runs up to now; what `_ends` said before."""
    ends = _ends(server)
    copy_files(server.runs, copy.runs, lambda path: path.parent == server.runs and path.is_dir())
    for folder in _folders(server.runs):
        target = copy.runs / folder.name
        if not folder.name.endswith(INCOMPLETE) and (target / "rounds.jsonl").is_file():
            continue  # whole before, and whole runs do not change
        target.mkdir(mode=0o700, exist_ok=True)
        for name in _LINES:
            try:
                copy_file(folder / name, target / name)
            except FileNotFoundError:
                (target / name).unlink(missing_ok=True)
        lines = {folder / name for name in _LINES}
        copy_files(folder, target, lines.__contains__)
    return ends


def _ends(server: Deployment) -> dict[str, int]:
    """Each run's name in the folder, and how far its rounds are: bytes of rounds.jsonl."""
    found = {}
    for folder in _folders(server.runs):
        try:
            found[folder.name] = (folder / "rounds.jsonl").stat().st_size
        except FileNotFoundError:
            found[folder.name] = 0
    return found


def _folders(runs: Path) -> list[Path]:
    return sorted(path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []


def _is_database(path: Path, database: Path) -> bool:
    return path.parent == database.parent and path.name in (
        database.name,
        *(database.name + part for part in _DATABASE_PARTS),
    )


def _checked(copy: Deployment, target: Path) -> BackedUp:
    """Opens the copy as a server does: keys and their modes, every site's chain, every receipt against both."""
    Deployment.load(copy.folder).check_private()
    enrolled_keys(copy)
    registry = RegistryReader(copy.registry)
    sites = registry.sites()
    for site in sites:
        registry.chain(site.key_id)
    runs = [RunFolder(folder) for folder in _folders(copy.runs) if (folder / "plan.json").is_file()]
    for run in runs:
        _check_run(run, registry)
    unfinished = [run.name for run in runs if run.path.name.endswith(INCOMPLETE)]
    return BackedUp(target, [site.name for site in sites], [run.name for run in runs], unfinished)


def _check_run(run: RunFolder, registry: RegistryReader) -> None:
    run.plan()
    done = [int(record["round"]) for record in run.records()]
    for number in done:
        if not run.has_round(number):
            raise BackupError(
                f"the copy of run {run.name} lacks the checkpoint of round {number}: begin again"
            )
        for line in run.receipts(number):
            entry = Receipt.from_bytes(str(line["receipt"]).encode()).entries[-1]
            held = registry.chain(str(line["key_id"])).entries
            if entry.seq >= len(held) or held[entry.seq].hash != entry.hash:
                raise BackupError(
                    f"the copy of run {run.name} has a receipt that its registry lacks: begin again"
                )
            if not run.update_file(number, str(line["key_id"])).is_file():
                raise BackupError(
                    f"the copy of run {run.name} lacks an update of round {number}: begin again"
                )
