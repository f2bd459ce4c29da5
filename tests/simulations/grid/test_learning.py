"""Learning without the network is the federation's learning: the same releases give the same model, bit for bit."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

import client.site
from client.generators import Generators
from client.site import release_of
from common.assets import language_model
from common.config import Plan, Precision, WirePlan
from common.events.histories import Histories
from common.models.build import BuiltModel, build_model, item_texts
from simulations.grid.learning import learn, learn_without_privacy
from simulations.grid.sequential import SequentialSettings, train_sequential
from simulations.outcome import Outcome
from simulations.without_privacy import OpenTraining
from tests.tiny import own_cache, tiny_dataset, tiny_run

PLAN = {
    "statistics": {"popularity_share": 0.3, "transition_share": 0.4},
    "pretraining": {"histories": 20, "events": 5, "epochs": 1},
    "privacy": {"noise_multiplier": None},
}


@dataclass
class Seeded:
    """Noise and samples of one stream."""

    chance: np.random.Generator

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        return self.chance.normal(size=size)

    def sample(self, users: int, rate: float) -> npt.NDArray[np.bool_]:
        return self.chance.random(users) < rate


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("grid")
    seeded = Seeded(np.random.default_rng(0))
    with pytest.MonkeyPatch.context() as patch:
        generators = Generators(noise=lambda: seeded, sampler=lambda: seeded)
        patch.setattr(
            client.site, "release_of", lambda charged, **_: release_of(charged, generators=generators)
        )
        return folder, tiny_run(folder, plan=PLAN)


def ingredients(folder: Path, outcome: Outcome) -> tuple[BuiltModel, list[Histories], Plan]:
    with own_cache(folder / "cache"):
        catalog = tiny_dataset(folder / "data").catalog
        built = build_model(
            outcome.plan.model,
            item_texts(catalog.texts, catalog.categories),
            language_model(outcome.plan.model.encoder, offline=True),
        )
    return built, [Histories.load(site.folder / "histories") for site in outcome.sites], outcome.plan


def test_it_is_the_federations_model(federation: tuple[Path, Outcome]) -> None:
    built, sites, plan = ingredients(*federation)
    seeded = Seeded(np.random.default_rng(0))
    phases = []
    model = learn(
        built, sites, plan, noise=seeded, sampler=seeded, watch=lambda phase, _: phases.append(phase)
    )
    of_run = federation[1].run.model_state()
    assert phases == ["statistics", "pre-training", "fine-tuning"]
    for name, value in model.trainable_state().items():
        torch.testing.assert_close(value, of_run[name], rtol=0, atol=1e-6)
    other = Seeded(np.random.default_rng(1))
    differs = learn(built, sites, plan, noise=other, sampler=other).trainable_state()
    assert any(not torch.allclose(differs[name], of_run[name], atol=1e-6) for name in of_run)


def test_updates_are_rounded_as_the_plan_says(federation: tuple[Path, Outcome]) -> None:
    """The same draws in each precision: what differs is less than the noise by far, and is not nothing."""
    built, sites, plan = ingredients(*federation)

    def learned(precision: Precision) -> torch.Tensor:
        rounded, seeded = (
            plan.model_copy(update={"wire": WirePlan(precision=precision)}),
            Seeded(np.random.default_rng(0)),
        )
        state = learn(built, sites, rounded, noise=seeded, sampler=seeded).trainable_state()
        return torch.cat([value.flatten() for value in state.values()])

    start = torch.cat([value.flatten() for value in built.model.trainable_state().values()])
    plain = learned("float32")
    assert torch.equal(learned("float32"), plain)
    moved = float((plain[: len(start)] - start).norm())
    for precision in ("bfloat16", "int8"):
        assert 0 < float((learned(precision) - plain).norm()) < 0.05 * moved


def test_without_privacy_the_start_stays_where_no_epoch_is_better(federation: tuple[Path, Outcome]) -> None:
    built, sites, plan = ingredients(*federation)
    scores = iter([1.0, 0.5, 0.4, 0.3])
    model = learn_without_privacy(
        built, sites[0], plan, OpenTraining(epochs=3, patience=9), lambda _: next(scores), seed=0
    )
    for name, value in model.trainable_state().items():
        assert torch.equal(value, built.model.trainable_state()[name])
    assert model.released is not None
    assert len(model.released.top) == len(built.vectors)


@pytest.mark.parametrize("kind", ["gru4rec", "sasrec"])
def test_sequential_baselines_learn_a_cycle(kind: str) -> None:
    from common.models.batches import HistoryBatch

    items = (torch.arange(12).unsqueeze(0) + torch.arange(40).unsqueeze(1)) % 8
    batch = HistoryBatch(items=items, times=items.clone())

    def score(model: torch.nn.Module) -> float:
        best = model.scores(batch).argmax(1)  # type: ignore[operator]
        return float((best == (items[:, -1] + 1) % 8).float().mean())

    settings = SequentialSettings(width=16, dropout=0.0, epochs=30, learning_rate=1e-2, batch_size=8)
    model = train_sequential(kind, batch, 8, settings, score, seed=0)  # type: ignore[arg-type]
    assert score(model) == 1.0
