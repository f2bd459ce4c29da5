"""Runs' folders as `fedtide audit noise` reads them, whose updates a given trainer made: no server, no ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.statistics import release_statistics
from client.training import StepSettings, train_round
from common.config import Plan, make_plan
from common.privacy.noise import SecureGaussian, SecurePoissonSampler
from common.sums import POPULARITY
from common.wire import Request, state_to_bytes
from server.runs import RunFolder
from simulations.audit.conformance.sums import histories_of
from simulations.audit.trainers import Trainer
from simulations.audit.witnesses import Release
from tests.client.training_cases import a_model, batch_of, some_users

PLACES = 256


def plan_of(rounds: int, *, steps: int = 2, **privacy: Any) -> Plan:
    """Two steps a round, unless told, of fifteen users by the public bound."""
    return make_plan(
        {
            "name": "noise",
            "privacy": {"noise_multiplier": 2.0, "users_per_site": 15, "epsilon": 100.0, **privacy},
            "training": {"rounds": rounds, "steps_per_round": steps, "learning_rate": 0.5},
        }
    )


def made_run(
    folder: Path,
    trainer: Trainer = train_round,
    *,
    sites: int = 2,
    rounds: int = 4,
    users: int = 20,
    steps: int = 2,
) -> Path:
    """The folder of a run in which each site trains by itself; what was sent matters to no noise."""
    plan, model = plan_of(rounds, steps=steps), a_model()
    model.set_witness(plan.privacy.witness_places)
    histories = batch_of(some_users(users), 12)

    def update(_: int) -> dict[str, Tensor]:
        return trainer(
            model,
            histories,
            StepSettings.of(plan),
            sampler=SecurePoissonSampler(),
            noise=SecureGaussian(),
        )

    return _written(folder, plan, update, sites=sites, rounds=range(1, rounds + 1))


def made_run_of_sums(folder: Path, *, sites: int = 4) -> Path:
    """The folder of a run of which each site, with nobody in it, released popularity and transitions."""
    plan = make_plan(
        {
            "name": "sums",
            "statistics": {
                "popularity_share": 0.2,
                "transition_share": 0.2,
                "popularity_noise_multiplier": 2.0,
                "transition_noise_multiplier": 1.5,
                "top_items": 8,
            },
            "privacy": {"noise_multiplier": 2.0, "epsilon": 100.0},
        }
    )
    nobody = histories_of([])
    phases = {each.round: each.phase for each in plan.schedule()[:2]}

    def release(number: int) -> dict[str, Tensor]:
        request = Request(
            run="sums",
            round=number,
            attempt=1,
            nonce="ab" * 16,
            plan="",
            state={},
            phase=phases[number],
            released={POPULARITY: torch.arange(20, 0, -1, dtype=torch.float32)},
        )
        return release_statistics(nobody, 20, plan.statistics, request, SecureGaussian(), PLACES)

    return _written(folder, plan, release, sites=sites, rounds=phases)


def _written(
    folder: Path,
    plan: Plan,
    release: Callable[[int], dict[str, Tensor]],
    *,
    sites: int,
    rounds: Iterable[int],
) -> Path:
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan.to_json())
    run, names = RunFolder(folder), [f"site-{place}" for place in range(sites)]
    records, receipts = [], []
    for number in rounds:
        for place, name in enumerate(names):
            key = f"{place:064x}"[::-1]
            run.save_updates(number, {key: state_to_bytes(release(number))})
            receipts.append({"round": number, "site": name, "key_id": key})
        records.append({"round": number, "admitted": names})
    for file, lines in ((run.rounds_file, records), (run.receipts_file, receipts)):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Draws(Protocol):
    """Where simulated noise comes from."""

    def standard_normal(self, size: int) -> npt.NDArray[np.float64]: ...

    def chisquare(self, degrees: int) -> float: ...


def simulated(
    chance: Draws | np.random.Generator,
    *,
    sites: int = 3,
    rounds: int = 6,
    places: int = 64,
    factor: float = 1.0,
) -> list[Release]:
    """Releases of sites whose noise is Gaussian of `factor` of the claimed, witness and rest."""
    rest = 500
    return [
        Release(
            site=f"site-{site}",
            round=number,
            phase="update",
            z=factor * chance.standard_normal(places),
            rest={"all": (factor**2 * float(chance.chisquare(rest)), rest)},
        )
        for number in range(1, rounds + 1)
        for site in range(sites)
    ]
