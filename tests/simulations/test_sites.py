"""Simulated sites: cleaned at once, each has what cleaning its own part of the log gives; kept, their anchors go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from client.ledger import Ledger
from client.policy import ANY_PLAN, Performance, PolicyError
from client.site_folder import Site
from common.config import PlanError
from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, clean
from common.events.histories import Histories
from common.events.schema import EVENT_SCHEMA, LogError
from server.registry import RegistryReader
from simulations.cli import simulate_app
from simulations.datasets import Dataset, load_movielens_100k
from simulations.partition import divide, log_of_site
from simulations.sites import histories_of_sites, registry_folder, simulated_secret
from tests.tiny import tiny_run

ITEMS = tuple(f"item-{row}" for row in range(30))
POLICY = CleaningPolicy(minimum_events=2, max_events_per_user=40)


def _messy(seed: int, users: int = 40, events: int = 1500) -> Dataset:
    """Equal times, duplicates, gaps, unknown items, kinds of few users, and users that no site is given."""
    chance = np.random.default_rng(seed)

    def some(values: list[str | None], shares: list[float] | None = None) -> list[str | None]:
        return [values[place] for place in chance.choice(len(values), size=events, p=shares)]

    names: list[str | None] = [f"user-{row}" for row in range(users + 3)]
    log = pl.LazyFrame(
        {
            "user": some([*names, None]),
            "item": some([*ITEMS, "item-unheard-of", None]),
            "time": [None if time == 7 else int(time) for time in chance.integers(0, 50, events)],
            "kind": some(["view", "buy", None, "rare"], [0.6, 0.2, 0.19, 0.01]),
            "value": [None if value < 0.5 else value for value in chance.random(events)],
        },
        schema=dict(EVENT_SCHEMA),
    )
    catalog = Catalog(ITEMS, ITEMS, ((),) * len(ITEMS))
    return Dataset("messy", log, catalog, pl.DataFrame({"user": names[:users]}), "CC0-1.0")


def _same(found: Histories, expected: Histories) -> None:
    for field in dataclasses.fields(Histories):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "kind_names":
            assert mine == theirs
        else:
            assert mine.dtype == theirs.dtype
            assert mine.tobytes() == theirs.tobytes(), field.name


def _one_by_one(dataset: Dataset, sites: np.ndarray, policy: CleaningPolicy, seed: int) -> list[Histories]:
    return [
        clean(log_of_site(dataset, sites, site), dataset.catalog, policy, simulated_secret(seed))[0]
        for site in range(int(sites.max()) + 1)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_sites_cleaned_at_once_are_the_sites_cleaned_one_by_one(seed: int) -> None:
    dataset = _messy(seed)
    sites = np.random.default_rng(seed).integers(0, 3, len(dataset.users))
    expected = _one_by_one(dataset, sites, POLICY, seed)
    found = list(histories_of_sites(dataset, sites, POLICY, seed))
    for mine, theirs in zip(found, expected, strict=True):
        _same(mine, theirs)
    with pytest.raises(AssertionError):  # another seed orders ties otherwise
        _same(next(histories_of_sites(dataset, sites, POLICY, seed + 1)), expected[0])


def test_the_ten_regions_of_movielens_are_the_same_either_way() -> None:
    dataset = load_movielens_100k()
    sites = divide(dataset, "zip")
    expected = _one_by_one(dataset, sites, CleaningPolicy(), 0)
    for mine, theirs in zip(histories_of_sites(dataset, sites, CleaningPolicy(), 0), expected, strict=True):
        _same(mine, theirs)


def test_a_site_of_which_nothing_is_left_says_why() -> None:
    dataset = _messy(0)
    sites = np.zeros(len(dataset.users), dtype=np.int64)
    sites[0] = 2
    made = histories_of_sites(dataset, sites, CleaningPolicy(), 0)
    assert len(next(made))
    with pytest.raises(LogError, match="nothing is left of the log"):
        next(made)


def test_simulated_sites_compute_as_was_asked_and_go_on_so_until_asked_otherwise(tmp_path: Path) -> None:
    sites, plan = tmp_path / "sites", {"training": {"rounds": 1, "steps_per_round": 1}}
    first, second = Performance(micro_batch=8, threads=1), Performance(micro_batch=16, engine="opacus")
    for asked, found in ((first, first), (None, first), (second, second)):
        outcome = tiny_run(tmp_path, plan=plan, sites=sites, site_budget=50.0, performance=asked)
        assert len(outcome.sites) == 4
        assert all(Site.load(each.folder).performance == found for each in outcome.sites)
        assert all(Site.load(each.folder).limits == ANY_PLAN for each in outcome.sites)
        assert [len(each["admitted"]) for each in outcome.run.records()] == [4]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "tpu"), "device: input should be 'cpu', 'cuda' or 'auto'"),
        (("--micro-batch", "9"), "--micro-batch: input should be a multiple of 8"),
        (("--dp-engine", "slow"), "engine: input should be 'fast' or 'opacus'"),
        (("--frozen-precision", "int8"), "--frozen-precision: input should be 'float32' or 'bfloat16'"),
        (("--set", "performance.device=cpu"), "how a site computes is no part of a plan"),
        (("--set", "model.frozen_precision=bfloat16"), "`fedtide simulate` --device"),
    ],
)
def test_a_simulation_is_told_how_sites_compute_by_options_and_not_in_its_plan(
    options: tuple[str, ...], says: str
) -> None:
    refused = CliRunner().invoke(simulate_app, ["--offline", *options])
    assert isinstance(refused.exception, PolicyError | PlanError), refused.output
    assert says in str(refused.exception)


def test_sites_that_are_kept_have_one_registry_over_all_runs_beside_them(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    for runs in (1, 2):
        outcome = tiny_run(tmp_path, sites=kept, site_budget=20.0, n_sites=2, baseline_epochs=0)
        assert {each.name for each in kept.iterdir()} == {"00000", "00001", "catalog.jsonl", "split.txt"}
        assert not (outcome.run.path / "registry").exists()
        reader = RegistryReader(registry_folder(kept))
        rounds = len(outcome.plan.schedule())
        for number, site in enumerate(reader.sites()):
            assert len(reader.anchors(site.key_id)) == runs * rounds
            with Ledger.open(kept / f"{number:05d}" / "ledger") as ledger:
                assert ledger.status().seq >= reader.chain(site.key_id).head.seq


def test_a_runs_registry_lies_in_the_run_and_that_of_an_older_version_stays(tmp_path: Path) -> None:
    sites = tmp_path / "sites"
    sites.mkdir()
    assert (
        registry_folder(sites) == tmp_path / "sites-registry"
    )  # of no run: perhaps a server's folder lies there
    (tmp_path / "plan.json").touch()
    assert registry_folder(sites) == tmp_path / "sites-registry"
    (tmp_path / "rounds").mkdir()
    assert registry_folder(sites) == tmp_path / "registry"
    (sites / "registry").mkdir()
    assert registry_folder(sites) == sites / "registry"
