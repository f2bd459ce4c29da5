"""Structured logs: one JSON object a line, with time, level, logger and message. Nothing about a user is logged."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
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


class SharedFile(logging.Handler):
    """A file to which several processes add lines, and which may be deleted, moved or cut between any two of them.

    It is opened for each line, which is written at once. A line that the file does not take goes to standard error.
    """

    def __init__(self, file: Path) -> None:
        """Of a file in a folder that is there; its mode becomes 0600."""
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Adds the record's line."""
        try:
            line = self.format(record) + "\n"
        except Exception:
            self.handleError(record)
            return
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self._file, flags, 0o600)
            try:
                os.write(descriptor, line.encode("utf-8", "replace"))
            finally:
                os.close(descriptor)
        except OSError:
            try:
                sys.stderr.write(line)
                sys.stderr.flush()
            except (OSError, ValueError):
                return  # there is nobody to tell


def set_up_logs(target: TextIO | Path, json: bool) -> None:
    """Sends what `LOGGERS` say to a stream or a shared file, and nowhere else; called again, it replaces that."""
    handler = SharedFile(target) if isinstance(target, Path) else logging.StreamHandler(target)
    handler.setFormatter(JsonFormatter() if json else PlainFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
