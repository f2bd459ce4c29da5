"""Many simulated sites that answer a round part by part, in this process or in a few workers, one for each core.

A site is one worker's for as long as it answers: its ledger is charged there, and may stay open for the next round.
What goes in and out of a part are messages, as bytes. While workers answer, the server admits what came before.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from server.runs import RunError
from simulations.forking import worker_context, workers_of
from simulations.inline import AnswerTogether

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict

TOGETHER_FROM = 16
"""So many sites of one process answer in one go; fewer show their progress one by one."""
PART = 25
"""Sites that answer in one go."""
PARTS_AHEAD = 2
"""Of each worker, that it is given or has in work."""

Part = list[tuple[str, bytes, float]]
"""Of each site its folder, the message's content, and when it expires."""


@contextmanager
def answering(sites: int) -> Iterator[AnswerTogether | None]:
    """How the sites of a simulation answer messages that ask many of them to train; None: one by one.

    Raises:
        RunError: inside, a worker died.
    """
    workers = workers_of(sites)
    if sites < TOGETHER_FROM:
        yield None
    elif workers == 1:
        yield _in_this_process
    else:
        with ProcessPoolExecutor(workers, worker_context(), _begin, (dict(os.environ),)) as pool:
            with _told():
                for _ in range(workers):  # they start while the server app does
                    pool.submit(_ready)
            yield lambda asked: _by_workers(pool, workers, asked)


@contextmanager
def _told() -> Iterator[None]:
    """The death of a worker, in words."""
    try:
        yield
    except BrokenProcessPool as error:
        raise RunError(
            "a worker of the simulation died as sites computed, and what they had charged stays charged: free memory, "
            "and run it again"
        ) from error


Asked: TypeAlias = "Sequence[tuple[Message, Context]]"


def _in_this_process(asked: Asked) -> Iterator[Mapping[int, RecordDict]]:
    for first in range(0, len(asked), PART):
        yield _contents(first, answer_part(_part(asked, first)))


def _by_workers(pool: ProcessPoolExecutor, workers: int, asked: Asked) -> Iterator[Mapping[int, RecordDict]]:
    firsts, going = iter(range(0, len(asked), PART)), dict[Future[list[bytes]], int]()
    with _told():
        while True:
            for first in islice(firsts, PARTS_AHEAD * workers - len(going)):
                going[pool.submit(answer_part, _part(asked, first))] = first
            if not going:
                return
            for done in wait(going, return_when=FIRST_COMPLETED).done:
                yield _contents(going.pop(done), done.result())


def _part(asked: Asked, first: int) -> Part:
    from client.app import content_to_bytes, site_folder

    return [
        (
            str(site_folder(context)),
            content_to_bytes(message.content),
            message.metadata.created_at + message.metadata.ttl,
        )
        for message, context in asked[first : first + PART]
    ]


def _contents(first: int, answers: list[bytes]) -> dict[int, RecordDict]:
    from client.app import content_from_bytes

    return {place: content_from_bytes(each) for place, each in enumerate(answers, first)}


def _begin(environment: Mapping[str, str]) -> None:
    """In a worker: one thread each, and the environment of now, as its server may have begun in another.

    It ends when the simulation is killed: a pool's workers wait for more work for ever, and would keep ledgers open.
    """
    threading.Thread(target=_end_with_simulation, name="end-with-simulation", daemon=True).start()
    import client.together  # noqa: F401
    from client.kept_ledgers import keep_open
    from simulations.threads import one_thread

    os.environ.clear()
    os.environ.update(environment)
    one_thread()
    keep_open()
    gc.freeze()  # what was imported is no garbage: not looked through again and again


def _end_with_simulation() -> None:
    simulation = multiprocessing.parent_process()
    if simulation is not None:
        simulation.join()
        os._exit(1)


def _ready() -> None:
    """Something to do, for a worker to be there before it is asked."""


def answer_part(part: Part) -> list[bytes]:
    """The contents of the answers, in order."""
    from client.app import content_from_bytes, content_to_bytes
    from client.together import Question, answered_together

    questions = [
        Question(Path(folder), content_from_bytes(content), until) for folder, content, until in part
    ]
    return [content_to_bytes(each) for each in answered_together(questions)]
