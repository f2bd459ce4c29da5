"""How the fields of signed statements read and write: bounds and the one canonical spelling of each.

A body is a frozen dataclass whose fields each name a codec from here; reading refuses whatever writing would
not have written. What the bodies mean is in `entries.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from common.privacy.canonical import Value
from common.privacy.faults import (
    BadEventError,
    BadFieldError,
    MalformedEntryError,
    ReceiptError,
    UnknownEventError,
)
from common.privacy.mechanisms import (
    Event,
    UnknownMechanismError,
    event_from_fields,
    event_to_fields,
    number_to_text,
    text_to_number,
)

LARGEST_COUNT = 10**18


@dataclass(frozen=True, slots=True)
class Codec:
    """A field's canonical form: `read(write(x)) == x`, and `read` refuses every other spelling."""

    write: Callable[[Any], Value]
    read: Callable[[Value], Any]


def stated(codec: Codec) -> Any:
    """A dataclass field that stands in a signed statement. (`Any`, as `dataclasses.field` itself does.)"""
    return field(metadata={"codec": codec})


def _text(value: Value) -> str:
    if not isinstance(value, str):
        raise MalformedEntryError(f"a {type(value).__name__} stands where a string must")
    return value


def _matching(pattern: str, what: str) -> Codec:
    compiled = re.compile(pattern)

    def read(value: Value) -> str:
        if not compiled.fullmatch(_text(value)):
            raise BadFieldError(f"{what} must match {pattern}")
        return _text(value)

    return Codec(write=_text, read=read)


NAME = _matching(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}", "a name")
DIGEST = _matching(r"[0-9a-f]{64}", "a digest or key")
SIGNATURE = _matching(r"[0-9a-f]{128}", "a signature")
NONCE = _matching(r"[0-9a-f]{32,128}", "a nonce")
DAY = _matching(r"2[0-9]{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])", "a day")


def _optional(codec: Codec) -> Codec:
    """None travels as the empty string."""
    return Codec(
        write=lambda value: "" if value is None else codec.write(value),
        read=lambda value: None if value == "" else codec.read(value),
    )


OPTIONAL_DIGEST = _optional(DIGEST)


def count(at_least: int = 0, at_most: int = LARGEST_COUNT) -> Codec:
    """Whole numbers in [at_least, at_most]."""

    def read(value: Value) -> int:
        if not re.fullmatch(r"0|[1-9][0-9]{0,18}", _text(value)):
            raise BadFieldError("a count must be spelled in at most 19 digits, without sign or leading zero")
        if not at_least <= int(_text(value)) <= at_most:
            raise BadFieldError(f"a count is {value}, but must lie in [{at_least}, {at_most}]")
        return int(_text(value))

    return Codec(write=number_to_text, read=read)


def number(*, above: float, at_most: float) -> Codec:
    """Finite numbers in (above, at_most]."""

    def read(value: Value) -> float:
        text = _text(value)
        try:
            found = text_to_number(text)
        except ValueError as error:
            raise BadFieldError(str(error)) from error
        if not above < found <= at_most:
            raise BadFieldError(f"a number is {value}, but must lie in ({above:g}, {at_most:g}]")
        return found

    return Codec(write=number_to_text, read=read)


POSITIVE = number(above=0, at_most=1e12)
OPTIONAL_POSITIVE = _optional(POSITIVE)


def choice(*known: str, fault: type[ReceiptError]) -> Codec:
    """One of a few words; another raises `fault`."""

    def read(value: Value) -> str:
        if _text(value) not in known:
            raise fault(f"found {value!r}, but only {', '.join(known)} is understood")
        return _text(value)

    return Codec(write=_text, read=read)


def _read_event(value: Value) -> Event:
    if not isinstance(value, dict):
        raise MalformedEntryError("an event must be an object")
    try:
        return event_from_fields(value)
    except UnknownMechanismError as error:
        raise UnknownEventError(str(error)) from error
    except ValueError as error:
        raise BadEventError(str(error)) from error


EVENT = Codec(write=lambda event: dict(event_to_fields(event)), read=_read_event)


def exactly(value: Value, names: set[str]) -> dict[str, Value]:
    """The value as an object with exactly these keys, or `MalformedEntryError`."""
    if not isinstance(value, dict):
        raise MalformedEntryError("an object is expected")
    if set(value) != names:
        odd = ", ".join(sorted(set(value) ^ names))
        raise MalformedEntryError(f"missing or unknown fields: {odd[:200]}")
    return value


@dataclass(frozen=True, slots=True)
class Body:
    """What an entry says. Every field has a codec; making one with a value out of bounds is refused."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for each in fields(self):
            codec: Codec = each.metadata["codec"]
            value = getattr(self, each.name)
            try:
                same = codec.read(codec.write(value)) == value
            except ReceiptError as error:
                raise type(error)(f"{self.kind}.{each.name}: {error}") from error
            except (TypeError, ValueError) as error:
                raise BadFieldError(f"{self.kind}.{each.name}: {error}") from error
            if not same:
                raise BadFieldError(f"{self.kind}.{each.name}: {value!r} does not travel unchanged")

    def to_fields(self) -> dict[str, Value]:
        """The body as strings, lists and objects, for canonical JSON."""
        return {each.name: each.metadata["codec"].write(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_fields(cls, value: Value) -> Self:
        """The body that `to_fields` wrote.

        Raises:
            ReceiptError: its subclass names the fault.
        """
        found = exactly(value, {each.name for each in fields(cls)})
        return cls(**{each.name: each.metadata["codec"].read(found[each.name]) for each in fields(cls)})
