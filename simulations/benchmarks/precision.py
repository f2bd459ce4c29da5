"""What rounding does to quality: `python -m simulations.benchmarks.precision` adds it to docs/benchmarks.md.

MovieLens-100K over ten sites at epsilon 8, NDCG@10 on validation data, the test split untouched. Each draw of noise
and of users is kept, and the same run is learned again in each precision with it: a difference is the rounding's.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from common.config import Plan, WirePlan
from common.privacy.noise import SecureGaussian, SecurePoissonSampler
from simulations.benchmarks.table import DOCUMENT, Row, add_to_document, as_table, machine
from simulations.grid.cells import ALONE, BENCHES, TEN, WHOLE, BenchData, built_for, data_of, plan_of
from simulations.grid.learning import learn
from simulations.grid.protocols import judge
from simulations.threads import one_thread

WIRES = {
    "float32": WirePlan(),
    "updates in bfloat16": WirePlan(precision="bfloat16"),
    "updates in int8": WirePlan(precision="int8"),
    "updates in int8, parameters in bfloat16": WirePlan(precision="int8", parameters="bfloat16"),
}
PLAIN = "float32"
RECIPES = (ALONE, WHOLE)
_BENCH, _FAMILY, _EPSILON = BENCHES[0], "recommend", "8"


class KeptDraws:
    """Noise and samples from the operating system, kept, so that a run can be learned again from the same."""

    def __init__(self) -> None:
        self._normals: list[npt.NDArray[np.float64]] = []
        self._samples: list[npt.NDArray[np.bool_]] = []
        self.again()

    def again(self) -> None:
        """From the first draw on."""
        self._next_normal = self._next_sample = 0

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        """See `common.privacy.noise.GaussianNoise`."""
        if self._next_normal == len(self._normals):
            self._normals.append(SecureGaussian().normal(size))
        self._next_normal += 1
        return self._normals[self._next_normal - 1]

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        """See `common.privacy.noise.UserSampler`."""
        if self._next_sample == len(self._samples):
            self._samples.append(SecurePoissonSampler().sample(users, rate))
        self._next_sample += 1
        return self._samples[self._next_sample - 1]


def quality(plan: Plan, data: BenchData, draws: KeptDraws) -> float:
    """NDCG@10 on validation data of one run from the draws."""
    built = built_for(_BENCH, None, plan.model.model_dump_json(), 0)
    model = learn(built, data.ten, plan, noise=draws, sampler=draws)
    model.eval()
    judged = judge(model.scores, data.held_out.validation, data.items, plan.model.max_events)
    return float(judged.ndcg.mean())


def measure(recipe: str, draws: int, said: Callable[[str], None] = print) -> dict[str, list[float]]:
    """NDCG@10 of each draw, by what travels how."""
    data, plan = data_of(_BENCH, None), plan_of(_BENCH, _FAMILY, TEN, _EPSILON, recipe)
    found: dict[str, list[float]] = {name: [] for name in WIRES}
    for draw in range(draws):
        kept = KeptDraws()
        for name, wire in WIRES.items():
            kept.again()
            found[name].append(quality(plan.model_copy(update={"wire": wire}), data, kept))
        figures = ", ".join(f"{name} {values[-1]:.5f}" for name, values in found.items())
        said(f"{recipe}, draw {draw + 1}: {figures}")
    return found


def rows_of(recipe: str, found: dict[str, list[float]]) -> list[Row]:
    """Means over draws, and differences of pairs, each with its standard error; met: no more than two of them lost."""
    plain = found[PLAIN]
    rows = [Row(f"{recipe}: {PLAIN}", f"{_shown(plain)}")]
    for name, values in found.items():
        if name != PLAIN:
            apart = [value - other for value, other in zip(values, plain, strict=True)]
            lost = statistics.mean(apart) < -2 * _error(apart)
            value = f"{_shown(values)}; apart by {_shown(apart, sign='+')}"
            rows.append(Row(f"{recipe}: {name}", value, "no loss beyond two standard errors", not lost))
    return rows


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _shown(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.5f} ± {_error(values):.5f}"


def section_of(recipe: str, found: dict[str, list[float]]) -> str:
    """A section for the page of benchmarks."""
    draws = len(found[PLAIN])
    command = f"python -m simulations.benchmarks.precision --draws {draws}"
    return "\n".join(
        [
            f"## Quality by precision: {recipe}",
            "",
            f"`{command}`, {machine()}, torch {torch.__version__}. MovieLens-100K, ten sites, epsilon 8, family "
            f"`{_FAMILY}` on frozen item vectors, NDCG@10 on validation data: mean ± standard error over {draws} draws "
            "of noise and users; each draw is learned from in every precision, and what is apart is the mean over "
            "these pairs.",
            "",
            *as_table(rows_of(recipe, found)),
            "",
        ]
    )


def main() -> None:
    """Prints a table for each recipe, and adds it to the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=8, help="of noise, at least two")
    parser.add_argument("--no-document", action="store_true", help=f"do not add it to {DOCUMENT}")
    arguments = parser.parse_args()
    if arguments.draws < 2:
        parser.error(f"--draws is {arguments.draws}, but a standard error needs 2: give more")
    one_thread()
    for recipe in RECIPES:
        section = section_of(recipe, measure(recipe, arguments.draws))
        print(section)
        if not arguments.no_document:
            add_to_document(section)


if __name__ == "__main__":
    main()
