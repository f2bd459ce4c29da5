"""Simulations that are interrupted and go on: by Ctrl-C, by SIGKILL at any moment, and by hand at chosen ones.

FEDTIDE_FAULTS=1 kills the command many times with both engines; else a few times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger
from server.runs import RunError, RunFolder
from simulations import begun, federation, sites
from simulations.audit.receipts import audit_receipts
from simulations.datasets import Dataset, load_own
from simulations.federation import SimulationOptions, simulate
from simulations.follower import Watcher
from tests.tiny import own_cache, tiny_dataset, tiny_files, tiny_language_model, tiny_options, tiny_plan

MANY = bool(os.environ.get("FEDTIDE_FAULTS"))


def charges(run: RunFolder) -> Counter[int]:
    """Round -> reservations of it over all of the run's own sites; never two at one site."""
    total: Counter[int] = Counter()
    for folder in sorted((run.path / "sites").glob("[0-9]*")):
        with Ledger.open(folder / "ledger") as ledger:
            ledger.verify()
            mine = Counter(each.reserve.round for each in ledger.status().charges)
        assert not mine or max(mine.values()) == 1, "a site was charged twice for a round"
        total += mine
    return total


def kept(run: RunFolder) -> dict[str, bytes]:
    """What training left."""
    files = [run.rounds_file, run.receipts_file, *sorted((run.path / "rounds").glob("*.safetensors"))]
    return {str(file.relative_to(run.path)): file.read_bytes() for file in files}


class Stop(BaseException):
    """Stands for an interrupt at a chosen moment."""


