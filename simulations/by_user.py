"""Held-out figures of single users, kept in the run's private folder for comparisons in pairs.

They are users' data: nothing of them stands in a table, a plot, a pack or a message, only what they come to together.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.runs import RunError, RunFolder
from simulations.begun import Key, private_folder, write_private_whole
from simulations.quality import Floats, Quality
from simulations.splits import Part

_FILE = "by-user.npz"


@dataclass(frozen=True, eq=False)
class ByUser:
    """One part's figures of those who judge.

    Attributes:
        keys: [users] the same in every simulation of a log; sorted.
        targets: [users] the item to foretell.
        paired: the metric that is compared in pairs.
        headline: the metric that curves show.
        of: recommender -> metric -> [users].
    """

    keys: Key
    targets: npt.NDArray[np.int64]
    paired: str
    headline: str
    of: Mapping[str, Mapping[str, Floats]]


def save_by_user(
    run: RunFolder, keys: Mapping[str, bytes], found: Mapping[Part, Mapping[str, Quality]]
) -> None:
    """Writes the figures of a run's recommenders.

    Args:
        keys: pseudonym -> key.
        found: part -> recommender -> its quality.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for part, qualities in found.items():
        for name, quality in qualities.items():
            if quality.users is None or quality.targets is None:
                continue
            mine = np.array([keys[user] for user in quality.users.tolist()], dtype="S32")
            order = np.argsort(mine)
            arrays[f"{part}/keys"], arrays[f"{part}/targets"] = mine[order], quality.targets[order]
            arrays[f"{part}/paired"] = np.array(quality.per_user_name)
            arrays[f"{part}/headline"] = np.array(quality.headline)
            for metric, values in quality.by_user.items():
                arrays[f"{part}/of/{name}/{metric}"] = values[order]
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    write_private_whole(private_folder(run) / _FILE, file.getvalue())


def load_by_user(run: RunFolder, part: Part) -> ByUser:
    """What `save_by_user` wrote of a part.

    Raises:
        RunError: nothing was kept of it.
    """
    try:
        with np.load(private_folder(run) / _FILE, allow_pickle=False) as kept:
            of: dict[str, dict[str, Floats]] = {}
            for each in kept.files:
                if each.startswith(f"{part}/of/"):
                    name, _, metric = each.removeprefix(f"{part}/of/").partition("/")
                    of.setdefault(name, {})[metric] = kept[each]
            return ByUser(
                kept[f"{part}/keys"],
                kept[f"{part}/targets"],
                str(kept[f"{part}/paired"]),
                str(kept[f"{part}/headline"]),
                of,
            )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"{run.path} keeps no figures of its {part} split by user (an earlier version made it, or nobody looked "
            "at that split): simulate it again"
        ) from error
