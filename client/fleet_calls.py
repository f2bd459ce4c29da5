"""A SuperNode's calls to its server: whatever one ends with, it is said, and made again; none waits without end.

Flower tries again what ends with UNAVAILABLE and nothing else, and gives most calls no deadline; its loop ends with
what any other call ends with, while the process stays. Here a look for messages is made until it is answered, with a
wait that grows; a call that belongs to one message is given up after ten minutes, and the message with it; and where a
fresh start promises more (the server takes calls and answers none, this machine's key or clock is refused, the
certificate no longer fits), the process ends, to be started again by `fedtide site up`.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]

from common.supervision import ALIVE, ANSWERED, Pulse

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 20.0
_DEADLINE, _OBJECT_DEADLINE = 60.0, 300.0
"""Seconds for one call; for one with a part of a release or of a model, 5 MB at most."""
_MESSAGE_SECONDS = 600.0
_OVERDUE = 15.0
_UNHEARD = 120.0
"""Seconds without an answered heartbeat, while other calls are answered: what sends them has ended."""
_OBJECTS = ("PullObject", "PushObject")
_ENDLESS = ("PullMessages", "ActivateNode")
_ONCE = ("SendNodeHeartbeat", "DeactivateNode")
_FINAL = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""Said of the request itself: the same again gets the same answer."""


def leave(why: str) -> NoReturn:
    """Ends the process at once, whatever its threads do; `fedtide site up` starts it again."""
    from flwr.supercore import log

    log(WARNING, "SuperNode ends, to be started again: %s", why)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class FleetCalls:
    """Stands for Flower's `wrap_stub`, and watches over the heartbeats."""

    def __init__(self, pulse: Pulse, node_file: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Args:
        node_file: holds the id under which the server knows this node since this `site up` began; another process
            of it may have died without a word, and the server admits one at a time.
        """
        self._pulse, self._node_file, self._sleep = pulse, node_file, sleep
        self._activated = False
        self._unanswered = 0
        self._heard = time.monotonic()

    def wrap(self, stub: Any, invoker: Any) -> None:
        """Puts calls that are made again in the place of a stub's own.

        Raises:
            RuntimeError: this Flower has other calls.
        """
        own = {name: method for name, method in vars(stub).items() if callable(method)}
        if missing := {*_OBJECTS, *_ENDLESS, *_ONCE, "PushMessages"} - set(own):
            raise RuntimeError(f"this version of Flower has no {min(missing)}: install flwr 1.39")
        for name, method in own.items():
            setattr(stub, name, self._insistent(name, method, own["DeactivateNode"], invoker))

    def _insistent(self, name: str, method: Any, deactivate: Any, invoker: Any) -> Callable[..., Any]:
        def called(request: Any, **named: Any) -> Any:
            given = named.get("timeout", _OBJECT_DEADLINE if name in _OBJECTS else _DEADLINE)
            began, wait = time.monotonic(), _FIRST_WAIT
            while True:
                try:
                    answer = self._made(name, method, request, given)
                except grpc.RpcError as error:
                    if name in _ONCE or invoker.max_tries == 1:
                        raise
                    if self._freed(name, error, deactivate):
                        continue
                    self._check(name, error, time.monotonic() - began)
                    _say(name, error, wait)
                else:
                    if wait > _FIRST_WAIT:
                        _say_again(name, time.monotonic() - began)
                    return answer
                self._wait(random.uniform(wait / 2, wait))  # not all sites at one moment
                wait = min(2 * wait, _LONGEST_WAIT)

        return called

    def _made(self, name: str, method: Any, request: Any, seconds: float) -> Any:
        """One call; shows signs of life while it lasts, but not for the thread of heartbeats."""
        began = time.monotonic()
        future = method.future(request, timeout=seconds)
        while True:
            if name != "SendNodeHeartbeat":
                self._pulse.show(ALIVE)
            try:
                answer = future.result(timeout=1.0)
                break
            except grpc.FutureTimeoutError:
                if time.monotonic() - began > seconds + _OVERDUE:
                    leave(f"{name} did not end at its deadline")
        self._unanswered = 0
        if name == "ActivateNode":
            self._activated, self._heard = True, time.monotonic()
            with suppress(OSError):  # a full disk: this node is back in a minute then, and not at once
                self._node_file.parent.mkdir(mode=0o700, exist_ok=True)
                self._node_file.write_text(str(answer.node_id), encoding="ascii")
        elif name == "SendNodeHeartbeat":
            self._heard = time.monotonic()
        elif name == "PullMessages" and time.monotonic() - self._heard > _UNHEARD:
            leave(f"no heartbeat was answered for {time.monotonic() - self._heard:.0f} s")
        if self._activated:
            self._pulse.show(ANSWERED)
        return answer

    def _freed(self, name: str, error: Any, deactivate: Any) -> bool:
        """Whether the server took this node for the one that died before, and was told."""
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        if name != "ActivateNode" or "2004" not in str(error.details()):
            return False
        try:
            node = int(self._node_file.read_text(encoding="ascii"))
            self._node_file.unlink()
            self._made("DeactivateNode", deactivate, DeactivateNodeRequest(node_id=node), _DEADLINE)
        except (OSError, ValueError, grpc.RpcError):
            return False
        return True

    def _check(self, name: str, error: Any, elapsed: float) -> None:
        """Raises, or ends the process, where the same call again is of no use."""
        from flwr.supercore.run import RunNotRunningException

        code, details = error.code(), str(error.details())
        of_message = name not in _ENDLESS
        if code is grpc.StatusCode.PERMISSION_DENIED:
            raise RunNotRunningException from error
        if of_message:
            if code in _FINAL or elapsed > _MESSAGE_SECONDS:
                raise error
            return
        refused = code is grpc.StatusCode.UNAUTHENTICATED or "handshake failed" in details.lower()
        self._unanswered += code is grpc.StatusCode.DEADLINE_EXCEEDED
        if not self._activated:
            if refused or code in _FINAL:
                raise error  # Flower says it, and ends
        elif refused:
            leave(f"{name} was refused: {details}")
        if self._unanswered > 1:
            leave("the server takes calls and does not answer")
        if elapsed > _MESSAGE_SECONDS:
            leave(f"no call was answered for {elapsed:.0f} s")

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._pulse.show(ALIVE)
            self._sleep(min(left, 1.0))


def never_ending(sender: type[Any]) -> type[Any]:
    """Flower's sender of heartbeats, but that it goes on whatever one ends with."""

    class Sender(sender):  # type: ignore[misc]
        def __init__(self, heartbeat_fn: Callable[[], bool]) -> None:
            def beat() -> bool:
                try:
                    return heartbeat_fn()
                except Exception as error:  # the main thread judges; this one tries again
                    _say("SendNodeHeartbeat", error, _LONGEST_WAIT)
                    return False

            super().__init__(beat)

    return Sender


def _said_of(error: Any) -> str:
    if isinstance(error, grpc.RpcError) and hasattr(error, "code"):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


def _say(name: str, error: Any, wait: float) -> None:
    from flwr.supercore import log

    log(WARNING, "%s failed with %s; it is tried again within %.0f s", name, _said_of(error), wait)


def _say_again(name: str, seconds: float) -> None:
    from flwr.supercore import log

    log(INFO, "%s is answered again, after %.0f s", name, seconds)
