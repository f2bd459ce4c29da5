"""What a SuperNode waits for: the whole answer to a message, the end of its task without one, or its expiry.

Flower's SuperNode answers one message at a time, and waits without end for an answer and for each of its parts: where a
ClientApp ends without one, or between two parts, it would be online and silent for good. Here a task that came to
nothing is answered by the error that Flower gives for a ClientApp that was killed, and what is not whole never leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import WARNING
from typing import Any

_LATE = 30.0
"""Seconds after a message has expired, by this machine's clock, that an answer to it is still waited for."""
_PAUSE = 0.5


def check_state(state: Any) -> None:
    """Raises `RuntimeError` for a SuperNode that keeps its messages in another way."""
    for name in ("msg_store", "lock_msg_store", "get_tasks", "delete_messages"):
        if not hasattr(state, name):
            raise RuntimeError(f"this version of Flower's SuperNode has no {name}: install flwr 1.39")


def await_answer(
    state: Any, store: Any, insert: Callable[..., None], *, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Waits for the whole answer to what was given to a ClientApp; puts an error in the place of one that never comes.

    Args:
        insert: Flower's own, of an answer that is made here.

    Returns:
        Whether there is something to send.
    """
    check_state(state)
    while True:
        over = _is_over(state)  # before the look for an answer, which comes before a task's end
        with state.lock_msg_store:
            messages = [entry.message for entry in state.msg_store.values()]
        answers = [each for each in messages if each.metadata.reply_to_message_id]
        asked = [each for each in messages if not each.metadata.reply_to_message_id]
        if answers and all(_is_whole(store, each.metadata.message_id) for each in answers):
            return True
        if not asked:
            _drop(state, store, answers)
            return False
        if over or all(_is_late(each) for each in asked):
            _drop(state, store, answers)
            _answer_for(state, store, insert, asked)
            return True
        sleep(_PAUSE)


def _is_over(state: Any) -> bool:
    """Whether the newest task has ended; expired tokens end tasks, too."""
    from flwr.common.constant import Status

    newest = state.get_tasks(order_by="pending_at", ascending=False, limit=1)
    return not newest or newest[0].status.status == Status.FINISHED


def _is_late(message: Any) -> bool:
    return bool(time.time() > message.metadata.created_at + message.metadata.ttl + _LATE)


def _is_whole(store: Any, message_id: str) -> bool:
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    return all(store.get(part.object_id) for part in iterate_object_tree(store.get_object_tree(message_id)))


def _drop(state: Any, store: Any, answers: list[Any]) -> None:
    for each in answers:
        state.delete_messages(message_ids=[each.metadata.message_id])
        store.delete(each.metadata.message_id)


def _answer_for(state: Any, store: Any, insert: Callable[..., None], asked: list[Any]) -> None:
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode
    from flwr.supercore import log

    for each in asked:
        log(
            WARNING, "Message %s is given up: its task ended without a whole answer", each.metadata.message_id
        )
        insert(Message(Error(ErrorCode.CLIENT_APP_CRASHED), reply_to=each), state, store)
