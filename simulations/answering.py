"""Many simulated sites that answer a round in one go, in this process or in a few workers, one for each core.

A site is one worker's for as long as it answers: its ledger is opened, charged and closed there. What workers get and
give are messages, as bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from server.runs import RunError
from simulations.inline import AnswerTogether

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict

TOGETHER_FROM = 16
"""So many sites of one process answer in one go; fewer show their progress one by one."""
WORKERS_FROM = 64
"""So many are worth a process for each core, which takes seconds to start."""

Part = list[tuple[str, bytes, float]]
"""Of each site its folder, the message's content, and when it expires."""


@contextmanager
def answering(sites: int) -> Iterator[AnswerTogether | None]:
    """How the sites of a simulation answer messages that ask all of them to train; None: one by one.

    Raises:
        RunError: inside, a worker died.
    """
    workers = os.cpu_count() or 1
    if sites < TOGETHER_FROM:
        yield None
    elif sites < WORKERS_FROM or workers == 1:
        yield lambda asked: _contents(answer_part(_part(asked)))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn"), _begin) as pool:
            yield lambda asked: _by_workers(pool, workers, _part(asked))


def _by_workers(pool: ProcessPoolExecutor, workers: int, part: Part) -> list[RecordDict]:
    try:
        answered = list(pool.map(answer_part, [part[place::workers] for place in range(workers)]))
    except BrokenProcessPool as error:
        raise RunError(
            "a worker of the simulation died, perhaps for want of memory: what its sites had charged stays charged; "
            "free memory and run it again"
        ) from error
    return _contents([answered[place % workers][place // workers] for place in range(len(part))])


def _part(asked: Sequence[tuple[Message, Context]]) -> Part:
    from client.app import content_to_bytes, site_folder

    return [
        (
            str(site_folder(context)),
            content_to_bytes(message.content),
            message.metadata.created_at + message.metadata.ttl,
        )
        for message, context in asked
    ]


def _contents(answers: list[bytes]) -> list[RecordDict]:
    from client.app import content_from_bytes

    return [content_from_bytes(each) for each in answers]


def _begin() -> None:
    """In a worker: one thread each, and what takes seconds to import."""
    import torch

    import client.together  # noqa: F401

    torch.set_num_threads(1)


def answer_part(part: Part) -> list[bytes]:
    """The contents of the answers, in order."""
    from client.app import content_from_bytes, content_to_bytes
    from client.together import Question, answered_together

    questions = [
        Question(Path(folder), content_from_bytes(content), until) for folder, content, until in part
    ]
    return [content_to_bytes(each) for each in answered_together(questions)]
