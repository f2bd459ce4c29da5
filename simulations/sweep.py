"""A plan at several epsilons, each with several seeds: a simulation for each, and what they come to together.

The folder of a sweep says what was asked for and holds the runs, so that a sweep that was interrupted goes on: runs
that are whole stay, one that is not goes on itself. Each run has sites and ledgers of its own.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.runs import BEGUN, RunError, RunFolder, write_whole
from simulations.begun import Begun, private_folder
from simulations.by_user import load_by_user
from simulations.outcome import FEDTIDE

_ASKED = "sweep.json"
RUNS = "runs"


@dataclass(frozen=True)
class Row:
    """One run of a sweep."""

    epsilon: float
    seed: int

    @property
    def name(self) -> str:
        """Of its plan, by which its run is found again."""
        return f"epsilon-{self.epsilon:g}-seed-{self.seed}".replace(".", "-").replace("+", "")


@dataclass(frozen=True)
class Sweep:
    """What was asked for.

    Attributes:
        arguments: `simulate`'s, as they were given.
        given_in: the folder that they were given in, which relative paths are relative to.
    """

    folder: Path
    epsilons: tuple[float, ...]
    seeds: int
    arguments: tuple[str, ...]
    given_in: str

    @classmethod
    def begin(cls, runs: Path, epsilons: Sequence[float], seeds: int, arguments: Sequence[str]) -> Sweep:
        """A new one, in a folder of its own under `runs`.

        Raises:
            RunError: the folder cannot be written.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
            folder = runs.resolve() / f"{stamp}-sweep{suffix}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise RunError(
                    f"{folder} cannot be made ({error.strerror}): choose another folder with --runs"
                ) from error
            break
        made = cls(folder, tuple(epsilons), seeds, tuple(arguments), str(Path.cwd()))
        said = {name: value for name, value in asdict(made).items() if name != "folder"}
        write_whole(folder / _ASKED, json.dumps(said, indent=2).encode() + b"\n")
        return made

    @classmethod
    def found(cls, given: str, runs: Path) -> Sweep:
        """One that was begun: its folder, or its name under `runs`.

        Raises:
            RunError: there is none, or it is damaged.
        """
        for folder in (Path(given).expanduser(), runs / Path(given).name):
            file = folder / _ASKED
            if file.is_file():
                try:
                    said = json.loads(file.read_bytes())
                    return cls(
                        folder.resolve(),
                        tuple(map(float, said["epsilons"])),
                        int(said["seeds"]),
                        tuple(map(str, said["arguments"])),
                        str(said["given_in"]),
                    )
                except (ValueError, KeyError, TypeError) as error:
                    raise RunError(f"{file} is damaged: restore it, or begin a new sweep") from error
        raise RunError(
            f"there is no sweep {given}, neither as a folder nor by this name in {runs}: `ls {runs}` shows those that "
            "there are"
        )

    @property
    def rows(self) -> list[Row]:
        """Seed by seed, so that what was interrupted has whole curves."""
        return [Row(epsilon, seed) for seed in range(self.seeds) for epsilon in self.epsilons]

    def run_of(self, row: Row) -> RunFolder | None:
        """The run of a row, whole or unfinished; None where there is none that could go on."""
        for path in sorted((self.folder / RUNS).glob(f"*-{row.name}*")):
            run = RunFolder(path)
            if (private_folder(run) / BEGUN).is_file() and run.plan().name == row.name:
                return run
        return None

    def command_of(self, row: Row) -> list[str]:
        """`simulate`'s arguments for a row; without privacy it is trained once a seed, with the first epsilon."""
        run = self.run_of(row)
        if run is not None:
            return ["--resume", str(run.path)]
        own = ["--epsilon", repr(row.epsilon), "--seed", str(row.seed), "--name", row.name]
        if row.epsilon != self.epsilons[0]:
            own += ["--baseline-epochs", "0"]
        return [*self.arguments, *own, "--runs", str(self.folder / RUNS)]


