"""`python -m simulations.results`: the table of results in docs/results.md, five seeds, from scratch.

Each seed is a run of the default plan of its own: another start of the model, fresh noise and sampling. The
split of the data is the same for all. Nothing is chosen here; settings are the plan's.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.config import Plan
from common.metrics import mean_metric, paired_difference
from simulations.datasets import load_movielens_100k
from simulations.federation import CONTENT, FEDTIDE, OPEN, POPULARITY, Outcome, SimulationOptions, simulate
from simulations.quality import TOP
from simulations.report import SIGNIFICANT_Z

SHOWN = (POPULARITY, CONTENT, FEDTIDE, OPEN)
TARGET = Path("docs/results.md")
CONFIGURATIONS = (
    "Settings of the default plan were chosen on the validation split, before any run of this command: 12 "
    "configurations of clip norm (0.1, 0.3, 1), learning rate (1 to 8), scale of the item prior (1, 4, 8), sampling "
    "rate (0.25, 0.5, 1), steps (30, 60, 120) and width (32, 64), one run each. All lay within one standard error of "
    "one another, but for the two weakest. The baselines have no settings, but for the model without privacy, whose "
    "learning rate is AdamW's usual 3e-3 (one configuration) and whose epoch is chosen on validation."
)


@dataclass(frozen=True)
class Row:
    """One recommender over the seeds: values of a metric, and mean NDCG of each user over the seeds."""

    name: str
    values: dict[str, list[float]]
    ndcg: npt.NDArray[np.float64]


def rows_of(outcomes: list[Outcome]) -> list[Row]:
    """Gathers the outcomes of all seeds, test split."""
    rows = []
    for name in SHOWN:
        qualities = [outcome.test[name] for outcome in outcomes]
        metrics = {
            metric: [quality.metrics[metric].value for quality in qualities]
            for metric in qualities[0].metrics
        }
        rows.append(Row(name, metrics, np.mean([quality.per_user for quality in qualities], axis=0)))
    return rows


def sentence(own: Row, other: Row) -> str:
    """The paired comparison in words."""
    paired = paired_difference(own.ndcg, other.ndcg)
    if abs(paired.z) < SIGNIFICANT_Z:
        verdict = "**no significant difference**"
    else:
        verdict = "better" if paired.mean > 0 else "**worse**"
    return (
        f"Against {other.name}: NDCG@{TOP} {paired.mean:+.4f} ± {paired.standard_error:.4f}, z = {paired.z:.1f}: "
        f"{verdict}."
    )


def page(outcomes: list[Outcome], command: str, seconds: float) -> str:
    """docs/results.md."""
    rows = rows_of(outcomes)
    own = next(row for row in rows if row.name == FEDTIDE)
    plan, first = outcomes[0].plan, outcomes[0]
    users = len(own.ndcg)
    sizes = [site.users for site in first.sites]
    header = ["model", *own.values]
    lines = [
        "# Results",
        "",
        f"Made by `{command}` in {seconds:.0f} s on {time.strftime('%Y-%m-%d')} ({platform.machine()}, Python "
        f"{platform.python_version()}, torch {version('torch')}, Opacus {version('opacus')}, "
        f"dp-accounting {version('dp-accounting')}).",
        "",
        f"MovieLens-100K, {len(first.sites)} sites by first digit of the ZIP code ({min(sizes)} to {max(sizes)} users "
        f"each, {users} in all). Leave-one-out: a user's last event is the "
        "test, the one before it the validation; ranking against the full catalog, seen items masked, ties at "
        "mid-rank; events at equal times in the order of a keyed hash. Test split, looked at once for each seed, after "
        "everything was fixed.",
        "",
        f"Each user of each site has epsilon {first.privacy.epsilon:.3f} (PLD) at delta {plan.privacy.delta:g} over "
        f"the whole run: {plan.steps} steps, sampling rate {plan.privacy.sampling_rate:g}, noise multiplier "
        f"{plan.privacy.noise_multiplier:g}, clip norm {plan.privacy.clip_norm:g}. Five seeds are five runs: whoever "
        "took part in all five would have spent them all.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for row in rows:
        name = f"{row.name}, epsilon {plan.privacy.epsilon:g}" if row.name == FEDTIDE else row.name
        cells = [f"{np.mean(v):.4f} ± {np.std(v, ddof=1):.4f}" for v in row.values.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    error = mean_metric(own.ndcg).standard_error
    lines += [
        "",
        f"± is the standard deviation over {len(outcomes)} seeds. The standard error over users is larger: "
        f"{error:.4f} for NDCG@{TOP} of Fedtide. Paired over {users} users, NDCG of each user averaged over the seeds:",
        "",
        *(f"- {sentence(own, other)}" for other in rows if other is not own),
        "",
        CONFIGURATIONS,
        "",
        "Quality is measured on the researcher's side, on public data. Evaluation is no release of a site.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs every seed and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m simulations.results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=TARGET)
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds must be at least 2: a standard deviation needs two runs")
    began = time.monotonic()
    dataset = load_movielens_100k()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            plan = Plan()
            plan = plan.model_copy(
                update={"name": f"seed-{seed}", "model": plan.model.model_copy(update={"seed": seed})}
            )
            outcome = simulate(dataset, plan, SimulationOptions(engine="inline", runs=Path(folder)))
            print(f"seed {seed}: {outcome.test[FEDTIDE].metrics[f'NDCG@{TOP}'].value:.4f}", file=sys.stderr)
            outcomes.append(outcome)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    text = page(outcomes, "python -m simulations.results", time.monotonic() - began)
    given.output.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
