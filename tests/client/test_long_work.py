"""Work that takes long: its bar, its orderly end, and the fingerprint of large histories."""

from __future__ import annotations

import hashlib
import hmac
import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

import client.making
from client.long_work import long_work
from client.making import commitment
from common.events.histories import Histories

SECRET = bytes(range(32))


def _shown(after: float) -> str:
    console = Console(file=(written := io.StringIO()), force_terminal=True, width=100)
    with long_work(after, console) as tell:
        tell("reading", 1_500_000, None)
        tell("binding", 500_000, 1_500_000)
    return written.getvalue()


def test_the_bar_shows_only_when_work_takes_long() -> None:
    assert _shown(after=3600) == ""
    assert "binding" in _shown(after=0)
    assert "500,000" in _shown(after=0)


def test_the_way_sigterm_is_taken_is_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with long_work():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


_STOPPED = """
import os, signal, sys
from contextlib import nullcontext
from pathlib import Path
from client.long_work import long_work
from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, clean_to
from common.events.readers import scan_log
catalog = Catalog(("a", "b", "c"), ("", "", ""), ((), (), ()))
def stop(what, done, of):
    os.kill(os.getpid(), signal.SIGTERM)
with long_work() if sys.argv[3] == "long work" else nullcontext():
    clean_to(Path(sys.argv[2]), scan_log(sys.argv[1]), catalog, CleaningPolicy(), bytes(32), stop)
"""


@pytest.mark.parametrize(("how", "code", "left"), [("long work", 143, 0), ("bare", -signal.SIGTERM, 1)])
def test_sigterm_in_the_middle_leaves_nothing(tmp_path: Path, how: str, code: int, left: int) -> None:
    """Bare, the half-written folder stays: the test can see it."""
    rows = [(f"user-{event % 9}", "abc"[event % 3], event) for event in range(100)]
    pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_parquet(tmp_path / "log.parquet")
    (tmp_path / "site").mkdir()
    arguments = [str(tmp_path / "log.parquet"), str(tmp_path / "site" / "h"), how]
    done = subprocess.run([sys.executable, "-c", _STOPPED, *arguments], check=False, capture_output=True)
    assert done.returncode == code, done.stderr
    assert len(list((tmp_path / "site").iterdir())) == left


def _histories(users: int) -> Histories:
    chance = np.random.default_rng(0)
    return Histories(
        users=np.array([f"{user:032x}" for user in range(users)]),
        offsets=np.arange(users + 1, dtype=np.int64) * 3,
        items=chance.integers(0, 9, 3 * users).astype(np.int32),
        times=chance.integers(0, 10**9, 3 * users),
        kinds=np.zeros(3 * users, dtype=np.int16),
        values=chance.random(3 * users).astype(np.float32),
        kind_names=("view",),
    )


def _commitment_at_once(histories: Histories, secret: bytes) -> str:
    digest = hashlib.sha256(b"fedtide/histories/1\n")
    for array in (histories.users, histories.offsets, histories.items, histories.times, histories.kinds):
        digest.update(f"{array.dtype.str}{array.shape}\n".encode())
        digest.update(array.tobytes())
    digest.update(histories.values.tobytes())
    digest.update("\n".join(histories.kind_names).encode())
    return hmac.digest(secret, b"fedtide/commitment\0" + digest.digest(), hashlib.sha256).hex()


def test_the_fingerprint_by_pieces_is_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = _histories(50)
    histories.save(tmp_path / "h")
    mapped = Histories.load(tmp_path / "h")
    expected = _commitment_at_once(histories, SECRET)
    for piece in (1 << 20, 64, 7):
        monkeypatch.setattr(client.making, "_PIECE", piece)
        told: list[tuple[str, int, int | None]] = []
        assert commitment(histories, SECRET) == expected
        assert commitment(mapped, SECRET, lambda *each: told.append(each)) == expected  # noqa: B023
        assert told[-1][1] == told[-1][2]
    part = Histories(
        **{name: getattr(mapped, name) for name in ("users", "offsets", "times", "kinds", "kind_names")},
        items=mapped.items[::-1],
        values=mapped.values,
    )
    assert commitment(part, SECRET) == _commitment_at_once(part, SECRET) != expected
