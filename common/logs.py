"""Structured logs: one JSON object a line, with time, level, logger and message. Nothing about a user is logged."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TextIO

LOGGERS = ("fedtide.site", "fedtide.server")


class JsonFormatter(logging.Formatter):
    """One line of JSON a record. Of an exception only the type is kept, as its text may depend on data."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = record.exc_info[0].__name__
        return json.dumps(fields, ensure_ascii=False)


class PlainFormatter(logging.Formatter):
    """`time level message`, for a person at a terminal; of an exception only the type."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{time} {record.levelname.lower()} {record.getMessage()}"
        if record.exc_info and record.exc_info[0] is not None:
            line += f" ({record.exc_info[0].__name__})"
        return line


def set_up_logs(stream: TextIO, json: bool) -> None:
    """Sends what `LOGGERS` say to a stream, and nowhere else; called again, it replaces what was set up before."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if json else PlainFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
