"""The fast path of cleaning: bit for bit what plain Python gives, exact about users, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.events import cleaning, intake, numbering, spill
from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, clean, clean_to
from common.events.deidentify import Keyed, pseudonym
from common.events.histories import Histories
from common.events.numbering import Numbers
from common.events.readers import read_log, scan_log
from common.events.schema import EVENT_SCHEMA, LogError
from tests.common.events.plain_cleaning import Row, plain_clean

ITEMS = tuple(f"item-{row}" for row in range(6))
CATALOG = Catalog(ITEMS, ITEMS, ((),) * len(ITEMS))
SECRET = bytes(range(32))
USERS = [f"user-{number}" for number in range(7)]


def _log(rows: list[Row]) -> pl.LazyFrame:
    return pl.LazyFrame(rows, schema=dict(EVENT_SCHEMA), orient="row")


def _difference(found: Histories, expected: Histories) -> str | None:
    """The first field that is not the same, bit for bit."""
    for field in dataclasses.fields(Histories):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "kind_names":
            same = mine == theirs
        else:
            same = mine.dtype == theirs.dtype and np.asarray(mine).tobytes() == theirs.tobytes()
        if not same:
            return field.name
    return None


@contextmanager
def _small_pieces() -> Iterator[None]:
    """Batches of some events and groups of few, so that users and ties span them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake, "_BATCH", 7)
        patch.setattr(intake, "_SHARE", 2)
        patch.setattr(cleaning, "_GROUP", 5)
        patch.setattr(spill, "_AT_ONCE", 3)
        yield


def _check(rows: list[Row], log: Any, policy: CleaningPolicy, folder: Path | None = None) -> None:
    """What the fast path gives of a log, in memory or in a folder, is what plain Python gives of its rows."""
    expected, report = plain_clean(rows, ITEMS, policy, SECRET)
    try:
        if folder is None:
            found, counted = clean(log, CATALOG, policy, SECRET)
        else:
            found, counted = clean_to(folder, log, CATALOG, policy, SECRET)
    except LogError as error:
        assert expected is None
        reason = max(report.dropped, key=lambda name: report.dropped[name])
        assert f"nothing is left of the log: mostly {reason!r}" in str(error)  # noqa: PT017
        return
    assert expected is not None
    assert replace(counted, days="", early=0, late=0, near=()) == report  # those have tests of their own
    assert _difference(found, expected) is None


_TIMES = st.one_of(st.none(), st.integers(-2, 2), st.sampled_from([2**62, -(2**62), 10**12]))
_ROWS = st.lists(
    st.tuples(
        st.sampled_from([*USERS, None]),
        st.sampled_from([*ITEMS, "item-unheard-of", None]),
        _TIMES,
        st.sampled_from(["view", "buy", "a kind", None]),
        st.sampled_from([None, 1.0, 2.5, -1.0]),
    ),
    max_size=60,
)
_POLICIES = st.builds(
    CleaningPolicy,
    max_events_per_user=st.sampled_from([4, 9]),
    minimum_events=st.sampled_from([1, 2, 3]),
    duplicates=st.sampled_from(["same-event", "same-item", "keep"]),
)


@settings(max_examples=100, deadline=None)
@given(_ROWS, _POLICIES)
def test_random_messy_logs_give_what_plain_python_gives(rows: list[Row], policy: CleaningPolicy) -> None:
    with _small_pieces():
        _check(rows, _log(rows), policy)


_TEXTS = {
    "user": [*USERS[:3], f" {USERS[0]}", f"{USERS[1]}\t", f" {USERS[6]} ", "", "  ", "b\ufffdd"],
    "item": [*ITEMS[:3], f" {ITEMS[0]}", f"{ITEMS[4]} ", "item-unheard-of", "", " "],
    "time": ["1", "2", " 2 ", "2.5", "1970-01-01", "1000000000", "soon", ""],
    "kind": ["view", " view", "buy", ""],
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(*(st.sampled_from(texts) for texts in _TEXTS.values())), min_size=1, max_size=60),
    _POLICIES,
    st.sampled_from(["csv", "parquet"]),
)
def test_files_with_untidy_texts_give_what_plain_python_gives(
    tmp_path: Path, texts: list[tuple[str, ...]], policy: CleaningPolicy, format: str
) -> None:
    file = tmp_path / f"log.{format}"
    table = pl.DataFrame(texts, schema=list(_TEXTS), orient="row")
    table.write_csv(file, quote_style="always") if format == "csv" else table.write_parquet(file)
    times = {"1": 1, "2": 2, " 2 ": 2, "2.5": 2, "1970-01-01": 0, "1000000000": 10**9}
    rows: list[Row] = [
        (_tidy(user), _tidy(item), times.get(when), _tidy(kind), None) for user, item, when, kind in texts
    ]
    with _small_pieces():
        _check(rows, scan_log(file, sure=True), policy)
        _check(rows, read_log(file), policy)
    folder = tmp_path / str(time.monotonic_ns())
    _check(rows, scan_log(file, sure=True), policy, folder)