@dataclass(frozen=True)
class Result:
    """What a row came to.

    Attributes:
        figures: part -> recommender -> metric -> value.
    """

    row: Row
    run: str
    spent: float
    headline: str
    public: bool
    figures: Mapping[str, Mapping[str, Mapping[str, float]]]

    @classmethod
    def of(cls, row: Row, run: RunFolder) -> Result:
        """Of a run that is whole."""
        last = json.loads(run.metrics_file.read_bytes().splitlines()[-1])
        return cls(
            row=row,
            run=run.name,
            spent=float(json.loads((run.path / "privacy.json").read_bytes())["epsilon"]),
            headline=load_by_user(run, "validation").headline,
            public=Begun.load(run).public,
            figures={
                part: {
                    name: {metric: each["value"] for metric, each in metrics.items()}
                    for name, metrics in last[part].items()
                }
                for part in ("validation", "test")
                if part in last
            },
        )


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the standard deviation; NaN for one seed."""

    mean: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(
            statistics.mean(values),
            statistics.stdev(values) if len(values) > 1 else math.nan,
            len(values),
        )

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.deviation:.4f}" if math.isfinite(self.deviation) else "")


@dataclass(frozen=True)
class Curve:
    """What the rows that are done come to together."""

    asked: Sweep
    results: Sequence[Result]

    @property
    def headline(self) -> str:
        return self.results[0].headline

    @property
    def parts(self) -> tuple[str, ...]:
        """Which held-out events every row has figures of."""
        return tuple(
            part for part in ("validation", "test") if all(part in each.figures for each in self.results)
        )

    def spreads(self, part: str, metric: str) -> Iterator[tuple[float, Spread]]:
        """Epsilon and the private model's metric, for each epsilon of which a run is done."""
        for epsilon in self.asked.epsilons:
            values = [
                each.figures[part][FEDTIDE][metric]
                for each in self.results
                if each.row.epsilon == epsilon and metric in each.figures[part][FEDTIDE]
            ]
            if values:
                yield epsilon, Spread.of(values)

    def baselines(self, part: str, metric: str) -> dict[str, Spread]:
        """Recommender -> metric, of each seed once."""
        found: dict[str, dict[int, float]] = {}
        for each in self.results:
            for name, metrics in each.figures[part].items():
                if name != FEDTIDE and metric in metrics:
                    found.setdefault(name, {}).setdefault(each.row.seed, metrics[metric])
        return {name: Spread.of(list(by_seed.values())) for name, by_seed in found.items()}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, the headline first."""
        names = self.results[0].figures[self.parts[0]][FEDTIDE]
        return (self.headline, *(name for name in names if name != self.headline))

    def spent(self, epsilon: float) -> float:
        """The most that a run of an epsilon spent."""
        return max(each.spent for each in self.results if each.row.epsilon == epsilon)

    def statement(self) -> str:
        """How many settings were looked at, and what follows."""
        settings, runs = len(self.asked.epsilons), len(self.results)
        said = (
            f"{settings} settings were looked at, in {runs} runs. Choosing the best of {settings} by the test figures "
            "flatters: choose by the validation figures; what the test split then says of that one setting was not "
            "chosen by. An epsilon is that of one run, on sites of its own: "
            f"on real users {runs} runs would cost each of them the sum over all."
        )
        if "test" not in self.parts:
            said = said.replace("the test figures", "any figures", 1).replace(
                "choose by the validation figures; what the test split then says of that one setting was not chosen by",
                "nobody looked at the test split, so that the one that is chosen can be judged by it",
            )
        if not all(each.public for each in self.results):
            said += (
                " These figures are exact, and of the events of your own log: they are private, and no epsilon covers "
                "them."
            )
        return said

    def as_json(self) -> dict[str, Any]:
        """Every row, and means and standard deviations."""
        return {
            "settings_looked_at": len(self.asked.epsilons),
            "runs": len(self.results),
            "statement": self.statement(),
            "headline": self.headline,
            "rows": [
                {
                    "epsilon": each.row.epsilon,
                    "seed": each.row.seed,
                    "run": each.run,
                    "spent": each.spent,
                    **each.figures,
                }
                for each in self.results
            ],
            "curve": {
                part: [
                    {
                        "epsilon": epsilon,
                        "mean": spread.mean,
                        "standard_deviation": spread.deviation if spread.seeds > 1 else None,
                        "seeds": spread.seeds,
                    }
                    for epsilon, spread in self.spreads(part, self.headline)
                ]
                for part in self.parts
            },
        }
