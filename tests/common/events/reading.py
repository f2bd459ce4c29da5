"""Small files in any layout, and what is read of them; for the tests of readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.events.layout import Layout
from common.events.readers import read_log
from common.events.schema import LogError

Row = tuple[str | None, str | None, int | None]


def write(path: Path, content: str | bytes) -> Path:
    """The path, with a file of this content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def columns_of(text: str | None) -> dict[str, str] | None:
    """What `--columns` would be of this text."""
    return dict(each.split("=") for each in text.split(",")) if text else None


def events(path: Path, columns: str | None = None, format: str = "auto", **layout: Any) -> list[Row]:
    """User, item and time of each event, in order."""
    frame = read_log(path, format, columns_of(columns), Layout(**layout)).collect()
    return sorted((row[:3] for row in frame.rows()), key=repr)


def refusal(path: Path, columns: str | None = None, format: str = "auto", **layout: Any) -> str:
    """The one line in which a log is refused."""
    with pytest.raises(LogError) as caught:
        read_log(path, format, columns_of(columns), Layout(**layout)).collect()
    message = str(caught.value)
    assert message.isprintable(), message
    return message