def _tidy(text: str) -> str | None:
    text = text.strip()
    return text if text and "\ufffd" not in text else None


def test_an_id_of_the_catalog_that_is_not_trimmed_is_no_trimmed_texts_item(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,time\n" + 'u," a ",1\nu,b,2\nu,"b ",3\nu,c,4\n' * 2)
    catalog = Catalog((" a ", "b", "c"), ("", "", ""), ((), (), ()))
    histories, report = clean(scan_log(tmp_path / "log.csv", sure=True), catalog, CleaningPolicy(), SECRET)
    again, same = clean(read_log(tmp_path / "log.csv"), catalog, CleaningPolicy(), SECRET)
    assert histories.items.tolist() == [1, 1, 2]
    assert report == same
    assert _difference(histories, again) is None


class _Colliding(Numbers):
    """Numbers whose hash has four values, so that most texts share theirs."""

    def _hash(self, texts: pl.Series) -> np.ndarray:
        return (super()._hash(texts) & np.uint64(3)) << np.uint64(62)


class _Trusting(_Colliding):
    """Takes texts of one hash for one text."""

    def _known(self, texts: pl.Series, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers, known = super()._known(texts, hashes)
        if len(self):
            place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            met = self._hashes[place] == hashes
            numbers, known = np.where(met, self._numbers[place], numbers), known | met
        return numbers, known


def test_two_users_never_become_one_though_their_hashes_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [
        (f"user-{event % 90}", ITEMS[event % 6], event // 90, "view", None) for event in range(540)
    ]
    monkeypatch.setattr(intake, "_BATCH", 64)
    monkeypatch.setattr(numbering, "Numbers", _Colliding)
    _check(rows, _log(rows), CleaningPolicy())
    monkeypatch.setattr(numbering, "Numbers", _Trusting)
    with pytest.raises(AssertionError):
        _check(rows, _log(rows), CleaningPolicy())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.text(st.sampled_from("ab\u00e9"), max_size=3), max_size=12), max_size=4))
def test_equal_texts_have_equal_numbers_and_others_have_others(batches: list[list[str]]) -> None:
    for numbers in (Numbers(), _Colliding()):
        given_to: dict[str, int] = {}
        for batch in batches:
            for text, number in zip(batch, numbers.of(pl.Series(batch, dtype=pl.String)), strict=True):
                assert given_to.setdefault(text, int(number)) == number
        assert sorted(given_to.values()) == list(range(len(given_to)))
        assert [numbers.texts[number] for number in given_to.values()] == list(given_to)


RAW = [f"ann-{number}@example.org" for number in range(40)]


def _raw_log(path: Path) -> Path:
    rows = [(RAW[event % 40], ITEMS[event % 6], event) for event in range(400)]
    pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_parquet(path)
    return path


def _leaks(root: Path) -> list[str]:
    """What under a folder, or of its files that are open and have no name, names a user or is open to others."""
    found = []
    open_files = [Path("/proc/self/fd") / each for each in os.listdir("/proc/self/fd")]
    mine = [each for each in open_files if each.exists() and os.readlink(each).startswith(str(root))]
    for file in [*mine, *(each for each in root.rglob("*") if each.is_file())]:
        content = file.read_bytes()
        found += [f"{file} names a user" for raw in RAW for form in _forms(raw) if form in content]
        found += [f"{file} is open"] if file.stat().st_mode & 0o077 else []
    return found + [
        f"{each} is open" for each in root.rglob("*") if each.is_dir() and each.stat().st_mode & 0o077
    ]


def _forms(raw: str) -> list[bytes]:
    return [raw.encode(), raw.encode("utf-32-le"), raw.encode("utf-16-le")]


def test_what_is_put_down_meanwhile_names_no_user_and_is_its_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = scan_log(_raw_log(tmp_path / "log.parquet"), sure=True)
    folder = tmp_path / "site"
    folder.mkdir(mode=0o700)
    seen: list[int] = []

    def look(what: str, done: int, of: int | None) -> None:
        assert _leaks(folder) == []
        seen.append(sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()))

    with _small_pieces():
        clean_to(folder / "a", log, CATALOG, CleaningPolicy(), SECRET, look)
    assert len(seen) > 10
    assert seen[-1] > seen[0]  # it looked at files that were written
    assert sorted(each.name for each in folder.iterdir()) == ["a"]

    put_down = spill.Spill.add

    def add_with_names(self: spill.Spill, *args: Any, **columns: Any) -> None:
        put_down(self, *args, **columns)
        self._file.write(RAW[3].encode())

    monkeypatch.setattr(spill.Spill, "add", add_with_names)
    with pytest.raises(AssertionError, match="names a user"):
        clean_to(folder / "b", log, CATALOG, CleaningPolicy(), SECRET, look)
    assert sorted(each.name for each in folder.iterdir()) == ["a"]