class Small:
    """A tiny data set, plan and options, and runs of them that are stopped at a chosen moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_language_model(folder / "model")
        self.dataset = tiny_dataset(folder / "data")
        self.plan = tiny_plan(self.model)
        self.options = tiny_options(folder / "runs")

    def stopped(
        self,
        monkeypatch: pytest.MonkeyPatch,
        module: Any,
        name: str,
        calls: int = 1,
        options: SimulationOptions | None = None,
    ) -> RunFolder:
        """A run that is stopped before so many calls of a function of a module."""
        before, count, seen = getattr(module, name), 0, list[RunFolder]()

        def stops(*given: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == calls:
                raise Stop
            return before(*given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stops)
            with pytest.raises(Stop):
                simulate(self.dataset, self.plan, options or self.options, Watcher(on_run=seen.append))
        return seen[0]

    def goes_on(self, run: RunFolder, **changed: Any) -> federation.Outcome:
        dataset: Dataset = changed.pop("dataset", self.dataset)
        return simulate(dataset, run.plan(), replace(self.options, **changed), unfinished=run)


@pytest.fixture
def small(tmp_path: Path) -> Any:
    with own_cache(tmp_path / "cache"):
        yield Small(tmp_path)


def test_a_run_whose_evaluation_was_interrupted_keeps_every_byte_of_its_training(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.stopped(monkeypatch, federation, "popularity_scorer")
    assert begun.is_trained(run)
    trained, charged = kept(run), charges(run)
    outcome = small.goes_on(run)
    assert kept(outcome.run) == trained
    assert charges(outcome.run) == charged == {1: 4, 2: 4}
    lines = [json.loads(line) for line in outcome.run.metrics_file.read_text().splitlines()]
    assert [line.get("round") for line in lines] == [1, 2, None]  # measured again, and written once
    assert len(outcome.validation) == len(outcome.epsilons) == 3
    assert "interrupted and went on, once" in (outcome.run.path / "summary.md").read_text()
    assert not audit_receipts(outcome.run.path).lies


@pytest.mark.parametrize("kept_sites", [False, True])
def test_sites_that_were_made_in_part_are_made_to_their_end(
    kept_sites: bool, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept_sites:
        small.options = replace(small.options, sites=small.folder / "sites")
    for name, calls in (("make_site", 3), ("enroll_site", 2), ("smallest_budget", 1)):
        run = small.stopped(monkeypatch, sites, name, calls)
        outcome = small.goes_on(run)
        assert len(outcome.sites) == 4
        assert sum(site.users for site in outcome.sites) == 120
        assert not (outcome.sites[0].folder.parent / "being-made").exists()
        if kept_sites:
            break


def test_sites_that_were_made_in_part_take_no_other_users(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.options = replace(small.options, sites=small.folder / "sites")
    small.stopped(monkeypatch, sites, "make_site", 3)
    with pytest.raises(
        sites.SiteError, match="a part of other sites, whose making was interrupted: delete it"
    ):
        simulate(small.dataset, small.plan, replace(small.options, seed=1))
    assert len(simulate(small.dataset, small.plan, small.options).sites) == 4


def test_what_has_changed_since_is_one_sentence(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.stopped(monkeypatch, federation, "_run_and_watch")
    log, catalog = small.folder / "data" / "log.csv", small.folder / "data" / "catalog.csv"
    other = small.folder / "other.csv"
    other.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(RunError, match=r"^the log is not the one that .* was begun with: give that one, or "):
        small.goes_on(run, dataset=load_own(other, catalog))
    other.write_text(catalog.read_text().replace("i7,", "i7,very "))
    with pytest.raises(RunError, match=r"^the catalog is not the one that .* was begun with"):
        small.goes_on(run, dataset=load_own(log, other))
    with pytest.raises(RunError, match="begun with other options"):
        small.goes_on(run, site_budget=50.0)
    plan = (run.path / "plan.json").read_text()
    (run.path / "plan.json").write_text(plan.replace('"rounds": 2', '"rounds": 3'))
    with pytest.raises(
        RunError, match=r"^the plan in .* is not the one that the run was begun with: restore"
    ):
        small.goes_on(run)
    (run.path / "plan.json").write_text(plan)
    with begun.alone_in(run), pytest.raises(RunError, match="another command is at work on"):
        small.goes_on(run)
    (run.path / "private" / "simulation.json").write_text("{")
    with pytest.raises(RunError, match="is damaged: restore it"):
        small.goes_on(run)
    (run.path / "private" / "simulation.json").unlink()
    with pytest.raises(RunError, match="does not say what it was begun with"):
        small.goes_on(run)
    assert charges(run) == {}


def test_recommend_works_once_training_ended_and_says_what_is_missing(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.cli import main

    def recommended(run: str, code: int) -> tuple[str, str]:
        with pytest.raises(SystemExit) as end:
            main(["recommend", "--run", run, "--history", "red; blue", "--json", "--offline"])
        said = capsys.readouterr()
        assert end.value.code == code, said.err
        return said.out, said.err.splitlines()[-1] if said.err else ""

    monkeypatch.chdir(small.folder)  # where runs/ is
    half = small.stopped(monkeypatch, federation, "run_in_this_process")
    assert f"the training of {half.name} did not end" in recommended(half.name, 2)[1]
    run = small.stopped(monkeypatch, federation, "popularity_scorer")
    out, err = recommended(run.name, 0)
    assert len(json.loads(out)["items"]) == 10
    assert f"Note: {run.name} is trained, but was interrupted after that" in err
    assert f"simulate --resume {run.path}" in err
    done = small.goes_on(run).run
    for name in (str(run.path), run.path.name, str(done.path), done.name):  # whichever was noted down
        assert recommended(name, 0) == (out, "")
    assert "2 runs in runs are called tiny: give one's folder, such as 2" in recommended("tiny", 2)[1]
    shutil.rmtree(half.path)
    assert recommended("tiny", 0) == (out, "")
    assert "there is no run iny" in recommended("iny", 2)[1]


def test_the_order_of_a_logs_lines_and_the_seed_are_no_part_of_what_the_data_are(small: Small) -> None:
    log, catalog = small.folder / "data" / "log.csv", small.folder / "data" / "catalog.csv"
    header, *lines = log.read_text().splitlines()
    turned = small.folder / "turned.csv"
    turned.write_text("\n".join([header, *reversed(lines)]) + "\n")

    def digest(file: Path, seed: int) -> str:
        dataset = load_own(file, catalog)
        whole, _ = sites.whole_histories(dataset, federation.CleaningPolicy(minimum_events=5), seed)
        keys = begun.pairing_keys(dataset, whole.users, sites.simulated_secret(seed))
        return begun.data_digest(whole, keys)

    assert digest(log, 0) == digest(turned, 0) == digest(log, 7)
    turned.write_text("\n".join([header, *lines[:-1], lines[-1] + "0"]) + "\n")
    assert digest(turned, 0) != digest(log, 0)


def test_what_a_run_keeps_of_single_users_is_its_owners_alone(small: Small) -> None:
    from simulations.audit.pack import pack

    outcome = simulate(small.dataset, small.plan, small.options)
    private = outcome.run.path / "private"
    assert private.stat().st_mode & 0o777 == 0o700
    assert {file.name for file in private.iterdir()} == {"simulation.json", "by-user.npz", "lock"}
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in private.iterdir())
    packed = pack(outcome.run.path, small.folder / "packed")
    assert not [file for file in packed if "private" in file.parts or file.suffix == ".npz"]
    assert not list((small.folder / "packed").rglob("*by-user*"))


class Command:
    """`fedtide simulate` as a process of its own."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder = folder
        log, catalog = tiny_files(folder / "data")
        self.arguments = [
            *("--log", str(log), "--catalog", str(catalog), "--engine", engine, "--n-sites", "3"),
            *("--encoder", str(tiny_language_model(folder / "model")), "--users-per-site", "10"),
            *("--rounds", "3", "--steps", "1", "--set", "model.width=8", "--set", "statistics.top_items=6"),
            *("--epsilon", "8", "--delta", "1e-4", "--baseline-epochs", "1", "--offline"),
        ]
        self.runs = folder / "runs"
        self.environment = {
            **os.environ,
            "FEDTIDE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(begun.__file__).parent.parent),
        }

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "common.cli", "simulate", *arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def done_rounds(self) -> int:
        return sum(file.read_bytes().count(b"\n") for file in self.runs.glob("*/rounds.jsonl"))

    def the_run(self) -> RunFolder | None:
        """The run, once it can go on."""
        found = [file.parent.parent for file in self.runs.glob("*/private/simulation.json")]
        return RunFolder(found[0]) if found else None

    def killed_until_whole(self, kills: int, chance: random.Random) -> Counter[str]:
        """Kills the command at random moments, and goes on, until it has come to its end."""
        counts: Counter[str] = Counter()
        while True:
            run = self.the_run()
            if run is None:
                shutil.rmtree(self.runs, ignore_errors=True)
                process = self.begin(*self.arguments, "--runs", str(self.runs))
            else:
                process = self.begin("--resume", str(run.path), "--offline")
            if counts["kills"] < kills:
                self._wait_for_moment(process, chance)
                process.kill()
            said, _ = process.communicate(timeout=240)
            if process.returncode == 0:
                return counts
            assert process.returncode == -signal.SIGKILL, said[-3000:]
            self._nothing_works_on()
            counts["kills"] += 1
            counts[f"after {self.done_rounds()} rounds"] += 1

    def _nothing_works_on(self) -> None:
        """Server and sites end with the command; Ray's own agents take a minute longer."""
        end = time.monotonic() + 60
        while (left := self._workers()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left

    def _workers(self) -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command, environment = (
                    (entry / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")
                )
            except OSError:
                continue
            ours = "flower_engine" in command or "ClientApp" in command or "forkserver" in command
            if ours and str(self.folder) in environment:
                found.append(command[:200])
        return found

    def _wait_for_moment(self, process: subprocess.Popen[str], chance: random.Random) -> None:
        """Until one more round is over, or the run is there, and then a little."""
        rounds, end = self.done_rounds(), time.monotonic() + 120
        until_run = self.the_run() is None and chance.random() < 0.3
        while process.poll() is None and time.monotonic() < end:
            if self.done_rounds() > rounds or (until_run and self.the_run() is not None):
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("engine", ["inline", "flower"])
def test_a_simulation_killed_at_any_moment_comes_to_its_end(tmp_path: Path, engine: str) -> None:
    command, chance = Command(tmp_path, engine), random.Random(3)
    kills = (24 if MANY else 2) if engine == "inline" else (12 if MANY else 1)
    counts = Counter[str]()
    for number in range(4 if MANY else 1):
        counts += command.killed_until_whole(kills // (4 if MANY else 1), chance)
        run = command.the_run()
        assert run is not None
        assert run.is_whole
        rounds = len(run.plan().schedule())
        assert [record["round"] for record in run.records()] == list(range(1, rounds + 1))
        asked = charges(run)
        assert set(asked) <= set(range(1, rounds + 1))
        assert max(asked.values()) <= 3
        assert sum(asked.values()) >= len(run.receipts_file.read_bytes().splitlines())
        assert not audit_receipts(run.path).lies
        privacy = json.loads((run.path / "privacy.json").read_bytes())
        assert privacy["epsilon"] <= 8.0 + 1e-6
        burnt = [e for site in privacy["sites"] for e in site["events"] if e["outcome"] != "released"]
        counts["burnt"] += len(burnt)
        # A site sits a round out where a charge was burnt in it, and for no other reason.
        out = [each["reason"] for record in run.records() for each in record["left_out"]]
        assert set(out) <= {"policy"}
        assert len(out) <= len(burnt)
        assert sum(len(site["events"]) for site in privacy["sites"]) == sum(asked.values())
        run.path.rename(tmp_path / f"whole-{number}")
    assert counts["kills"], "no kill hit: the test has lost its bite"
    print(dict(counts))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_last_line_of_an_interrupted_command_goes_on_as_it_stands(
    sent: signal.Signals, tmp_path: Path
) -> None:
    command = Command(tmp_path, "inline")
    process = command.begin(*command.arguments, "--runs", "runs it is", "--rounds", "60", "--epsilon", "60")
    odd = tmp_path / "runs it is"  # given as a relative one, with spaces: what is printed holds from anywhere
    (tmp_path / "elsewhere").mkdir()
    try:
        end = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < end and not list(odd.glob("*/rounds.jsonl")):
            time.sleep(0.05)
        process.send_signal(sent)
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 130, said[-3000:]
        last = said.splitlines()[-1]
        assert "simulate --resume" in last
        assert "to go on:" in said
        again = subprocess.run(
            f"exec {last}",
            shell=True,
            cwd=tmp_path / "elsewhere",
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=command.environment,
        )
        assert again.returncode == 0, (again.stdout + again.stderr)[-3000:]
        (run,) = odd.iterdir()
        assert f"{run.resolve()}" in again.stdout.replace("\n", "")
        # A finished run has nothing left to do, and says so; an option that the run has already is refused.
        done = command.begin("--resume", run.name, "--runs", str(odd))
        assert "is finished, and nothing is left to do" in done.communicate(timeout=100)[0]
        assert done.returncode == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epsilon", "3"], "leave --epsilon out"),
        (["--set", "model.width=8"], "leave --set out"),
        (["--no-test"], "leave --test out"),
        (["plan.toml"], "leave a plan out"),
        (["--name", "other"], "leave --name out"),
    ],
)
def test_what_the_run_was_begun_with_is_not_given_again(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.cli import main

    with pytest.raises(SystemExit) as end:
        main(["simulate", "--resume", "x", "--runs", str(tmp_path), *arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_a_run_of_another_version_of_no_command_or_of_nothing_is_refused_in_a_sentence(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.cli import main

    def said(run: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["simulate", "--resume", run, "--runs", str(small.folder / "runs")])
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    run = small.stopped(monkeypatch, federation, "_run_and_watch")
    assert "was not begun by `fedtide simulate`" in said(run.name)
    assert "there is no run nowhere" in said("nowhere")
    version = json.loads(run.version_file.read_bytes())
    run.version_file.write_text(json.dumps(version | {"code": "0" * 64}))
    beginning = begun.Begun.load(run)
    replace(beginning, given={"seed": 0}).save(run)
    told = said(run.name)
    assert "begun by another version of Fedtide" in told
    assert "give the whole command again" in told
    assert "fedtide server" not in told
    (run.path / "private" / "simulation.json").unlink()
    assert "does not say what it was begun with" in said(str(run.path))
