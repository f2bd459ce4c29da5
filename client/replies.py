"""What a site's replies say beside their content: functions of the request alone, whoever makes them.

Flower states in each reply when it was made, to the microsecond, and what is left of the time to answer: the end of a
site's work, which depends on its users. And where a ClientApp fails or is killed, Flower makes the reply, and puts the
exception's text into it. The times are the request's own here, and of an error the code is all that is sent; the text
stays in the site's logs.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from flwr.app import Error, Message, RecordDict


def timeless(reply: Message, asked: Message) -> None:
    """Puts a reply's times to those of the message that it answers."""
    reply.metadata.created_at, reply.metadata.ttl = asked.metadata.created_at, asked.metadata.ttl


def reply_to(asked: Message, content: RecordDict) -> Message:
    """A reply whose every field but its content is a function of the message that it answers."""
    reply = Message(content, reply_to=asked)
    timeless(reply, asked)
    return reply


def keep_replies_timeless() -> None:
    """From now on all replies that this process makes are timeless, and errors without text: Flower's own, too.

    Raises:
        RuntimeError: this Flower makes replies in another way.
    """
    whole = Message.__init__
    if "reply_to" not in inspect.signature(whole).parameters:
        raise RuntimeError("this version of Flower makes replies in another way: install flwr 1.39")

    @wraps(whole)
    def made(self: Message, *arguments: Any, **named: Any) -> None:
        whole(self, *arguments, **named)
        if (asked := named.get("reply_to")) is not None:
            timeless(self, asked)
            if self.has_error():
                self.error = Error(self.error.code)

    Message.__init__ = made
