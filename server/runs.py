"""A run's folder: plan, catalog, rounds, checkpoints, updates, receipts, the model; whole, or plainly not.

A folder is named `<time>-<name>.incomplete` until the run has ended well, and loses that ending in one rename.
Files appear whole (written aside, synced, renamed) or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from common.bundle import APP_NAME, installed_code
from common.config import Plan, PlanError, read_plan, read_recorded_plan
from common.events.catalog import Catalog
from common.precision import decoded
from common.wire import State, state_from_bytes, state_to_bytes

INCOMPLETE = ".incomplete"
DISCARDED = ".discarded"
"""Ends the name of an unfinished run that nobody goes on with; what it was charged for stays in it as evidence."""


PRIVATE, BEGUN = "private", "simulation.json"
"""Of a simulated run: the folder of what is for its owner's eyes alone, and the file in it of what began the run."""


class RunError(RuntimeError):
    """A run cannot go on, or a folder holds no finished run; the message says why and what to do."""


def _sync_names(folder: Path) -> None:
    """Makes the names in a folder durable: a file that was synced can still lose its name to a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
        RunError: the disk is full or the file cannot be written; nothing half-written is left.
    """
    write_all_whole(path.parent, {path.name: data})


def write_all_whole(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files of a folder, each so that it is there whole or not at all; by name.

    Raises:
        RunError: the disk is full or a file cannot be written; nothing half-written is left.
    """
    for name, data in files.items():
        aside = folder / f".{name}.{os.getpid()}.partial"
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(folder / name)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise _disk_error(folder / name, error) from error
    try:
        _sync_names(folder)
    except OSError as error:
        raise _disk_error(folder, error) from error


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line and syncs it: see `append_lines`."""
    append_lines(path, [record])


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds a JSON line for each record, all or none, and syncs them.

    Raises:
        RunError: the disk is full or the file cannot be written; what stood in the file stands there still, no more.
    """
    line = b"".join(json.dumps(record, sort_keys=True).encode() + b"\n" for record in records)
    try:
        with path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
                if not whole:
                    _sync_names(path.parent)
            except OSError:
                file.truncate(whole)
                raise
    except OSError as error:
        raise _disk_error(path, error) from error


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; a last line that is not whole yet is left out."""
    if path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def _disk_error(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"the disk is full: {path.name} was not written; free space and start the run again")
    return RunError(f"{path} cannot be written ({error.strerror}): check the folder's rights and the disk")


def installed_version() -> dict[str, str]:
    """What a run belongs to: the digest of the code that sites and server share, and Fedtide's version."""
    return {"code": installed_code(), "version": version(APP_NAME)}


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    path: Path

    @classmethod
    def create(cls, root: Path, plan: Plan, catalog: Catalog) -> RunFolder:
        """A new folder under `root`, with the plan, the version of the code and the public catalog in it."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
            name = f"{stamp}-{plan.name}{suffix}"
            path = root / f"{name}{INCOMPLETE}"
            if (root / name).exists() or (root / f"{name}{DISCARDED}").exists():
                continue
            try:
                path.mkdir(parents=True)
                _sync_names(root)
            except FileExistsError:
                continue
            except OSError as error:
                raise _disk_error(path, error) from error
            break
        run = cls(path)
        write_whole(run.version_file, json.dumps(installed_version()).encode() + b"\n")
        write_whole(path / "plan.json", plan.to_json().encode())
        try:
            (path / "rounds").mkdir()
            catalog.save(run.catalog_file)
        except OSError as error:
            raise _disk_error(run.catalog_file, error) from error
        return run

    @classmethod
    def finished(cls, path: Path) -> RunFolder:
        """A folder that holds a run which ended well.

        Raises:
            RunError: it does not.
        """
        if not path.is_dir():
            raise RunError(f"there is no run folder {path}: `ls runs` shows them")
        if path.name.endswith((INCOMPLETE, DISCARDED)) or not (path / "model.safetensors").is_file():
            raise RunError(f"the run in {path} did not end well, so it has no model: run it again")
        return cls(path)

    @property
    def is_whole(self) -> bool:
        """Whether the run has ended well, with all that comes after its training."""
        return not self.path.name.endswith((INCOMPLETE, DISCARDED))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """One process at a time works in a run; the kernel lets go for one that dies.

        Raises:
            RunError: there is no such folder, or another process is at work in it.
        """
        if not (self.path / "plan.json").is_file():
            raise RunError(f"there is no run in {self.path}: give the folder that the run was begun in")
        descriptor = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is at work in {self.path}: wait for its end, or stop it, then start again"
                ) from error
            yield
        finally:
            os.close(descriptor)

    @property
    def name(self) -> str:
        """The run's public name."""
        return self.path.name.removesuffix(INCOMPLETE).removesuffix(DISCARDED)

    @property
    def version_file(self) -> Path:
        """Which version of the code began the run, as JSON: see `installed_version`."""
        return self.path / "version.json"

    def check_version(self) -> None:
        """Whether the installed version may go on with the run: sites of another would refuse what it asks, or err.

        Raises:
            RunError: another version began it, or one from before versions were noted.
        """
        here = installed_version()
        try:
            said = json.loads(self.version_file.read_bytes())
            code, version = str(said["code"]), str(said["version"])
        except (OSError, ValueError, KeyError, TypeError):
            code, version = "", "of before versions were noted"
        if code != here["code"]:
            began = f"{version} (code {code[:16]})" if code else f"one {version}"
            otherwise = f"put it away with `fedtide server discard {self.path.parent.parent} {self.name}`"
            if (self.path / PRIVATE / BEGUN).is_file():
                otherwise = "give the whole command again, which begins a new run"
            raise RunError(
                f"the unfinished run {self.name} was begun by another version of Fedtide, {began}, and this one is "
                f"{here['version']} (code {here['code'][:16]}): go on with it under the version that began it, or "
                f"{otherwise}"
            )

    @property
    def catalog_file(self) -> Path:
        return self.path / "catalog.jsonl"

    @property
    def rounds_file(self) -> Path:
        """JSON lines: one record a round."""
        return self.path / "rounds.jsonl"

    @property
    def metrics_file(self) -> Path:
        """JSON lines: quality by round, and what sites released of it."""
        return self.path / "metrics.jsonl"

    @property
    def receipts_file(self) -> Path:
        """JSON lines: one record a receipt that was admitted."""
        return self.path / "receipts.jsonl"

    def plan(self) -> Plan:
        """The run's plan."""
        return read_recorded_plan(self.path / "plan.json")

    def plan_signed_for(self) -> Plan:
        """The run's plan, whole: the one whose digest stands in the run's receipts.

        Raises:
            RunError: an earlier version made the run, and its plan says more than one of this version can.
            PlanError: there is no plan, or it is damaged.
        """
        plan = self.plan()
        try:
            return read_plan(self.path / "plan.json")
        except PlanError as error:
            raise RunError(
                f"{self.path} was made by an earlier version: its plan {plan.name!r} also said how sites compute, and "
                "its receipts were signed for that plan. Audit the run with the version that made it"
            ) from error

    def catalog(self) -> Catalog:
        """The public catalog."""
        return Catalog.load(self.catalog_file)

    def save_round(self, number: int, state: State) -> None:
        """The parameters after a round; 0 is the start."""
        write_whole(self._round_file(number), state_to_bytes(state))

    def has_round(self, number: int) -> bool:
        """Whether the parameters after a round are there."""
        return self._round_file(number).is_file()

    def round_state(self, number: int) -> dict[str, Tensor]:
        """The parameters after a round."""
        return state_from_bytes(self._round_file(number).read_bytes())

    def save_pretrained(self, number: int, state: State) -> None:
        """The parameters that public pre-training made of those after a round: what fine-tuning starts with."""
        write_whole(self._pretrained_file(number), state_to_bytes(state))

    def has_pretrained(self, number: int) -> bool:
        """Whether pre-training came after this round, and is done."""
        return self._pretrained_file(number).is_file()

    def sent_state(self, number: int) -> dict[str, Tensor]:
        """The parameters that sites were sent after a round: pre-trained, where pre-training came between."""
        file = self._pretrained_file(number)
        return state_from_bytes(file.read_bytes()) if file.is_file() else self.round_state(number)

    def _pretrained_file(self, number: int) -> Path:
        return self.path / "rounds" / f"{number:05d}.pretrained.safetensors"

    def _round_file(self, number: int) -> Path:
        return self.path / "rounds" / f"{number:05d}.safetensors"

    def save_updates(self, number: int, sent: Mapping[str, bytes]) -> None:
        """Admitted updates of a round as they travelled, so that an auditor can hold each against its receipt.

        Args:
            sent: by the id of the site's key; as `state_to_bytes` gives it.
        """
        folder = self.update_file(number, "").parent
        folder.mkdir(exist_ok=True)
        write_all_whole(
            folder,
            {self.update_file(number, key_id).name: data for key_id, data in sent.items()},
        )

    def update(self, number: int, key_id: str) -> dict[str, Tensor]:
        """An admitted update of a round, float32, by the id of its site's key."""
        return decoded(state_from_bytes(self.update_file(number, key_id).read_bytes()))

    def update_file(self, number: int, key_id: str) -> Path:
        """Where the update of a round and site lies, by the id of the site's key."""
        return self.path / "updates" / f"{number:05d}-{key_id[:16]}.safetensors"

    def save_velocity(self, number: int, velocity: State) -> None:
        """The server's momentum after an aggregated round, for a resume; kept for the last two such rounds."""
        write_whole(self._velocity_file(number), state_to_bytes(velocity))
        for old in sorted((self.path / "rounds").glob("*.velocity.safetensors"))[:-2]:
            old.unlink(missing_ok=True)

    def velocity(self, number: int) -> dict[str, Tensor]:
        """The server's momentum after an aggregated round, one of the last two."""
        return state_from_bytes(self._velocity_file(number).read_bytes())

    def _velocity_file(self, number: int) -> Path:
        return self.path / "rounds" / f"{number:05d}.velocity.safetensors"

    def save_asked(self, number: int, key_ids: Collection[str]) -> None:
        """Which sites are asked in a round, by their keys' ids: on the disk before anything is sent."""
        write_whole(self._asked_file(number), json.dumps(sorted(key_ids)).encode() + b"\n")

    def asked(self, number: int) -> set[str]:
        """What `save_asked` kept of a round; empty where nothing was asked yet."""
        file = self._asked_file(number)
        return set(json.loads(file.read_bytes())) if file.is_file() else set()

    def _asked_file(self, number: int) -> Path:
        return self.path / "rounds" / f"{number:05d}.asked.json"

    def save_released(self, number: int, released: State) -> None:
        """What statistics were released up to a round, summed over sites; also as the run's own."""
        data = state_to_bytes(released)
        write_whole(self._released_file(number), data)
        write_whole(self.path / "released.safetensors", data)

    def released_state(self, number: int | None = None) -> dict[str, Tensor]:
        """What statistics were released up to a round, or in the whole run; empty where there were none."""
        if number is None:
            file = self.path / "released.safetensors"
            return state_from_bytes(file.read_bytes()) if file.is_file() else {}
        for earlier in range(number, 0, -1):
            if self._released_file(earlier).is_file():
                return state_from_bytes(self._released_file(earlier).read_bytes())
        return {}

    def has_released(self, number: int) -> bool:
        """Whether statistics were released in this very round."""
        return self._released_file(number).is_file()

    def _released_file(self, number: int) -> Path:
        return self.path / "rounds" / f"{number:05d}.released.safetensors"

    def save_model(self, state: State) -> None:
        """The run's final parameters."""
        write_whole(self.path / "model.safetensors", state_to_bytes(state))

    def model_state(self) -> dict[str, Tensor]:
        """The run's final parameters."""
        return state_from_bytes((self.path / "model.safetensors").read_bytes())

    def records(self) -> Iterator[dict[str, Any]]:
        """The rounds so far; a last line that is not whole yet is left out."""
        return _whole_lines(self.rounds_file)

    def receipts(self, number: int) -> list[dict[str, Any]]:
        """The lines of receipts.jsonl of a round."""
        return [line for line in _whole_lines(self.receipts_file) if line["round"] == number]

    def released_metrics(self, number: int) -> bool:
        """Whether metrics.jsonl tells what sites released of quality in a round."""
        lines = _whole_lines(self.metrics_file)
        return any(line.get("released") is True and line.get("round") == number for line in lines)

    def released_quality(self) -> list[dict[str, Any]]:
        """What sites released of quality, round by round."""
        return [line for line in _whole_lines(self.metrics_file) if line.get("released") is True]

    def repair(self) -> None:
        """Removes what a crash left half-written: a last line without its end, and files that lack their name."""
        for pattern in ("rounds/.*.partial", "updates/.*.partial"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        for file in (self.rounds_file, self.receipts_file, self.metrics_file):
            data = file.read_bytes() if file.is_file() else b""
            if data and not data.endswith(b"\n"):
                write_whole(file, data[: data.rfind(b"\n") + 1])

    def drop_last_record(self) -> None:
        """Takes the last line of rounds.jsonl back: its checkpoint is not there, so its round is not done."""
        data = self.rounds_file.read_bytes()
        write_whole(self.rounds_file, data[: data.rfind(b"\n", 0, len(data) - 1) + 1])

    @property
    def ending_file(self) -> Path:
        """How the run ended, as JSON; absent while it goes on, or when it was killed."""
        return self.path / "ending.json"

    def save_ending(self, status: Literal["completed", "failed"], reason: str = "") -> None:
        """Says how the run ended: for whoever follows it, since Flower's exit code does not."""
        write_whole(self.ending_file, json.dumps({"status": status, "reason": reason}).encode() + b"\n")

    def ending(self) -> dict[str, str] | None:
        """`status` ("completed" or "failed") and `reason`; None while the run goes on, or when it was killed."""
        try:
            said = json.loads(self.ending_file.read_bytes())
        except FileNotFoundError:
            return None
        return {"status": str(said["status"]), "reason": str(said["reason"])}

    @property
    def waiting_file(self) -> Path:
        """How many sites a run waits for, as JSON; absent while it waits for none."""
        return self.path / "waiting.json"

    def save_waiting(self, number: int, more: int) -> None:
        """Says that a round waits for so many more sites: for whoever follows the run."""
        write_whole(self.waiting_file, json.dumps({"round": number, "more": more}).encode() + b"\n")

    def waiting(self) -> dict[str, int] | None:
        """What `save_waiting` said; None while the run waits for nobody."""
        try:
            said = json.loads(self.waiting_file.read_bytes())
        except FileNotFoundError:
            return None
        return {"round": int(said["round"]), "more": int(said["more"])}

    def discard(self) -> Path:
        """Puts an unfinished run away, for good: nothing takes it up again, and its receipts stay as evidence.

        Returns:
            Where it lies now.

        Raises:
            RunError: a process is at work in it.
        """
        with self.at_work():
            away = self.path.with_name(self.name + DISCARDED)
            self.path.rename(away)
        return away

    def finish(self) -> RunFolder:
        """Takes the ending `.incomplete` off: the run is whole from now on."""
        done = self.path.with_name(self.name)
        self.path.rename(done)
        return RunFolder(done)
