"""Groups, neighbours and drift of a site's own users; what is shown of groups says no count."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from client.interests import (
    LEAST_USERS,
    InterestsError,
    drift,
    nearest_items,
    neighbour_weighted,
    plot_drift,
    segment,
    user_states,
)
from tests.common.models.test_families import a_batch, a_model, moved


def three_crowds(sizes: tuple[int, int, int] = (40, 30, 20)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return normalize(
        torch.cat(
            [
                torch.eye(8)[n] + 0.1 * torch.randn(size, 8, generator=generator)
                for n, size in enumerate(sizes)
            ]
        ),
        dim=-1,
    )


def test_crowds_are_found_and_users_without_events_have_no_group() -> None:
    states = torch.cat([three_crowds(), torch.zeros(2, 8)])
    found = segment(states, 3)
    assert found.of_user[-2:].tolist() == [-1, -1]
    groups = [set(found.of_user[a:b].tolist()) for a, b in ((0, 40), (40, 70), (70, 90))]
    assert [len(group) for group in groups] == [1, 1, 1]
    assert len(set.union(*groups)) == 3


def test_no_group_is_smaller_than_the_least() -> None:
    found = segment(three_crowds((40, 30, LEAST_USERS - 6)), 7)
    sizes = torch.bincount(found.of_user)
    assert int(sizes.min()) >= LEAST_USERS
    assert len(sizes) == len(found.centres)
    with pytest.raises(InterestsError, match="at least"):
        segment(three_crowds()[: LEAST_USERS - 1], 3)


def test_a_group_is_described_by_items_near_its_own_centre() -> None:
    assert nearest_items(torch.eye(8)[:3], torch.eye(8), 1)[:, 0].tolist() == [0, 1, 2]


def test_states_are_unit_vectors_of_each_user_alone() -> None:
    model, batch = moved(a_model("recommend")).eval(), a_batch()
    states = user_states(model, batch, at_once=2)
    torch.testing.assert_close(states.norm(dim=1), torch.ones(len(batch)))
    torch.testing.assert_close(states, user_states(model, batch))


def test_neighbours_recommend_what_they_had_and_the_user_had_not() -> None:
    states = normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]]), dim=-1)
    items = torch.tensor([[0, 1], [1, 2], [3, -1]])
    scores = neighbour_weighted(states, items, 0, 5)
    assert int(scores.argmax()) == 2
    assert scores[[0, 1]].tolist() == [float("-inf")] * 2
    assert scores[[3, 4]].tolist() == [0.0, 0.0]  # an opposite user's items, and nobody's


def test_drift_follows_a_user_who_changes_direction(tmp_path: Path) -> None:
    model = a_model("recommend").eval()
    batch = a_batch().rows(torch.tensor([0]))
    directions = model.vectors[batch.items[0, [0, -1]]]
    interest = drift(model, batch, directions)
    assert interest.shape == (6, 2)
    assert interest[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert interest[0, 0] > interest[-1, 0]
    assert interest[-1, 1] > interest[0, 1]
    file = tmp_path / "drift.png"
    plot_drift(file, interest, ["first", "last"])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
