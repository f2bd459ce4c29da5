"""The site's own log: cut, moved or deleted under those who write to it and follow it."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path

import pytest

from client import site_log
from client.site_log import Shown, keep_short
from common.logs import LOGGERS, set_up_logs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "site.log"
    set_up_logs(file, json=True)
    return file


def test_a_log_that_grew_long_is_put_aside_and_what_is_added_is_shown_on(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_log, "_KEPT", 2000)
    said, stream = logging.getLogger(LOGGERS[0]), io.StringIO()
    said.info("before")
    shown = Shown(log, stream, as_json=False)
    for number in range(100):
        said.info("line %d", number)
        keep_short(log)
        if number % 3 == 0:
            shown.show()
    shown.show()
    shown.show()
    assert [line.split(maxsplit=2)[2] for line in stream.getvalue().splitlines()] == [
        f"line {number}" for number in range(100)
    ]
    assert log.stat().st_size < 3000
    assert log.with_name("site.log.1").stat().st_size > 2000


@pytest.mark.parametrize("how", ["deleted", "cut", "its folder deleted"])
def test_what_follows_a_log_goes_on_whatever_becomes_of_the_file(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = folder / "site.log"
    set_up_logs(log, json=True)
    said, stream = logging.getLogger(LOGGERS[0]), io.StringIO()
    shown = Shown(log, stream, as_json=True)
    said.info("one, which is longer than what comes after it")
    shown.show()
    if how == "cut":
        log.write_bytes(b"")
    else:
        log.unlink()
    if how == "its folder deleted":
        folder.rmdir()
        shown.show()
        said.info("nowhere")
        assert "nowhere" in capsys.readouterr().err
        folder.mkdir()
    shown.show()
    said.info("two")
    shown.show()
    lines = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert lines == ["one, which is longer than what comes after it", "two"]
    keep_short(folder / "no such file")


class _Closed(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError


def test_a_terminal_that_is_gone_ends_nothing(log: Path) -> None:
    shown = Shown(log, _Closed(), as_json=True)
    logging.getLogger(LOGGERS[0]).info("a line")
    shown.show()
    shown.show()


def test_nobody_is_waited_for_who_does_not_read_what_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "site.log"
    file.touch()
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as stream, os.fdopen(reader, "rb", buffering=0) as read:
        shown = Shown(file, stream, as_json=True)
        with file.open("a") as log:
            for number in range(20_000):  # far more than a pipe holds
                log.write(f"line {number}\n")
        shown.show()  # without a reader this never came back
        first = read.read(1 << 20)
        assert first.startswith(b"line 0\n")
        assert b"line 19999" not in first
        with file.open("a") as log:
            log.write("the last line\n")
        shown.show()
        assert read.read(1 << 20).endswith(b"the last line\n")
        shown.close()
