"""What the contenders of `comparison.py` share: public arrays in a folder, the model, the clock, the process.

`python -m simulations.benchmarks.comparison_workload WAY FOLDER ROUNDS` runs one contender and writes its times to
FOLDER/WAY.json. It is started in a session of its own, and needs torch and its own framework alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.models.families.recommend import Recommend

FEDTIDE, FLOWER, PFL = "fedtide", "flower", "pfl"


@dataclass(frozen=True)
class Settings:
    """Public constants, the same for all contenders."""

    sites: int
    users: int
    events: int
    hidden: int
    steps: int
    sampling_rate: float
    clip_norm: float
    noise_multiplier: float
    learning_rate: float
    delta: float

    @property
    def users_a_step(self) -> int:
        """As many as one step takes, on average where they are drawn."""
        return round(self.sampling_rate * self.users)


@dataclass(frozen=True)
class Workload:
    """The folder of a comparison."""

    folder: Path

    @classmethod
    def save(cls, folder: Path, settings: Settings, arrays: dict[str, np.ndarray]) -> Workload:
        """Arrays: `vectors` [items, width] and `negatives` [n], `items` and `times` [sites, users, events]."""
        (folder / "settings.json").write_text(json.dumps(asdict(settings)))
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)
        return cls(folder)

    @cached_property
    def settings(self) -> Settings:
        return Settings(**json.loads((self.folder / "settings.json").read_text()))

    def site(self, number: int) -> tuple[Tensor, Tensor]:
        """A site's items and times, each [users, events] int64: a row a user."""
        import torch

        items, times = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("items", "times"))
        return torch.tensor(items[number]), torch.tensor(times[number])

    def model(self, lstm: type[nn.Module]) -> Recommend:
        """The family `recommend` at its start, with another library's LSTM as its core."""
        import torch

        from common.models.families.recommend import Recommend

        torch.manual_seed(0)
        vectors, negatives = (
            torch.from_numpy(np.load(self.folder / f"{name}.npy")) for name in ("vectors", "negatives")
        )
        model = Recommend(
            vectors, hidden_width=self.settings.hidden, negatives=negatives, with_times=True, core="lstm"
        )
        model.core = _core(lstm, model.input_width, self.settings.hidden)
        return model.train()


def _core(lstm: type[nn.Module], input_width: int, hidden_width: int) -> nn.Module:
    from torch import nn

    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output_width = hidden_width
            self.net = lstm(input_width, hidden_width, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.net(x)[0]
            return found

    return Core()


@dataclass
class Times:
    """Seconds since a contender's clock began: wall, and CPU of its session's processes.

    Attributes:
        rounds: that were run.
        laps: at the first round's beginning and, where one can be seen, at each round's end.
        versions: of the libraries at work.
        notes: other figures.
    """

    rounds: int
    laps: list[tuple[float, float]]
    total: tuple[float, float]
    versions: dict[str, str]
    notes: dict[str, float]

    @classmethod
    def read(cls, file: Path) -> Times:
        """What a contender wrote."""
        values = json.loads(file.read_text())
        laps = [(lap[0], lap[1]) for lap in values["laps"]]
        total = (values["total"][0], values["total"][1])
        return cls(values["rounds"], laps, total, values["versions"], values["notes"])

    def a_round(self) -> tuple[float, float]:
        """(wall, CPU) of a round, the mean of all after the first."""
        (wall, cpu), (last_wall, last_cpu) = self.laps[1], self.laps[-1]
        return (last_wall - wall) / (self.rounds - 1), (last_cpu - cpu) / (self.rounds - 1)

    def of_rounds(self, rounds: int) -> tuple[float, float]:
        """(wall, CPU) of so many rounds; each that was not run is taken as long as those after the first."""
        lacking = rounds - self.rounds
        if lacking <= 0:
            return self.total
        wall, cpu = self.a_round()
        return self.total[0] + lacking * wall, self.total[1] + lacking * cpu


class Clock:
    """Looks every half second at what the session's processes have used: some end before they are asked."""

    def __init__(self, *, from_start: bool = False) -> None:
        """Args:
        from_start: whether it began with this process, imports and all; else where it is entered.
        """
        self._from_start = from_start
        self._seen: dict[tuple[int, int], float] = {}
        self._peaks: dict[tuple[int, int], float] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.laps: list[tuple[float, float]] = []
        self.notes: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._began = _started() if self._from_start else time.monotonic()
        self._before = 0.0 if self._from_start else self._cpu()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._total = self.now()
        self._stop.set()
        self._thread.join()

    def now(self) -> tuple[float, float]:
        """(wall, CPU) since it began."""
        return time.monotonic() - self._began, self._cpu() - self._before

    def lap(self) -> None:
        """Notes the first round's beginning, or a round's end."""
        self.laps.append(self.now())

    def times(self, rounds: int, versions: dict[str, str]) -> Times:
        """What was measured; once the clock is left."""
        return Times(rounds, self.laps, self._total, versions, self.notes)

    @property
    def peak(self) -> float:
        """Megabytes: the largest resident size of each of the session's processes, added."""
        return sum(self._peaks.values())

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._cpu()

    def _cpu(self) -> float:
        with self._lock:
            for process, (seconds, peak) in session_use(os.getsid(0)).items():
                self._seen[process], self._peaks[process] = seconds, peak
            return sum(self._seen.values())


def _started() -> float:
    """When this process began, on the clock of `time.monotonic`, to the hundredth of a second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot = float(Path("/proc/uptime").read_text().split()[0])
    return time.monotonic() - since_boot + ticks / os.sysconf("SC_CLK_TCK")


def session_use(session: int) -> dict[tuple[int, int], tuple[float, float]]:
    """(process, its start) -> its own CPU seconds and largest resident megabytes, for every process of a session."""
    found, tick = {}, os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) != session:
                    continue
                status = (entry / "status").read_text().split()
            except OSError:
                continue  # it ended
            if "VmHWM:" in status:  # one that has ended, and was not waited for, has no memory
                peak = int(status[status.index("VmHWM:") + 1]) / 1024
                seconds = (int(fields[11]) + int(fields[12])) / tick
                found[int(entry.name), int(fields[19])] = seconds, peak
    return found


def main() -> int:
    """Runs one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=(FEDTIDE, FLOWER, PFL))
    parser.add_argument("folder", type=Path)
    parser.add_argument("rounds", type=int)
    given = parser.parse_args()
    # By their real names: what is sent to other processes must be found there.
    from simulations.benchmarks import comparison_ways
    from simulations.benchmarks.comparison_workload import Workload as Shared

    runs: dict[str, Callable[[Shared, int], Times]] = {
        FEDTIDE: comparison_ways.fedtide,
        FLOWER: comparison_ways.flower,
        PFL: comparison_ways.pfl,
    }
    times = runs[given.way](Shared(given.folder), given.rounds)
    (given.folder / f"{given.way}.json").write_text(json.dumps(asdict(times)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
