"""What a site's process keeps in memory between two requests: models, and one site's histories with what frozen layers
made of them.

Nothing is written here (`lower_states.py` does); given up when the files change. In a process that answers one request
it changes nothing.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import torch

from client.policy import Performance
from common.assets import home, language_model
from common.config import Plan
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.build import build_model, item_texts
from common.models.interface import InterestModel

Stamp = tuple[tuple[str, int, int, int, int], ...]

_catalogs: dict[Path, tuple[Stamp, Catalog]] = {}
_histories: dict[Path, tuple[Stamp, Histories]] = {}
_batches: dict[tuple[int, Hashable], tuple[object, Histories, HistoryBatch]] = {}

_MODELS: OrderedDict[tuple[str, str], InterestModel] = OrderedDict()
_MODELS_KEPT = 2

MOST_THREADS = 4
"""Unless a site names more: rows of a unit stand in whole parts of so many threads (`training.TILE`)."""
_own_threads: list[int] = []
"""How many the process had before a site named a number, while one does: a site that names none gets those."""


def site_model(
    plan: Plan,
    catalog: Catalog,
    performance: Performance,
    *,
    offline: bool,
    language_models: Mapping[str, str] | None = None,
) -> InterestModel:
    """The plan's model over a catalog, built once for each process and plan.

    Args:
        performance: on which device it is, and how precise its frozen weights are.
        language_models: name in a plan -> folder of this site, where it has one of its own.
    """
    encoder = (language_models or {}).get(plan.model.encoder) or plan.model.encoder
    witness = plan.privacy.witness_places
    device, precision = device_of(performance), performance.frozen_precision
    key = (f"{plan.model.model_dump_json()} {witness} {encoder} {device} {precision}", catalog.digest())
    if key not in _MODELS:
        while len(_MODELS) >= _MODELS_KEPT:
            _MODELS.popitem(last=False)
        built = build_model(
            plan.model,
            item_texts(catalog.texts, catalog.categories),
            language_model(encoder, offline=offline),
            cache=home() / "item-vectors",
            categories=catalog.categories,
            witness_places=witness,
            frozen_precision=precision,
        )
        _MODELS[key] = built.model.to(device)
    _MODELS.move_to_end(key)
    return _MODELS[key]


def device_of(performance: Performance) -> torch.device:
    """The device that the site names; for `auto` CUDA where there is one."""
    if performance.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(performance.device)


def take_threads(performance: Performance) -> None:
    """From now on the arithmetic of this process takes as many threads as the site names, or MOST_THREADS at most."""
    if performance.threads is None:
        own = _own_threads.pop() if _own_threads else torch.get_num_threads()
        torch.set_num_threads(min(own, MOST_THREADS))
        return
    if not _own_threads:
        _own_threads.append(torch.get_num_threads())
    torch.set_num_threads(performance.threads)


def kept_catalog(file: Path) -> Catalog:
    """The catalog in a file: read again where it was written or replaced."""
    facts = file.stat() if file.exists() else None
    stamp: Stamp = () if facts is None else (_facts(file.name, facts),)
    if file not in _catalogs or _catalogs[file][0] != stamp or not stamp:
        _catalogs.clear()
        _catalogs[file] = (stamp, Catalog.load(file))
    return _catalogs[file][1]


def kept_histories(folder: Path) -> Histories:
    """The histories in a folder: read again where a file of it was written, replaced, added or removed."""
    stamp = _stamp(folder)
    if folder not in _histories or _histories[folder][0] != stamp:
        _histories.clear()
        _batches.clear()
        _histories[folder] = (stamp, Histories.load(folder))
    return _histories[folder][1]


def kept_batch(
    model: object, histories: Histories, key: Hashable, make: Callable[[], HistoryBatch]
) -> HistoryBatch:
    """What `make` gives for a model, histories and a key; made anew when any of the three is another one.

    Args:
        model, histories: compared by identity, and held, so that an identity is not given out again.
        key: what else the batch depends on.
    """
    place = (id(model), key)
    kept = _batches.get(place)
    if kept is None or kept[0] is not model or kept[1] is not histories:
        _batches.clear()
        _batches[place] = (model, histories, make())
    return _batches[place][2]


def forget() -> None:
    """Drops all that is kept."""
    _catalogs.clear()
    _histories.clear()
    _batches.clear()


def _stamp(folder: Path) -> Stamp:
    found = []
    for file in sorted(folder.iterdir()):
        found.append(_facts(file.name, file.stat()))
    return tuple(found)


def _facts(name: str, facts: os.stat_result) -> tuple[str, int, int, int, int]:
    return name, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino
