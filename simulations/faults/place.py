"""A server and its sites on this machine, brought up with the commands alone; one site as if on another machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.invitation import Invitation
from simulations.faults.tiny import USERS_AT_LEAST, tiny_plan, write_data, write_language_model

VICTIM, OTHERS = "west", ("east", "north")
SITES = (*OTHERS, VICTIM)
NETWORK = f"fedtide{os.getpid() % 10_000}"
_HERE, _THERE = (f"10.199.{os.getpid() % 250}.{each}" for each in (1, 2))
_PATIENCE = 480.0
_DISK = "32m"


class FaultError(RuntimeError):
    """A fault could not be injected, or what was waited for did not come."""


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    opened = [socket.socket() for _ in range(count)]
    try:
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in opened]
    finally:
        for each in opened:
            each.close()


def below(pid: int) -> set[int]:
    """All processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, last = {pid}, 0
    while len(found) > last:
        last = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def command_of(pid: int) -> str:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Whether a process runs, a zombie not being one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Running:
    """A command that runs, and the file with all that it prints."""

    process: subprocess.Popen[bytes]
    log: Path
    start: int

    def said(self) -> str:
        """What it printed so far, whatever printed into the file before left out."""
        with self.log.open("rb") as file:
            file.seek(self.start)
            return file.read().decode("utf-8", "replace")

    def part(self, words: str) -> int:
        """The process below it whose command line has these words."""
        found = [pid for pid in below(self.process.pid) if words in command_of(pid)]
        if not found:
            raise FaultError(f"no process with {words!r} runs below `{self.log.stem}`")
        return min(found)

    def end(self) -> None:
        """Ends it, by pid, and waits for it."""
        tree = below(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        for pid in tree:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kills it and all below it at once, as a machine that loses its power does."""
        tree = {self.process.pid} | below(self.process.pid)
        for sent in (signal.SIGSTOP, signal.SIGKILL):
            for pid in tree:
                try:
                    os.kill(pid, sent)
                except ProcessLookupError:
                    continue
        self.process.wait()


def can_cut() -> bool:
    """Whether a network of its own can be made here."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FaultError(f"`ip {' '.join(arguments)}`: {done.stderr.strip()}")


@dataclass
class Place:
    """Folders, commands that are up, and what was made on the machine, to be taken away afterwards."""

    folder: Path
    environment: dict[str, str]
    ports: list[int] = field(default_factory=lambda: free_ports(3))
    own_network: bool = field(default_factory=can_cut)
    up: dict[str, Running] = field(default_factory=dict)
    mounts: list[Path] = field(default_factory=list)
    runs: dict[str, list[str]] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        return self.folder / "server"

    @property
    def host(self) -> str:
        return _HERE if self.own_network else "127.0.0.1"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def command(self, *arguments: object, inside: bool = False) -> list[str]:
        """A `fedtide` command; `inside` runs it on the victim's side of the network."""
        before = ["ip", "netns", "exec", NETWORK] if inside and self.own_network else []
        return [*before, sys.executable, "-m", "common.cli", *(str(each) for each in arguments)]

    def fedtide(
        self, *arguments: object, inside: bool = False, extra: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        command = self.command(*arguments, inside=inside)
        environment = {**self.environment, **(extra or {})}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def well(self, *arguments: object, inside: bool = False) -> str:
        """Runs a command that must end well; what it printed."""
        done = self.fedtide(*arguments, inside=inside)
        if done.returncode:
            raise FaultError(
                f"`fedtide {' '.join(map(str, arguments))}` ended with {done.returncode}: {done.stderr}"
            )
        return done.stdout

    def start(self, name: str, *arguments: object, inside: bool = False, **extra: str) -> Running:
        """Starts a command that stays up, or a run that is followed."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as file:
            start = file.tell()
            process = subprocess.Popen(
                self.command(*arguments, inside=inside),
                env={**self.environment, **extra},
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
            )
        found = self.up[name] = Running(process, log, start)
        return found

    def start_server(self) -> Running:
        return self.start("server", "server", "up", self.server, "--log-json")

    def start_site(self, name: str, **extra: str) -> Running:
        return self.start(
            name, "site", "up", self.folder / name, "--log-json", inside=name == VICTIM, **extra
        )

    def states(self) -> dict[str, str]:
        """Site -> the state of its node, as the server's `status` says."""
        found = json.loads(self.well("server", "status", self.server, "--json"))
        return {site["name"]: site["node"] for site in found["sites"]}

    def wait_online(self, *names: str) -> None:
        """Waits until sites are connected."""
        self.until(lambda: all(self.states().get(name) == "online" for name in names), f"{names} online", 2.0)

    def until(self, so: Callable[[], object], what: str, pause: float = 0.05) -> None:
        """Waits until something is so.

        Raises:
            FaultError: it did not become so; names what.
        """
        end = time.monotonic() + _PATIENCE
        while not so():
            if time.monotonic() > end:
                raise FaultError(f"waited {_PATIENCE:g} s in vain: {what}; the logs are in {self.folder}")
            time.sleep(pause)

    def make_site(self, name: str) -> None:
        """A site's folder; not enrolled, not up."""
        host = self.host if name == VICTIM else "127.0.0.1"
        data, invitation = self.folder / "data", self.folder / f"{name}.invitation.json"
        given = Invitation.from_bytes((self.server / "invitation.json").read_bytes())
        invitation.write_bytes(replace(given, host=host).to_bytes() + b"\n")
        self.well(
            "site", "init", self.folder / name, "--invitation", invitation,
            "--logs", data / "log.csv", "--catalog", data / "catalog.csv",
            "--epsilon", 20, "--delta", 1e-5, "--users-at-least", USERS_AT_LEAST,
            "--typical-plan", self.folder / "typical.json", "--language-model", f"{self.model}={self.model}",
            "--threads", 1,
        )  # fmt: skip

    def enroll(self, name: str) -> None:
        file = self.folder / name / "enrolment.json"
        self.well("server", "enroll", file, "--server", self.server, "--name", name)

    def begin(self, name: str, rounds: int = 3, **server: Any) -> Running:
        """Starts a run of that name, or goes on with it where it exists."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            file.write_text(tiny_plan(self.model, name, rounds, **server).to_json())
        catalog = self.folder / "data" / "catalog.csv"
        return self.start(f"run-{name}", "server", "run", self.server, file, "--catalog", catalog, "--json")

    def run_folder(self, name: str) -> Path | None:
        """Of a run that was begun."""
        found = sorted((self.server / "runs").glob(f"*-{name}*"))
        return found[0] if found else None

    def lines(self, name: str, file: str) -> list[str]:
        """The whole lines that a file in a run's folder has by now."""
        folder = self.run_folder(name)
        path = None if folder is None else folder / file
        try:
            text = "" if path is None else path.read_text()
        except FileNotFoundError:  # not begun, or the folder was just renamed
            return []
        return text[: text.rfind("\n") + 1].splitlines()

    def until_training(self, site: str, number: int, least: int = 2) -> None:
        """Waits until a site is in the steps of a round; the file that says so is removed first.

        Args:
            least: so many steps are done.
        """
        progress = self.folder / site / "progress"
        progress.unlink(missing_ok=True)

        def so() -> bool:
            try:
                words = progress.read_text().split()
            except FileNotFoundError:
                return False
            return len(words) == 3 and int(words[0]) == number and least <= int(words[1]) < int(words[2]) - 2

        self.until(so, f"round {number} at {site}", 0.01)

    def until_round(self, name: str, number: int) -> None:
        """Waits until a round of a run is done."""
        self.until(lambda: len(self.lines(name, "rounds.jsonl")) >= number, f"round {number} of {name}")

    def link(self, *, up: bool) -> None:
        """Plugs the victim's network cable in, or pulls it out."""
        _ip("link", "set", f"{NETWORK}0", "up" if up else "down")


@contextmanager
def deployed(folder: Path, names: Sequence[str] = SITES) -> Iterator[Place]:
    """A server and its sites, up and connected; ended and taken away afterwards, whatever happens."""
    environment = {
        **os.environ,
        "FEDTIDE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(folder, environment)
    try:
        write_language_model(place.model)
        write_data(folder / "data")
        (folder / "typical.json").write_text(tiny_plan(place.model, "typical").to_json())
        if place.own_network:
            _make_network()
        fleet, control, metrics = place.ports
        place.well(
            "server", "init", place.server, "--host", place.host, "--port", fleet,
            "--control-port", control, "--metrics-port", metrics,
        )  # fmt: skip
        place.start_server()
        for name in names:
            place.make_site(name)
            if name == VICTIM and os.geteuid() == 0:
                _own_disk(place, folder / name / "ledger")
            place.enroll(name)
            place.start_site(name)
        place.wait_online(*names)
        yield place
    finally:
        for running in reversed(place.up.values()):
            running.end()
        for mount in place.mounts:
            subprocess.run(["umount", str(mount)], check=False)
        if place.own_network:
            subprocess.run(["ip", "netns", "del", NETWORK], check=False)


def _make_network() -> None:
    _ip("netns", "add", NETWORK)
    _ip("link", "add", f"{NETWORK}0", "type", "veth", "peer", "name", f"{NETWORK}1", "netns", NETWORK)
    _ip("addr", "add", f"{_HERE}/30", "dev", f"{NETWORK}0")
    _ip("link", "set", f"{NETWORK}0", "up")
    _ip("-n", NETWORK, "addr", "add", f"{_THERE}/30", "dev", f"{NETWORK}1")
    for device in ("lo", f"{NETWORK}1"):
        _ip("-n", NETWORK, "link", "set", device, "up")


def _own_disk(place: Place, ledger: Path) -> None:
    """Puts a ledger on a small file system of its own."""
    aside = ledger.with_name("ledger.aside")
    shutil.copytree(ledger, aside)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK},mode=0700", "tmpfs", str(ledger)], check=True
    )
    place.mounts.append(ledger)
    shutil.copytree(aside, ledger, dirs_exist_ok=True)
    ledger.chmod(0o700)
    shutil.rmtree(aside)
