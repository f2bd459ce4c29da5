"""What a site sees of its own users with a finished model: groups by interest, neighbours, and drift over time.

All of it is computed from users' histories without noise, so all of it stays at the site. What a group is like is
shown by public items near its centre; how many users it has is not shown: counts leave as releases, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.models.sequence import SequenceModel

LEAST_USERS = 10
"""Groups of fewer users are not shown, not even at the site."""


class InterestsError(ValueError):
    """What was asked for cannot be shown; the message says why and what to do."""


@dataclass(frozen=True)
class Segments:
    """Users grouped by interest.

    Attributes:
        of_user: [users] int64, the group of each user, -1 for users without events.
        centres: [groups, width] unit vectors.
    """

    of_user: Tensor
    centres: Tensor


def user_states(model: InterestModel, batch: HistoryBatch, *, at_once: int = 256) -> Tensor:
    """[users, width]: unit states after each user's last event; zeros without one."""
    index = torch.arange(len(batch))
    return torch.cat(
        [normalize(model.last_states(batch.rows(part)), dim=-1) for part in index.split(at_once)]
    )


def segment(states: Tensor, groups: int, *, seed: int = 0, rounds: int = 50) -> Segments:
    """Spherical k-means (Dhillon & Modha 2001), from spread-out starts, the same for a seed.

    Args:
        states: [users, width] from `user_states`.
        groups: at most; groups of fewer than LEAST_USERS users are dissolved into the others.

    Raises:
        InterestsError: fewer users with events than two groups need.
    """
    active = states.norm(dim=1) > 0
    x = states[active]
    groups = min(groups, len(x) // LEAST_USERS)
    if groups < 1:
        raise InterestsError(f"groups need at least {LEAST_USERS} users with events")
    centres = x[torch.randint(len(x), (1,), generator=torch.Generator().manual_seed(seed))]
    while len(centres) < groups:  # the user farthest from all centres so far
        centres = torch.cat([centres, x[(x @ centres.T).amax(dim=1).argmin()].unsqueeze(0)])
    while True:
        for _ in range(rounds):
            of = (x @ centres.T).argmax(dim=1)
            sums = torch.zeros_like(centres).index_add(0, of, x)
            moved = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=-1), centres)
            if torch.allclose(moved, centres, atol=1e-6):
                break
            centres = moved
        sizes = torch.bincount((x @ centres.T).argmax(dim=1), minlength=len(centres))
        if len(centres) == 1 or int(sizes.min()) >= LEAST_USERS:
            break
        centres = centres[torch.arange(len(centres)) != int(sizes.argmin())]
    of_user = torch.full((len(states),), -1, dtype=torch.int64)
    of_user[active] = (x @ centres.T).argmax(dim=1)
    return Segments(of_user, centres)


def nearest_items(centres: Tensor, vectors: Tensor, count: int) -> Tensor:
    """[groups, count]: rows of the catalog near each centre and far from the others: public names for a group."""
    cosines = centres @ normalize(vectors, dim=-1).T  # [groups, items]
    return (cosines - cosines.mean(dim=0)).topk(min(count, len(vectors)), dim=1).indices


def neighbour_weighted(
    states: Tensor, items: Tensor, user: int, catalog: int, *, neighbours: int = 50
) -> Tensor:
    """[items of the catalog]: what users like this one had, weighed by likeness (Resnick et al. 1994).

    Args:
        states: [users, width] from `user_states`.
        items: [users, events] int64 rows of the catalog, -1 where there is no event.
        user: the row that the list is for; own items get -inf.
        catalog: number of items.
    """
    likeness = (states @ states[user]).clamp(min=0)
    likeness[user] = 0.0
    best = likeness.topk(min(neighbours, len(likeness)))
    had = torch.zeros(len(best.indices), catalog + 1)
    rows = items[best.indices]
    had.scatter_(1, torch.where(rows >= 0, rows, catalog), 1.0)
    scores = best.values @ had[:, :catalog]
    scores[items[user][items[user] >= 0]] = float("-inf")
    return scores


@torch.no_grad()
def drift(model: SequenceModel, batch: HistoryBatch, directions: Tensor) -> Tensor:
    """[events, directions]: a user's interest in each direction after each event, as a cosine.

    Args:
        batch: one user.
        directions: [directions, width], such as categories' or segments' centres.
    """
    states = model.states(model.prepare(batch))[0][: int(batch.lengths[0])]
    return normalize(states, dim=-1) @ normalize(directions, dim=-1).T


def plot_drift(path: Path, interest: Tensor, names: list[str], *, most: int = 6) -> None:
    """A user's interest over time, for the site's own eyes: the file is mode 0600.

    Args:
        interest: [events, names] from `drift`.
        names: of the directions.
        most: how many to draw: those that moved most.

    Raises:
        InterestsError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise InterestsError("a plot needs matplotlib: pip install 'fedtide[simulation]'") from error
    moved = (interest.amax(dim=0) - interest.amin(dim=0)).topk(min(most, len(names))).indices
    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    for place in moved.tolist():
        axes.plot(range(1, len(interest) + 1), interest[:, place].tolist(), label=names[place], linewidth=1.6)
    axes.set_title("Interest over time (stays at the site)", loc="left", fontsize=11)
    axes.set_xlabel("event")
    axes.set_ylabel("cosine with the user's state")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    figure.savefig(path, metadata={"Software": None}, format="png")
    plt.close(figure)
