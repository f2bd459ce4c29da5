"""Cleaning: each reason counted once, order by the stated rule, no raw id anywhere, logs in streams."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.events.catalog import Catalog
from common.events.cleaning import REASONS, CleaningPolicy, CleaningReport, clean
from common.events.deidentify import pseudonym
from common.events.histories import Histories
from common.events.readers import read_log
from common.events.schema import EVENT_SCHEMA, LogError

ITEMS = tuple(f"item-{row}" for row in range(60))
CATALOG = Catalog(ITEMS, ITEMS, ((),) * len(ITEMS))
SECRET, OTHER = bytes(range(32)), bytes(32)

Row = tuple[str | None, str | None, int | None, str | None, float | None]


def _log(rows: list[Row]) -> pl.LazyFrame:
    return pl.LazyFrame(rows, schema=dict(EVENT_SCHEMA), orient="row")


def _clean(
    rows: list[Row], secret: bytes = SECRET, **policy: object
) -> tuple[dict[str, list[tuple[str, int]]], CleaningReport]:
    histories, report = clean(_log(rows), CATALOG, CleaningPolicy(**policy), secret)  # type: ignore[arg-type]
    found = {
        str(user): [
            (ITEMS[item], int(time))
            for item, time in zip(
                histories.history(row),
                histories.times[histories.offsets[row] : histories.offsets[row + 1]],
                strict=True,
            )
        ]
        for row, user in enumerate(histories.users)
    }
    return found, report


def _views(user: str, items: range, start: int = 0) -> list[Row]:
    return [(user, f"item-{item}", start + item, "view", None) for item in items]


def test_each_reason_is_counted_once_and_the_counts_add_up() -> None:
    rows = [
        *_views("good", range(5)),
        ("good", "item-0", 0, "view", None),  # duplicate
        ("good", "item-0", 0, "buy", None),  # another kind: none
        (None, "item-1", None, "view", None),  # missing comes before timeless
        ("good", None, 3, "view", None),
        ("good", "item-1", None, "view", None),
        ("good", "item-unheard-of", 3, "view", None),
        *_views("robot", range(11)),
        *_views("rare", range(2)),
        ("lost", "item-unheard-of", 3, "view", None),
    ]
    found, report = _clean(rows, max_events_per_user=10)
    assert list(found) == [pseudonym("good", SECRET)]
    assert dict(report.dropped) == dict(zip(REASONS, (2, 1, 2, 1, 11, 2), strict=True))
    assert (report.events_read, report.events_kept) == (len(rows), 6)
    assert report.events_read == report.events_kept + sum(report.dropped.values())
    assert (report.users_read, report.users_kept, report.users_over_cap, report.users_too_few) == (4, 1, 1, 2)


def test_ties_are_counted_and_the_table_names_no_user() -> None:
    rows = _views("good", range(5))
    rows += [("good", "item-9", 4, "view", None), ("good", "item-8", 4, "view", None)]
    _, report = _clean(rows + _views("other", range(4)))
    assert report.tied_events == 3
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "equal times of one user" in text
    assert "keyed" in text
    assert not any(name in text for name in ("good", "other", pseudonym("good", SECRET)))


def test_the_order_of_ties_is_neither_the_logs_nor_the_catalogs_nor_shared_by_users() -> None:
    tied: dict[str, list[Row]] = {
        user: [(user, item, 7, "view", None) for item in ITEMS] for user in ("a", "b")
    }
    found, _ = _clean(tied["a"] + tied["b"])
    reversed_log, _ = _clean((tied["a"] + tied["b"])[::-1])
    alone, _ = _clean(tied["a"])
    elsewhere, _ = _clean(tied["a"], secret=OTHER)
    of_a, of_b = found[pseudonym("a", SECRET)], found[pseudonym("b", SECRET)]
    assert found == reversed_log
    assert alone[pseudonym("a", SECRET)] == of_a  # another user changes nothing
    assert len({tuple(of_a), tuple(of_b), tuple(sorted(of_a)), tuple(elsewhere[pseudonym("a", OTHER)])}) == 4
    assert sorted(of_a) == sorted(of_b) == sorted((item, 7) for item in ITEMS)


def test_the_rule_for_duplicates_is_the_policys() -> None:
    rows: list[Row] = [
        ("u", "item-1", 5, "view", None),
        ("u", "item-1", 1, "view", 2.0),
        ("u", "item-1", 1, "view", 1.0),
        ("u", "item-2", 3, "view", None),
    ]
    user = pseudonym("u", SECRET)
    kept = {
        rule: _clean(rows, minimum_events=1, duplicates=rule)[0][user]
        for rule in ("same-event", "same-item", "keep")
    }
    assert kept["same-event"] == [("item-1", 1), ("item-2", 3), ("item-1", 5)]
    assert kept["same-item"] == [("item-1", 1), ("item-2", 3)]
    assert len(kept["keep"]) == 4


def test_kinds_and_values_stay_with_their_events() -> None:
    rows: list[Row] = [
        ("u", "item-2", 2, "buy", 2.5),
        ("u", "item-1", 1, "view", None),
        ("u", "item-3", 3, None, -1.0),
    ]
    histories, _ = clean(_log(rows), CATALOG, CleaningPolicy(), SECRET)
    assert [histories.kind_names[kind] for kind in histories.kinds] == ["view", "buy", "view"]
    assert np.array_equal(histories.values, np.array([np.nan, 2.5, -1], dtype=np.float32), equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", None]),
            st.sampled_from([*ITEMS[:4], "item-unheard-of", None]),
            st.one_of(st.none(), st.integers(-3, 3)),
            st.sampled_from(["view", "buy"]),
            st.just(None),
        ),
        max_size=40,
    )
)
def test_one_users_history_is_a_function_of_that_users_events_alone(rows: list[Row]) -> None:
    mine = [row for row in rows if row[0] == "a"]
    try:
        alone, _ = _clean(mine, max_events_per_user=12)
    except LogError:
        alone = {}
    try:
        together, report = _clean(rows, max_events_per_user=12)
    except LogError:
        assert not alone
        return
    user = pseudonym("a", SECRET)
    assert together.get(user) == alone.get(user)
    assert report.events_read == report.events_kept + sum(report.dropped.values()) == len(rows)


def test_no_raw_id_reaches_a_saved_file_and_sites_share_no_pseudonym(tmp_path: Path) -> None:
    rows = [row for user in ("ann@example.org", "bob@example.org") for row in _views(user, range(5))]
    saved = []
    for place, secret in enumerate((SECRET, OTHER)):
        histories, _ = clean(_log(rows), CATALOG, CleaningPolicy(), secret)
        histories.save(tmp_path / str(place))
        saved.append(set(Histories.load(tmp_path / str(place)).users.tolist()))
    assert len(saved[0] | saved[1]) == 4
    for path in tmp_path.rglob("*.*"):
        content = path.read_bytes()
        for raw in ("ann@example.org", "bob@example.org"):
            assert raw.encode() not in content
            assert raw.encode("utf-32-le") not in content


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("u", "item-unheard-of", 1, "view", None)] * 3, "item not in the catalog"),
        (_views("u", range(2)), "user with too few events"),
        ([("u", "item-1", None, "view", None)] * 3, "no readable time"),
    ],
)
def test_a_log_of_which_nothing_is_left_says_why(rows: list[Row], reason: str) -> None:
    with pytest.raises(LogError, match=f"nothing is left of the log: mostly '{reason}'"):
        _clean(rows)


@pytest.mark.parametrize(
    "policy", [{"minimum_events": 0}, {"minimum_events": 5, "max_events_per_user": 4}, {"duplicates": "some"}]
)
def test_a_policy_out_of_bounds_is_refused(policy: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        CleaningPolicy(**policy)  # type: ignore[arg-type]


def test_a_row_damaged_far_down_is_refused_without_quoting_it(tmp_path: Path) -> None:
    lines = ["user,item,time"] + [f"u,item-1,{second}" for second in range(5000)] + ["secret-user,1,2,3,4"]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(LogError, match="line 5002 has 5 fields, where the first has 3") as caught:
        clean(read_log(tmp_path / "log.csv"), CATALOG, CleaningPolicy(), SECRET)
    assert "secret-user" not in str(caught.value)


def test_a_gz_cut_off_in_the_middle_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"u{second % 97},item-{second % 60},{second * 7919}\n" for second in range(200_000))
    content = gzip.compress(b"user,item,time\n" + rows.encode())
    (tmp_path / "log.csv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(LogError):
        clean(read_log(tmp_path / "log.csv.gz"), CATALOG, CleaningPolicy(), SECRET)


_MEASURE = """
import resource, sys
from pathlib import Path
from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, clean
from common.events.readers import read_log
items = tuple(f"item-{row}" for row in range(60))
catalog = Catalog(items, items, ((),) * 60)
clean(read_log(Path(sys.argv[1])), catalog, CleaningPolicy(), bytes(32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
histories, report = clean(read_log(Path(sys.argv[2])), catalog, CleaningPolicy(), bytes(32))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(report.events_read, histories.events, (after - before) * 1024)
"""


def _write_log(path: Path, events: int) -> int:
    """Writes a log with a wide column that nobody asked for; returns its size before compression."""
    padding, size = "x" * 200, 0
    with gzip.open(path, "wt", compresslevel=1) as file:
        size += file.write("user,item,time,agent\n")
        for first in range(0, events, 1000):
            size += file.write(
                "".join(
                    f"user-{event % 5000},item-{event % 70},{event},{padding}\n"
                    for event in range(first, first + 1000)
                )
            )
    return size


def test_a_log_of_two_million_events_takes_far_less_memory_than_its_size(tmp_path: Path) -> None:
    small, large = tmp_path / "small.csv.gz", tmp_path / "large.csv.gz"
    _write_log(small, 20_000)
    size = _write_log(large, 2_000_000)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(large)], capture_output=True, text=True, check=True
    )
    read, kept, grown = map(int, done.stdout.split())
    assert read == 2_000_000
    assert 1_600_000 < kept < 2_000_000
    assert size > 450_000_000
    assert grown < size / 2
