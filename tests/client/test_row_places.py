"""A user's gradient is the same to the last bit, whichever row the user has, and however many others there are.

Parameters far off, which a server may send, make a rounding as large as it gets; so none may depend on others.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import client.bookkeeping
from client.bookkeeping import clipped_sums
from client.grid_sums import GridSums
from client.training_together import UNIT, clipped_sums_of_units
from common.config import make_plan
from common.models.names import FAMILIES
from simulations.audit.conformance.subjects import Subject, a_subject, some_users

USERS = 40
ME = 7
SIZES = (1, 2, 3, 7, 8, 9, 17)
Taken = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subjects")


def spellings(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> int:
    """In how many ways one user's part of a layer comes out, at most, over places, numbers and kinds of others."""
    model, rows, chance = subject.rewound(), some_users(USERS, subject.items), random.Random(1)
    found: list[Taken] = []
    add = client.bookkeeping._sum_clipped

    def seen(taken: Taken, *others: Any) -> None:
        found.append({name: (a.clone(), g.clone()) for name, (a, g) in taken.items()})
        add(taken, *others)

    monkeypatch.setattr("client.bookkeeping._sum_clipped", seen)
    ways: dict[tuple[str, int], set[bytes]] = {}
    with clipped_sums(model) as clipped:
        for users in SIZES:
            for place in range(users):
                batch = chance.choices(rows, k=users)
                batch[place] = rows[ME]
                found.clear()
                clipped(model.prepare(subject.batch(batch).evened()).first(users), 1.0)
                for name, sides in found[0].items():
                    for side, part in enumerate(sides):
                        ways.setdefault((name, side), set()).add(part[place].numpy().tobytes())
    return max(len(each) for each in ways.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["vectors", "lora"])
def test_a_users_gradient_is_the_same_in_every_row_beside_whomever(
    family: str, mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert spellings(a_subject(folder, family, mode, "cpu"), monkeypatch) == 1


@pytest.mark.parametrize("core", ["gru", "attention", "decay"])
def test_it_is_so_with_every_core(core: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spellings(a_subject(folder, "recommend", "vectors", "cpu", core=core), monkeypatch) == 1


def test_it_is_so_with_a_frozen_part_in_bfloat16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = a_subject(folder, "recommend", "lora", "cpu", frozen_precision="bfloat16")
    assert spellings(subject, monkeypatch) == 1


def test_one_that_depends_on_the_row_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = a_subject(folder, "recommend", "vectors", "cpu")
    loss = subject.model.per_user_loss
    monkeypatch.setattr(
        subject.model,
        "per_user_loss",
        lambda batch: loss(batch) * (1 + 2**-23 * (torch.arange(len(batch)) % 2)),
    )
    assert spellings(subject, monkeypatch) > 1


@pytest.mark.parametrize("core", ["lstm", "gru", "attention", "decay"])
def test_in_a_batch_of_many_sites_it_is_so_too(core: str, folder: Path) -> None:
    subject, chance, units = a_subject(folder, "recommend", "vectors", "cpu", core=core), random.Random(1), 8
    model, rows = subject.rewound(), some_users(USERS, subject.items)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.trainable().values()])
    ways = set()
    with clipped_sums_of_units(model) as add:
        for place in range(units * UNIT):
            batch = chance.choices(rows, k=units * UNIT)
            batch[place] = rows[ME]
            parameters = flat + torch.randn(units, len(flat))  # of other sites
            parameters[place // UNIT] = flat
            sums = GridSums(torch.empty(1, len(flat), dtype=torch.float64), 1.0)
            into = [0 if row == place else -1 for row in range(units * UNIT)]
            add(parameters, subject.batch(batch).evened(), into, sums, 1.0)
            ways.add(sums.finish().numpy().tobytes())
    assert len(ways) == 1


@pytest.mark.parametrize("field", ["width", "hidden_width"])
@pytest.mark.parametrize("value", [6, 17])
def test_a_width_for_which_it_is_not_so_is_refused(field: str, value: int) -> None:
    """Seen on x86 with MKL: rows of 6 numbers begin at other multiples of 32 bytes than of 64."""
    with pytest.raises(ValueError, match=f"{field}.*multiple of 4"):
        make_plan({"model": {field: value}})
