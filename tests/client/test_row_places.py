"""A user's numbers are the same to the last bit in every row of a unit, beside whomever and however many.

Parameters far off, which a server may send, make a rounding as large as it gets; so none may depend on others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.grid_sums import GridSums
from client.self_test import catalog_of, random_histories, rows_of_scores, rows_of_units, sums_by
from client.training_together import UNIT, check_sites_apart, clipped_sums_of_units
from common.config import make_plan
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.interface import InterestModel
from common.models.names import FAMILIES
from simulations.audit.conformance.subjects import EVENTS, Subject, a_subject, some_users
from tests.client.training_cases import moved

ROWS, ME = 48, 7
SIZES = (1, 2, 8, 9, 16, 17, 24, 25, 47, 48)
"""Users of a unit."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subjects")


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def spellings(
    model: InterestModel,
    everyone: HistoryBatch,
    rows: int,
    engine: Any = "fast",
    sizes: tuple[int, ...] = SIZES,
) -> int:
    """In how many ways one user's numbers come out, at most, over places, numbers and kinds of others.

    Args:
        everyone: made-up users, of whom ME is looked at.
    """
    chance, ways = random.Random(1), dict[str, set[bytes]]()
    seen: dict[str, Tensor] = {}
    with sums_by(engine, model, rows, seen.update) as clipped:
        for users in (size for size in sizes if size <= rows):
            for place in {0, users - 1, chance.randrange(users)}:
                chosen = torch.tensor(chance.choices(range(len(everyone)), k=users))
                chosen[place] = ME
                clipped(model.prepare(everyone.rows(chosen).unit(rows)).first(users), 1.0)
                for name, part in seen.items():
                    ways.setdefault(name, set()).add(part[place].detach().numpy().tobytes())
    return max(len(each) for each in ways.values())


def of_subject(subject: Subject, engine: Any = "fast") -> int:
    model = subject.rewound()
    everyone = subject.batch(some_users(40, subject.items))
    return spellings(model, everyone, rows_of_units(model, ROWS, EVENTS, engine), engine)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["vectors", "lora"])
def test_a_users_gradient_is_the_same_in_every_row_beside_whomever(
    family: str, mode: str, folder: Path
) -> None:
    assert of_subject(a_subject(folder, family, mode, "cpu")) == 1


@pytest.mark.parametrize("mode", ["vectors", "lora"])
def test_by_opacus_hooks_it_is_so_too(mode: str, folder: Path) -> None:
    assert of_subject(a_subject(folder, "recommend", mode, "cpu"), "opacus") == 1


@pytest.mark.parametrize("core", ["gru", "attention", "decay"])
def test_it_is_so_with_every_core(core: str, folder: Path) -> None:
    assert of_subject(a_subject(folder, "recommend", "vectors", "cpu", core=core)) == 1


def test_it_is_so_with_a_frozen_part_in_bfloat16(folder: Path) -> None:
    assert of_subject(a_subject(folder, "recommend", "lora", "cpu", frozen_precision="bfloat16")) == 1


def a_wide_model(core: str, width: int, hidden: int, off: float) -> Recommend:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vectors = torch.nn.functional.normalize(torch.randn(100, width), dim=-1)
        model = Recommend(vectors, core=core, hidden_width=hidden, with_times=True)
    moved(model, by=off)
    return model


@pytest.mark.parametrize(
    ("core", "width", "hidden", "off"),
    [
        ("gru", 16, 384, 3.0),
        ("lstm", 16, 192, 10.0),
        ("lstm", 64, 16, 100.0),
        ("attention", 16, 256, 10.0),
        ("decay", 256, 16, 10.0),
    ],
)
def test_it_is_so_at_the_widths_that_a_plan_may_ask_for_with_one_thread_and_with_several(
    core: str, width: int, hidden: int, off: float, threads: int
) -> None:
    model = a_wide_model(core, width, hidden, off)
    everyone = random_histories(catalog_of(model, torch.device("cpu")), 40, EVENTS)
    assert spellings(model, everyone, rows_of_units(model, ROWS, EVENTS), sizes=(8, 9, 48)) == 1


@pytest.mark.parametrize(("core", "hidden"), [("gru", 512), ("lstm", 256), ("attention", 128), ("decay", 16)])
def test_a_users_scores_are_the_same_beside_whomever(core: str, hidden: int) -> None:
    model, ways = a_wide_model(core, 16, hidden, 10.0), set()
    everyone = random_histories(100, 40, EVENTS)
    rows = rows_of_scores(model, ROWS, EVENTS)
    for users in (size for size in SIZES if size <= rows):
        for place in {0, users - 1}:
            chosen = torch.randint(40, (users,))
            chosen[place] = ME
            ways.add(model.scores(everyone.rows(chosen).unit(rows))[place].numpy().tobytes())
    assert len(ways) == 1


def test_one_that_depends_on_the_row_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = a_subject(folder, "recommend", "vectors", "cpu")
    model, loss = subject.rewound(), subject.model.per_user_loss
    monkeypatch.setattr(
        model, "per_user_loss", lambda batch: loss(batch) * (1 + 2**-23 * (torch.arange(len(batch)) % 2))
    )
    everyone = subject.batch(some_users(40, subject.items))
    for engine in ("fast", "opacus"):
        assert spellings(model, everyone, ROWS, engine) > 1


@pytest.mark.parametrize("core", ["lstm", "gru", "attention", "decay"])
@pytest.mark.parametrize("hidden", [4, 256])
def test_in_a_batch_of_many_sites_it_is_so_too(core: str, hidden: int, folder: Path) -> None:
    small = hidden == 4
    subject = a_subject(folder, "recommend", "vectors", "cpu", core=core)
    model = subject.rewound() if small else a_wide_model(core, 16, hidden, 3.0)
    everyone = subject.batch(some_users(40, subject.items)) if small else random_histories(100, 40, EVENTS)
    chance, rows = random.Random(1), 8 * UNIT
    unit = check_sites_apart(model, rows, EVENTS + -EVENTS % 4)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.trainable().values()])
    ways = set()
    with clipped_sums_of_units(model) as add:
        for place in range(rows):
            chosen = torch.tensor(chance.choices(range(40), k=rows))
            chosen[place] = ME
            parameters = flat + torch.randn(rows // unit, len(flat))  # of other sites
            parameters[place // unit] = flat
            sums = GridSums(torch.empty(1, len(flat), dtype=torch.float64), 1.0)
            into = [0 if row == place else -1 for row in range(rows)]
            add(parameters, everyone.rows(chosen).with_even_events(), into, sums, 1.0)
            ways.add(sums.finish().numpy().tobytes())
    assert len(ways) == 1


@pytest.mark.parametrize("field", ["width", "hidden_width"])
@pytest.mark.parametrize("value", [6, 17])
def test_a_width_for_which_it_is_not_so_is_refused(field: str, value: int) -> None:
    """Seen on x86 with MKL: rows of 6 numbers begin at other multiples of 32 bytes than of 64."""
    with pytest.raises(ValueError, match=f"{field}.*multiple of 4"):
        make_plan({"model": {field: value}})
