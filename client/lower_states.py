"""What the language model's frozen lower layers say of a site's histories, kept in the site's folder from run to run.

It is users' data, so folder and files are their owner's alone, and lie nowhere else. A file is good for the histories,
the encoder and the plan's way of reading them by which it is named; one that is damaged, or another's, is made anew,
and what is good for other histories is removed: of a user who was taken out of the data nothing is left here.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from client.training import prepare_histories
from common.models.array_cache import Array, cached_array
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.models.sequence import SequenceModel

LOWER_STATES = "lower-states"
"""Their folder, in the site's."""

_log = logging.getLogger("fedtide.site")


def prepare_kept(model: InterestModel, histories: HistoryBatch, rows: int, folder: Path) -> HistoryBatch:
    """`prepare_histories`, with states mapped from the folder where they lie there, and written there where not.

    A disk that takes no file costs no round: the states are then in memory alone.

    Args:
        rows: of a unit.
    """
    encoder = model.encoder if isinstance(model, SequenceModel) else None
    if encoder is None or len(histories) == 0:
        return prepare_histories(model, histories, rows)
    histories = histories.with_even_events()  # as they are prepared
    index = torch.arange(len(histories), device=histories.items.device)

    def fill(states: Array) -> None:
        for chunk in index.split(rows):
            prepared = prepare_histories(model, histories.rows(chunk), rows)
            assert prepared.token_states is not None
            states[chunk.cpu().numpy()] = prepared.token_states.cpu().numpy()

    key = encoder.lower_key(histories.items)
    try:
        shape = encoder.lower_shape(histories.items)
        states = cached_array(folder, key, shape, "float32", fill, private=True)
        for other in folder.glob("*.npy"):
            if other.stem != key[:32]:
                other.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("lower layers' states cannot be kept in %s (%s)", folder, error.strerror)
        return prepare_histories(model, histories, rows)
    events = [encoder.token_sequences(histories.items[chunk])[1] for chunk in index.split(rows)]
    return replace(
        histories,
        token_states=torch.from_numpy(states).to(histories.items.device),
        token_events=torch.cat(events),
    )
