"""Canonical JSON: one value, one spelling, so that signatures and digests of it mean something.

A value is a string, a list or an object; numbers travel as decimal strings (`mechanisms.number_to_text`).
Spelled with sorted keys, printable ASCII and no whitespace. Everything else that JSON knows is refused, each
by its own error. What the objects mean (entries, receipts, plans) is not known here.
"""

from __future__ import annotations

import json
import re
from typing import ClassVar, NoReturn, TypeAlias

from common.privacy.faults import ReceiptError

Value: TypeAlias = "str | list[Value] | dict[str, Value]"

DEEPEST = 16
LONGEST = 1 << 20

_PRINTABLE = re.compile(r"[ -~]*\Z")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)  # an open end matches too: else it is quadratic


class CanonicalError(ReceiptError):
    """Not canonical JSON."""

    reason: ClassVar[str] = "not_canonical"


class FloatNumberError(CanonicalError):
    """A bare float, NaN or infinity: numbers travel as decimal strings."""

    reason = "float_number"


class WholeNumberError(CanonicalError):
    """A bare whole number: numbers travel as decimal strings."""

    reason = "whole_number"


class LiteralError(CanonicalError):
    """true, false or null."""

    reason = "literal"


class UnsupportedTypeError(CanonicalError):
    """A Python value that is no string, list or dictionary with string keys."""

    reason = "unsupported_type"


class NonAsciiError(CanonicalError):
    """A character outside printable ASCII."""

    reason = "non_ascii"


class DuplicateKeyError(CanonicalError):
    """An object with one key twice."""

    reason = "duplicate_key"


class TooDeepError(CanonicalError):
    """Nested deeper than 16."""

    reason = "too_deep"


class TooLongError(CanonicalError):
    """More bytes than the limit."""

    reason = "too_long"


class MalformedJsonError(CanonicalError):
    """Not JSON at all, or something after its end."""

    reason = "malformed_json"


def _check(value: object, depth: int) -> None:
    if isinstance(value, str):
        if not _PRINTABLE.match(value):
            raise NonAsciiError("strings may hold printable ASCII only")
        return
    if isinstance(value, list | dict):
        if depth == DEEPEST:
            raise TooDeepError(f"nested deeper than {DEEPEST}")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise UnsupportedTypeError(f"a key is a {type(key).__name__}, but must be a string")
                if not _PRINTABLE.match(key):
                    raise NonAsciiError("strings may hold printable ASCII only")
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) is not str or not _PRINTABLE.match(item):  # most are, and calls are what costs
                _check(item, depth + 1)
    elif value is None or isinstance(value, bool):
        raise LiteralError("true, false and null have no canonical form: use a string")
    elif isinstance(value, int):
        raise WholeNumberError("a whole number must travel as a decimal string")
    elif isinstance(value, float):
        raise FloatNumberError("a float must travel as a decimal string")
    else:
        raise UnsupportedTypeError(f"a {type(value).__name__} has no canonical form")


def encode(value: Value, *, longest: int = LONGEST) -> bytes:
    """The value's canonical bytes.

    Raises:
        CanonicalError: its subclass names what has no canonical form; `TooLongError` beyond `longest` bytes.
    """
    _check(value, 0)
    data = _spelled(value)
    if len(data) > longest:
        raise TooLongError(f"{len(data)} bytes, but at most {longest} are allowed")
    return data


def _spelled(value: Value) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def _refuse_float(_: str) -> NoReturn:
    raise FloatNumberError("a float must travel as a decimal string")


def _refuse_int(_: str) -> NoReturn:
    raise WholeNumberError("a whole number must travel as a decimal string")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DuplicateKeyError("an object holds one key twice")
    return found


def _depth(data: bytes) -> int:
    """How deep the brackets outside strings nest: counted before a parser may recurse into them."""
    depth = deepest = 0
    for byte in _STRING.sub(b"", data):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_refuse_float, parse_int=_refuse_int, parse_constant=_refuse_float
)


def decode_any_spelling(data: bytes, *, longest: int = LONGEST) -> Value:
    """The value of JSON bytes whose blanks, escapes and order of keys are free: for files that people read.

    What is signed within is verified over its canonical form, whatever its spelling here.

    Raises:
        CanonicalError: its subclass names the fault: of form, of length, or a value that has no canonical form.
    """
    if len(data) > longest:
        raise TooLongError(f"{len(data)} bytes, but at most {longest} are allowed")
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise NonAsciiError("bytes outside ASCII") from error
    if _depth(data) > DEEPEST:
        raise TooDeepError(f"nested deeper than {DEEPEST}")
    try:
        value: Value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedJsonError(f"no JSON value: {error.msg} at byte {error.pos}") from error
    _check(value, 0)
    return value


def decode(data: bytes, *, longest: int = LONGEST) -> Value:
    """The value of canonical bytes; bytes that `encode` would not have written are refused.

    Raises:
        CanonicalError: its subclass names the fault; other spellings (whitespace, order of keys,
            needless escapes) raise `CanonicalError` itself.
    """
    value = decode_any_spelling(data, longest=longest)
    if _spelled(value) != data:
        raise CanonicalError("not the canonical spelling: sorted keys, no whitespace, no needless escapes")
    return value
