"""Logs are one JSON object a line, and an exception's text is not in them."""

from __future__ import annotations

import io
import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

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


def test_a_shared_file_may_be_deleted_moved_or_gone_between_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "logs" / "site.log"
    file.parent.mkdir()
    set_up_logs(file, json=True)
    log = logging.getLogger("fedtide.site")
    log.warning("one")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.rename(file.with_name("site.log.1"))
    log.warning("two")
    assert [json.loads(line)["message"] for line in file.read_text().splitlines()] == ["two"]
    file.unlink()
    file.parent.joinpath("site.log.1").unlink()
    file.parent.rmdir()
    log.warning("three")  # nowhere to write: the line is not lost, and nothing ends
    assert json.loads(capsys.readouterr().err)["message"] == "three"
    file.parent.mkdir()
    log.warning("four")
    assert "four" in file.read_text()


def test_a_full_disk_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs(Path("/dev/full"), json=False)
    logging.getLogger("fedtide.site").warning("a line")
    assert "a line" in capsys.readouterr().err