def test_a_row_damaged_in_the_last_piece_leaves_nothing(tmp_path: Path) -> None:
    lines = [f'{{"user":"user-{event % 9}","item":"item-1","time":{event}}}' for event in range(300_000)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"user":"secret-user"']) + "\n")
    site, seen = tmp_path / "site", []
    site.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake, "_BATCH", 1 << 16)
        with pytest.raises(LogError, match="line 300001 is no JSON object") as caught:
            clean_to(
                site / "h",
                scan_log(tmp_path / "log.jsonl", sure=True),
                CATALOG,
                CleaningPolicy(),
                SECRET,
                lambda what, done, of: seen.append(done),
            )
    assert "secret-user" not in str(caught.value)
    assert seen  # pieces before the last were read
    assert list(site.iterdir()) == []


@pytest.mark.parametrize("most", [2_000, 20_000])
def test_a_disk_that_takes_no_more_is_said_and_nothing_stays(tmp_path: Path, most: int) -> None:
    """The smaller limit stops what is put down meanwhile, the larger one the histories."""
    rows = [(f"user-{event % 300}", ITEMS[event % 6], event) for event in range(900)]
    pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_parquet(tmp_path / "log.parquet")
    site = tmp_path / "site"
    site.mkdir()
    log = scan_log(tmp_path / "log.parquet", sure=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(LogError, match="make room"):
            clean_to(site / "h", log, CATALOG, CleaningPolicy(), SECRET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(site.iterdir()) == []


def test_a_stop_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    log = scan_log(_raw_log(tmp_path / "log.parquet"), sure=True)
    for stage in ("reading", "binding"):

        def stop(what: str, done: int, of: int | None, stage: str = stage) -> None:
            if what == stage:
                raise KeyboardInterrupt

        site = tmp_path / stage
        site.mkdir()
        with _small_pieces(), pytest.raises(KeyboardInterrupt):
            clean_to(site / "h", log, CATALOG, CleaningPolicy(), SECRET, stop)
        assert list(site.iterdir()) == []


_KILLED = """
import sys, os, signal
from pathlib import Path
from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, clean_to
from common.events.readers import scan_log
items = tuple(f"item-{row}" for row in range(6))
def die(what, done, of):
    os.kill(os.getpid(), signal.SIGKILL)
log = scan_log(sys.argv[1], sure=True)
clean_to(Path(sys.argv[2]), log, Catalog(items, items, ((),) * 6), CleaningPolicy(), bytes(32), die)
"""


def test_killed_outright_it_leaves_no_event_and_no_name(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir(mode=0o700)
    log = _raw_log(tmp_path / "log.parquet")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(log), str(site / "h")], check=False)
    assert done.returncode == -9
    assert _leaks(site) == []
    assert not (site / "h").exists()
    assert sum(each.stat().st_size for each in site.rglob("*.npy")) < 1000  # headers: what was read is gone


def test_a_folder_that_holds_something_is_refused_before_the_log_is_read(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "mine").write_text("kept")
    missing = pl.scan_parquet(_raw_log(tmp_path / "log.parquet")).select("nothing such")
    with pytest.raises(ValueError, match="is not empty"):
        clean_to(tmp_path / "h", missing, CATALOG, CleaningPolicy(), SECRET)
    assert (tmp_path / "h" / "mine").read_text() == "kept"


def test_more_kinds_than_numbers_for_them_are_refused() -> None:
    kinds = [f"kind-{number}" for number in range(32_768)]
    log = pl.LazyFrame({"user": "u", "item": ITEMS[0], "time": 1, "kind": kinds, "value": None})
    with pytest.raises(LogError, match="more than 32,767 kinds"):
        clean(log, CATALOG, CleaningPolicy(), SECRET)


def test_one_keyed_hash_a_user_not_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [(f"user-{event % 5}", ITEMS[event % 6], event, None, None) for event in range(200)]
    asked: list[str] = []
    derive = Keyed.pseudonym_bytes

    def noted(self: Keyed, user: str) -> bytes:
        asked.append(user)
        return derive(self, user)

    monkeypatch.setattr(Keyed, "pseudonym_bytes", noted)
    with _small_pieces():
        histories, _ = clean(_log(rows), CATALOG, CleaningPolicy(), SECRET)
    assert sorted(asked) == [f"user-{number}" for number in range(5)]
    assert histories.users.tolist() == sorted(pseudonym(user, SECRET) for user in asked)
