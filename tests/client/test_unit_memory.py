"""What a unit of rows takes, as it is estimated: beside what a step of a process of its own really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client.policy import Performance
from client.unit_memory import unit_memory
from common.config import Plan, make_plan

ITEMS = 500
LIBRARIES = 200 * 2**20
"""Bytes that a first step takes once, whatever the model: libraries that are imported, caches that are filled."""

STEP = f"""
import json, sys
from pathlib import Path
import torch
from client.self_test import random_histories
from client.training import StepSettings, train_round
from common.model_plan import ModelPlan
from common.models.names import FAMILIES, named
from common.models.sequence import Ingredients
from common.models.tasks.next_item import NextItem
from common.privacy.noise import SecureGaussian, SecurePoissonSampler

torch.set_num_threads(1)
given = json.loads(sys.argv[1])
rows, engine, plan = given["rows"], given["engine"], ModelPlan(**given["model"])
vectors = torch.nn.functional.normalize(torch.randn({ITEMS}, plan.width), dim=-1)
task = NextItem(vectors, negatives=None if plan.negatives is None else torch.arange(plan.negatives))
model = named(FAMILIES, plan.family).of(Ingredients(vectors, task, None, None, None, plan))
histories = random_histories({ITEMS}, rows, plan.max_events)


def most() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


before = most()
settings = StepSettings(1.0, 1.0, 1.0, 64.0, 1, 0.1, micro_batch=rows, engine=engine)
train_round(model, histories, settings, sampler=SecurePoissonSampler(), noise=SecureGaussian())
print(most() - before)
"""


def taken(model: dict[str, Any], performance: Performance) -> int:
    """Bytes by which a process of its own grows at most while it trains for one step."""
    given = {"rows": performance.micro_batch, "engine": performance.engine, "model": model}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", STEP, json.dumps(given)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=240,
    )
    return int(found.stdout)


def of(**model: Any) -> Plan:
    return make_plan({"model": model})


@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a process is read from /proc")
@pytest.mark.parametrize(
    ("model", "performance"),
    [
        ({"hidden_width": 256}, Performance(micro_batch=96)),
        ({"core": "attention", "max_events": 200, "negatives": 50}, Performance()),
        ({"core": "decay", "hidden_width": 64}, Performance()),
        ({"hidden_width": 192}, Performance(engine="opacus")),
    ],
)
def test_a_step_takes_no_more_than_is_estimated(model: dict[str, Any], performance: Performance) -> None:
    estimated, really = unit_memory(of(**model), performance, items=ITEMS), taken(model, performance)
    assert really <= estimated + LIBRARIES
    assert really >= estimated / 6  # or the estimate would refuse what fits


@pytest.mark.parametrize(
    "larger",
    [
        {"width": 128},
        {"hidden_width": 32},
        {"max_events": 100},
        {"negatives": 400},
        {"core": "decay", "hidden_width": 64},
        {"mode": "lora"},
        {"family": "lstm-vae"},
        {"family": "lstm-vae", "latent_width": 512},
        {"family": "lstm-lm"},
        {"family": "ensemble"},
    ],
)
def test_it_grows_with_every_size_of_a_plan(larger: dict[str, Any]) -> None:
    small = {"core": "gru", "negatives": 10}
    assert unit_memory(of(**small | larger), Performance()) > unit_memory(of(**small), Performance())


@pytest.mark.parametrize("larger", [{"most_tokens": 320}, {"lora_layers": 4}])
def test_with_adapters_it_grows_with_tokens_and_layers(larger: dict[str, Any]) -> None:
    small = {"mode": "lora", "max_events": 20}
    assert unit_memory(of(**small | larger), Performance()) > 1.2 * unit_memory(of(**small), Performance())


def test_it_follows_the_units_rows_and_never_the_users_of_a_site() -> None:
    eight, sixteen = (unit_memory(of(), Performance(micro_batch=rows)) for rows in (8, 16))
    assert sixteen == 2 * eight
    many = make_plan({"privacy": {"users_per_site": 1_000_000, "delta": 1e-9, "sampling_rate": 1.0}})
    assert unit_memory(many, Performance(micro_batch=8)) == eight


def test_it_grows_with_the_catalog_where_the_loss_ranks_it() -> None:
    whole, some = of(), of(negatives=100)
    sums = make_plan({"training": {"rounds": 0}, "statistics": {"popularity_share": 1.0}})
    for plan, factor in ((whole, 50), (some, 2)):
        small, large = (unit_memory(plan, Performance(), items=items) for items in (1_000, 100_000))
        assert large > small * factor
    assert unit_memory(sums, Performance(), items=10**6) == 0
    by_category = of(task="next-category")
    assert unit_memory(by_category, Performance(), items=10**6, categories=20) == unit_memory(
        by_category, Performance(), items=10, categories=20
    )
