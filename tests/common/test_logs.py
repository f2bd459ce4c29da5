"""Logs are one JSON object a line, and an exception's text is not in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from common.logs import LOGGERS, set_up_logs


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    before = {
        name: (log := logging.getLogger(name), log.handlers[:], log.level, log.propagate) for name in LOGGERS
    }
    yield
    for log, handlers, level, propagate in before.values():
        log.handlers[:], log.level, log.propagate = handlers, level, propagate


@pytest.mark.parametrize("as_json", [True, False])
def test_a_line_a_record_and_no_text_of_an_exception(as_json: bool) -> None:
    stream = io.StringIO()
    set_up_logs(stream, json=as_json)
    set_up_logs(stream, json=as_json)
    try:
        raise ValueError("alice bought a lamp")
    except ValueError:
        logging.getLogger("fedtide.site").exception("the round %d\nfailed", 3)
    (line, *rest) = stream.getvalue().splitlines()
    assert "alice" not in stream.getvalue()
    assert "ValueError" in stream.getvalue()
    if as_json:
        assert rest == []
        fields = json.loads(line)
        assert set(fields) == {"time", "level", "logger", "message", "exception"}
        assert fields["message"] == "the round 3\nfailed"
        assert (fields["level"], fields["logger"]) == ("error", "fedtide.site")
