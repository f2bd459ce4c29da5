"""Aggregation: the robust ones are Flower's own, equal numpy's, and withstand a bad site; the mean does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import PlanError, ServerPlan, make_plan
from server.aggregation import aggregation, check_aggregation, fewest_updates, mean
from tests.tiny import tiny_dataset, tiny_language_model, tiny_options, tiny_plan

SHAPES = {"core.weight": (7, 3), "head.bias": (5,), "scale": ()}
ROBUST = ("median", "trimmed-mean", "krum")


def updates(count: int, seed: int = 0, around: float = 0.0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) + around for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def stacked(found: list[dict[str, Tensor]], name: str) -> np.ndarray:
    return np.stack([each[name].numpy().astype(np.float64) for each in found])


def plan(kind: str, bad: int = 0) -> ServerPlan:
    return ServerPlan.model_validate({"aggregation": kind, "malicious_sites": bad})


@pytest.mark.parametrize("count", [5, 6, 9])
def test_mean_median_and_trimmed_mean_equal_numpy(count: int) -> None:
    found = updates(count)
    for name, shape in SHAPES.items():
        values = stacked(found, name)
        trimmed = np.sort(values, axis=0)[2 : count - 2].mean(axis=0)
        wanted = {"mean": values.mean(axis=0), "median": np.median(values, axis=0), "trimmed-mean": trimmed}
        for kind, value in wanted.items():
            got = aggregation(plan(kind, 2 if kind == "trimmed-mean" else 0))(found)
            assert got[name].dtype == torch.float32
            assert got[name].shape == shape
            np.testing.assert_allclose(got[name].numpy(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", range(1, 40))
def test_the_trimmed_mean_trims_exactly_as_many_as_may_be_bad(bad: int) -> None:
    """Flower trims int(beta n): a share rounded the wrong way would leave one bad site in."""
    for count in (2 * bad + 1, 2 * bad + 2, 3 * bad + 1):
        values = torch.arange(count, dtype=torch.float32)
        values[-bad:] = 1e6
        got = aggregation(plan("trimmed-mean", bad))([{"x": value} for value in values])["x"]
        assert float(got) == pytest.approx(np.sort(values.numpy())[bad : count - bad].mean())


@pytest.mark.parametrize(("count", "bad"), [(5, 1), (7, 2), (8, 1)])
def test_krum_chooses_whom_the_definition_chooses(count: int, bad: int) -> None:
    found = updates(count, seed=count)
    flat = np.stack([np.concatenate([each[n].numpy().ravel() for n in sorted(SHAPES)]) for each in found])
    distances = ((flat[:, None].astype(np.float64) - flat[None]) ** 2).sum(axis=2)
    scores = [np.sort(np.delete(row, place))[: count - bad - 2].sum() for place, row in enumerate(distances)]
    chosen = found[int(np.argmin(scores))]
    got = aggregation(plan("krum", bad))(found)
    assert all(torch.equal(got[name], chosen[name]) for name in SHAPES)


def test_krum_tells_updates_apart_that_are_close_for_their_size() -> None:
    """In float32, |x|^2 + |y|^2 - 2xy would lose these distances altogether."""
    base = {"x": torch.full((50,), 1000.0)}
    found = [{"x": base["x"] + shift} for shift in (0.0, 0.01, 0.02, 0.03, 5.0)]
    got = aggregation(plan("krum", 1))(found)["x"]
    assert float((got - base["x"]).mean()) == pytest.approx(0.01, abs=2e-4)


@pytest.mark.parametrize("kind", ROBUST)
@pytest.mark.parametrize("lie", ["huge", "negated", "constant"])
def test_one_bad_site_moves_the_mean_and_not_the_robust_ones(kind: str, lie: str) -> None:
    found = updates(5, around=1.0)
    honest = mean(found[:4])
    bad = {
        "huge": lambda value: value * 1e5,
        "negated": lambda value: -50 * value,
        "constant": lambda value: torch.full_like(value, 300.0),
    }[lie]
    found[4] = {name: bad(value) for name, value in found[4].items()}
    got = aggregation(plan(kind, 1))(found)
    moved = mean(found)

    def away(state: dict[str, Tensor]) -> float:
        return float(sum((state[name] - honest[name]).square().sum() for name in SHAPES) ** 0.5)

    assert away(moved) > 40
    assert away(got) < 10


def test_robust_aggregation_works_in_a_process_that_is_no_run() -> None:
    """A fresh process has no task identity, which Flower asks for when a message is made."""
    code = (
        "import torch; from common.config import ServerPlan; from server.aggregation import aggregation\n"
        "for kind in ('median', 'trimmed-mean', 'krum'):\n"
        "    plan = ServerPlan(aggregation=kind, malicious_sites=1)\n"
        "    aggregation(plan)([{'x': torch.ones(2) * n} for n in range(5)])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("kind", "bad", "sites", "says"),
    [
        ("mean", 1, 10, "server.malicious_sites is 1, but one bad site moves the mean"),
        ("trimmed-mean", 0, 10, "a trimmed mean trims nothing"),
        ("trimmed-mean", 2, 4, "4 sites take part, but trimmed-mean with malicious_sites 2 needs 5"),
        ("median", 2, 4, "4 sites take part, but median with malicious_sites 2 needs 5"),
        ("krum", 1, 4, "4 sites take part, but krum with malicious_sites 1 needs 5"),
        ("krum", 0, 2, "2 sites take part, but krum with malicious_sites 0 needs 3"),
    ],
)
def test_what_cannot_withstand_so_many_bad_sites_is_an_error(
    kind: str, bad: int, sites: int, says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        check_aggregation(plan(kind, bad), sites)


def test_enough_sites_are_no_error_and_one_fewer_is() -> None:
    for kind in ROBUST:
        enough = fewest_updates(plan(kind, 2))
        check_aggregation(plan(kind, 2), enough)
        with pytest.raises(PlanError):
            check_aggregation(plan(kind, 2), enough - 1)
    five = make_plan({"server": {"minimum_sites": 5}}).server
    check_aggregation(five, 5)
    with pytest.raises(PlanError, match=r"server.minimum_sites needs 5"):
        check_aggregation(five, 4)


def test_too_few_sites_end_a_simulation_before_any_site_is_made(tmp_path: Path) -> None:
    from simulations.federation import simulate

    server = {"aggregation": "krum", "malicious_sites": 1}
    planned = tiny_plan(tiny_language_model(tmp_path / "lm"), server=server)
    with pytest.raises(PlanError, match="krum with malicious_sites 1 needs 5"):
        simulate(tiny_dataset(tmp_path / "data"), planned, tiny_options(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
