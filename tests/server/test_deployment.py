"""A whole deployment on loopback from the commands alone: a server, three sites, TLS and node keys, three rounds.

With FEDTIDE_FAULTS=1 the ServerApp is also killed in a run, which Flower takes a minute to notice; and the server's
machine is lost in a run, and the server put back from a copy that was made while it was up.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.connection import NODE_KEY, NODE_PUBLIC
from client.site_folder import SECRET
from common.bundle import REGISTRY_DIR, RUN_DIR, bundle_data
from common.invitation import Invitation
from server.control import control
from server.deployment import Deployment
from server.nodes import flower_runs
from server.registry import Registry
from simulations.faults.place import below, command_of
from tests.server.pushed import faults_of, replies_of
from tests.server.recording_proxy import RecordingProxy
from tests.server.test_operation import free_ports
from tests.tiny import USERS, tiny_files, tiny_language_model, tiny_plan

SITES = ("east", "north", "west")
ONE_LESS, TELLS_TIME = "north", "west"
"""A site whose log lacks one user of the others', and one that lets Flower say when replies were made."""
FAULTS = os.environ.get("FEDTIDE_FAULTS") == "1"


@dataclass
class Place:
    """A machine's folders and the commands that are up on it."""

    folder: Path
    environment: dict[str, str]
    proxy: RecordingProxy
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    began: float = field(default_factory=time.time)

    @property
    def server(self) -> Path:
        return self.folder / "server"

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "common.cli", *(str(each) for each in arguments)]

    def fedtide(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, check=False
        )

    def well(self, *arguments: object) -> str:
        done = self.fedtide(*arguments)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def up(self, kind: str, folder: Path, **environment: str) -> subprocess.Popen[bytes]:
        environment = {**self.environment, **environment}
        with (self.folder / f"{folder.name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(kind, "up", folder, "--log-json"), env=environment, stdout=log, stderr=log
            )
        self.started.append(process)
        return process

    def nodes(self) -> dict[str, str]:
        found = json.loads(self.well("server", "status", self.server, "--json"))
        return {site["name"]: site["node"] for site in found["sites"]}

    def logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*/logs/*.log")]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def until(self, so: Callable[[], bool]) -> None:
        end = time.monotonic() + 180
        while not so():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.5)

    def end(self) -> list[int]:
        """Ends what is up, the sites first, by pid; the exit codes."""
        for process in reversed(self.started):
            process.send_signal(signal.SIGTERM)
        codes = []
        for process in self.started:
            try:
                codes.append(process.wait(90))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        return codes


@contextmanager
def deployed(folder: Path) -> Iterator[Place]:
    """A server and three sites that are up and connected; ended afterwards, whatever happens."""
    environment = {**os.environ, "FEDTIDE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    model = tiny_language_model(folder / "model")
    tiny_files(folder / "data")
    planted = folder / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(TIMED)
    plan = tiny_plan(model, statistics={"popularity_share": 0.2}, privacy={"users_per_site": USERS - 20})
    (folder / "plan.json").write_text(plan.to_json())
    ports = free_ports()
    fleet = free_ports()["fleet_port"]  # sites come in by the proxy
    place = Place(folder, environment, RecordingProxy(fleet, ports["fleet_port"]))
    place.well(
        "server", "init", place.server, "--host", "127.0.0.1", "--port", ports["fleet_port"],
        "--control-port", ports["control_port"], "--metrics-port", ports["metrics_port"],
    )  # fmt: skip
    given = Invitation.from_bytes((place.server / "invitation.json").read_bytes())
    invitation = folder / "invitation.json"
    invitation.write_bytes(replace(given, port=fleet).to_bytes() + b"\n")
    place.proxy.start(place.server / "tls")
    try:
        place.up("server", place.server)
        for name in SITES:
            users, paths = USERS - (name == ONE_LESS), os.environ.get("PYTHONPATH", "")
            log, catalog = tiny_files(folder / "data" / name, users)
            place.well(
                "site", "init", folder / name, "--invitation", invitation,
                "--logs", log, "--catalog", catalog,
                "--epsilon", 20, "--delta", 1e-5, "--users-at-least", USERS - 20,
                "--typical-plan", folder / "plan.json", "--language-model", f"{model}={model}",
            )  # fmt: skip
            enrolment = folder / name / "enrolment.json"
            place.well("server", "enroll", enrolment, "--server", place.server, "--name", name)
            first = str(planted) if name == TELLS_TIME else ""
            place.up(
                "site", folder / name, PYTHONPATH=os.pathsep.join(each for each in (first, paths) if each)
            )
        place.until(lambda: place.nodes() == dict.fromkeys(SITES, "online"))
        yield place
    finally:
        place.end()
        place.proxy.stop()


TIMED = """
import importlib.util
import sys


class Planted:
    def find_spec(self, name, path=None, target=None):
        if name == "client.replies":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            whole = spec.loader.exec_module

            def exec_module(module):
                whole(module)
                module.timeless = lambda reply, asked: None

            spec.loader.exec_module = exec_module
            return spec


sys.meta_path.insert(0, Planted())
"""
"""What Python imports first in the processes of a site whose replies say when they were made, as Flower's do."""


def check_no_clock(place: Place) -> None:
    """Sites that differ in one user push the same but for what they release; a planted clock is found."""
    calls = place.proxy.calls
    by_site = {}
    for name in SITES:
        public = load_ssh_public_key((place.folder / name / NODE_PUBLIC).read_bytes())
        assert isinstance(public, EllipticCurvePublicKey)
        by_site[name] = public_key_to_bytes(public)
    assert faults_of(calls, [by_site["east"], by_site["north"]], place.began) == []
    assert len(replies_of(calls, by_site["east"])) == 3
    faults = faults_of(calls, [by_site[TELLS_TIME]], place.began)
    assert len([fault for fault in faults if "and its request" in fault]) == 3
    assert len([fault for fault in faults if "holds a time" in fault]) == 3


def tokens_seen(place: Place, running: subprocess.Popen[bytes]) -> set[str]:
    """Every command line of the server's and the sites' processes while a run goes on, in none of which a token is."""
    seen: set[str] = set()
    while running.poll() is None:
        new = {command_of(pid) for process in place.started for pid in below(process.pid)} - seen
        assert not [each for each in new if "--token" in each or re.search(r"\b[0-9a-f]{64}\b", each)]
        seen |= new
        time.sleep(0.05)
    return seen


def run_command(place: Place) -> list[str]:
    plan, catalog = place.folder / "plan.json", place.folder / "data" / "catalog.csv"
    return place.command("server", "run", place.server, plan, "--catalog", catalog, "--json")


def flower_statuses(place: Place) -> list[str]:
    with sqlite3.connect(place.server / "state.db") as db:
        return [row[0] for row in db.execute("SELECT sub_status FROM task ORDER BY pending_at")]


def told_run_times(place: Place) -> list[float]:
    """Seconds of each run that sites told Flower they worked."""
    with sqlite3.connect(place.server / "state.db") as db:
        return [row[0] for row in db.execute("SELECT clientapp_runtime FROM run")]


def check_whole(place: Place, said: str) -> None:
    """Three rounds, each once, every release admitted; what the receipts prove; every site charged three times."""
    summary = json.loads(said)
    run = Path(summary["run"])
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2, 3]
    assert all(sorted(record["admitted"]) == list(SITES) and record["aggregated"] for record in records), (
        records
    )
    assert summary["admitted"] == 9
    packed = place.folder / "for-the-auditor"
    place.well("audit", "pack", run, "--registry", place.server / "registry", "-o", packed)
    place.well("audit", "receipts", packed)
    check_nothing_private(place, packed)
    for name in SITES:
        status = json.loads(place.well("site", "status", place.folder / name, "--json"))
        assert status["open"] == 0


def check_nothing_private(place: Place, packed: Path) -> None:
    """No pseudonym, secret or private key of any site or of the server is in what an auditor gets."""
    secrets: list[bytes] = []
    for name in SITES:
        users = [str(user) for user in np.load(place.folder / name / "histories" / "users.npy")]
        assert len(users) >= USERS - 1
        secrets += [user.encode(form) for user in users for form in ("ascii", "utf-32-le")]
        secrets.append((place.folder / name / SECRET).read_bytes().strip())
    keys = [
        *place.folder.glob("*/**/*.key"),
        *place.folder.glob("*/**/*.pem"),
        *place.server.glob("*.secret"),
    ]
    keys += [place.folder / name / NODE_KEY for name in SITES]
    assert len(keys) >= 2 * len(SITES) + 3
    for key in keys:
        data = key.read_bytes()
        secrets += data.splitlines()[1:-1] if data.startswith(b"-----") else [data]
    files = [file.read_bytes() for file in packed.rglob("*") if file.is_file()]
    assert files
    assert not [secret for secret in secrets if any(secret in file for file in files)]


@pytest.mark.timeout(900)
def test_three_sites_train_three_rounds_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with deployed(tmp_path) as place:
        begun = subprocess.Popen(
            run_command(place),
            env=place.environment,
            stdout=(tmp_path / "run.out").open("wb"),
            stderr=(tmp_path / "run.err").open("wb"),
        )
        apps = tokens_seen(place, begun)
        assert begun.returncode == 0, f"{(tmp_path / 'run.err').read_text()}\n{place.logs()}"
        assert any("flwr-serverapp" in each for each in apps)
        check_whole(place, (tmp_path / "run.out").read_text())
        check_no_clock(place)
        assert "completed" in flower_statuses(place)
        assert told_run_times(place) == [0.0]
        everything = set().union(*(below(process.pid) for process in place.started))
        assert sum("client.supernode" in command_of(pid) for pid in everything) == 3
        assert place.end() == [0, 0, 0, 0], place.logs()
        assert not [
            command_of(pid) for pid in everything if "fedtide" in command_of(pid) or "flwr" in command_of(pid)
        ]
        found = json.loads(place.well("server", "status", place.server, "--json"))
        assert found["up"] is False
        assert [run["state"] for run in found["runs"]] == ["completed"]


@pytest.mark.skipif(not FAULTS, reason="takes minutes: FEDTIDE_FAULTS=1 runs it")
@pytest.mark.timeout(1200)
def test_a_killed_server_app_is_said_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with deployed(tmp_path) as place:
        first = subprocess.Popen(
            run_command(place),
            env=place.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs = place.server / "runs"
        place.until(lambda: any(file.stat().st_size for file in runs.glob("*/rounds.jsonl")))
        for pid in below(place.started[0].pid):
            if "flwr-serverapp" in command_of(pid):
                os.kill(pid, signal.SIGKILL)
        _, said = first.communicate(timeout=300)
        assert first.returncode == 2
        assert "cut off after 1 of 3 rounds" in " ".join(said.split())
        assert "the same command goes on" in " ".join(said.split())
        again = subprocess.run(
            run_command(place), env=place.environment, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, f"{again.stderr}\n{place.logs()}"
        check_whole(place, again.stdout)


@pytest.mark.skipif(not FAULTS, reason="takes minutes: FEDTIDE_FAULTS=1 runs it")
@pytest.mark.timeout(1200)
def test_a_server_put_back_from_a_copy_made_in_a_run_goes_on_and_charges_nobody_twice(tmp_path: Path) -> None:
    with deployed(tmp_path) as place:
        first = subprocess.Popen(
            run_command(place), env=place.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        runs, slow = place.server / "runs", place.started[-1].pid
        place.until(lambda: any(file.stat().st_size for file in runs.glob("*/rounds.jsonl")))
        stopped = {slow} | below(slow)  # the last of the sites: so the copy is of a round that is at work
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        said = json.loads(place.well("server", "backup", place.server, tmp_path / "copy", "--json"))
        assert (said["sites"], len(said["unfinished"])) == (list(SITES), 1)
        up = place.started[0]
        below_it = below(up.pid)
        up.kill()
        up.wait()
        place.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below_it))
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        assert first.wait(300) != 0
        shutil.rmtree(place.server)
        shutil.move(tmp_path / "copy", place.server)
        place.started[0] = place.up("server", place.server)
        place.until(lambda: place.nodes() == dict.fromkeys(SITES, "online"))
        again = subprocess.run(
            run_command(place), env=place.environment, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, f"{again.stderr}\n{place.logs()}"
        check_whole(place, again.stdout)
        for name in SITES:
            status = json.loads(place.well("site", "status", place.folder / name, "--json"))
            assert status["charges"] == 3


@pytest.mark.skipif(not FAULTS, reason="takes minutes: FEDTIDE_FAULTS=1 runs it")
@pytest.mark.timeout(1200)
def test_who_has_the_control_port_begins_no_run(tmp_path: Path) -> None:
    """A run that its owner stopped, and one of their own under the server's key or another: no site is asked."""
    with deployed(tmp_path) as place:
        done = subprocess.run(
            run_command(place), env=place.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{done.stderr}\n{place.logs()}"
        whole = Path(json.loads(done.stdout)["run"])
        stopped, elsewhere = (
            whole.with_name("20260101-000000-stopped.incomplete"),
            tmp_path / "own.incomplete",
        )
        for run in (stopped, elsewhere):
            (run / "rounds").mkdir(parents=True)
            for name in ("plan.json", "version.json", "catalog.jsonl", "rounds/00000.safetensors"):
                shutil.copy(whole / name, run / name)
        other = Registry(tmp_path / "registry")
        assert other.server_key
        server = Deployment.load(place.server)
        begun = []
        for run, registry in (
            (stopped, server.registry),
            (elsewhere, server.registry),
            (stopped, tmp_path / "registry"),
        ):
            with control(server) as asked:
                begun.append(asked.start(bundle_data(), {RUN_DIR: str(run), REGISTRY_DIR: str(registry)}))
        ended = {run.run_id: run.status for run in flower_runs(server)}

        def over() -> bool:
            ended.update({run.run_id: run.status for run in flower_runs(server)})
            return all(ended[run].startswith("finished") for run in begun)

        place.until(over)
        assert {ended[run] for run in begun} == {"finished:failed"}
        assert not (stopped / "rounds.jsonl").exists()
        assert not (elsewhere / "rounds.jsonl").exists()
        for name in SITES:
            status = json.loads(place.well("site", "status", place.folder / name, "--json"))
            assert status["charges"] == 3

        # A run that its owner wants, stopped by somebody else before it began: nobody else can begin it, then or when
        # its owner has put it away.
        before = {run.run_id for run in flower_runs(server)}
        wanted = subprocess.Popen(
            [*run_command(place), "--name", "taken"], env=place.environment, stdout=subprocess.DEVNULL
        )
        place.until(lambda: {run.run_id for run in flower_runs(server)} - before)
        (own,) = {run.run_id for run in flower_runs(server)} - before
        with control(server) as asked:
            asked.stop(own)
        assert wanted.wait(180) != 0
        (taken,) = server.runs.glob("*-taken.incomplete")
        spent = charges(place)
        begun.clear()
        for where in (str(taken), f"{taken.parent}//{taken.name}"):
            with control(server) as asked:
                begun.append(asked.start(bundle_data(), {RUN_DIR: where, REGISTRY_DIR: str(server.registry)}))
        place.until(over)
        place.well("server", "discard", place.server, taken.name)
        away = taken.with_suffix(".discarded")
        with control(server) as asked:
            begun.append(asked.start(bundle_data(), {RUN_DIR: str(away), REGISTRY_DIR: str(server.registry)}))
        place.until(over)
        assert {ended[run] for run in begun} == {"finished:failed"}
        assert charges(place) == spent


def charges(place: Place) -> dict[str, int]:
    """How often each site was charged."""
    return {
        name: json.loads(place.well("site", "status", place.folder / name, "--json"))["charges"]
        for name in SITES
    }
