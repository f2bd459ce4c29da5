"""Readers: each format, its ids, times and values; and the refusals, in one line with a way out."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.events.readers import read_log
from common.events.schema import EVENT_SCHEMA, LogError
from common.events.times import TimeForm

NEW_YEAR = 1_704_067_200  # 2024-01-01T00:00:00Z


def _rows(
    path: Path, format: str = "auto", columns: dict[str, str] | None = None
) -> list[tuple[object, ...]]:
    frame = read_log(path, format, columns).collect()
    assert dict(frame.schema) == dict(EVENT_SCHEMA)
    return frame.rows()


def _write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.tsv.gz"])
def test_separated_text_with_mapped_columns(tmp_path: Path, name: str) -> None:
    text = "CustomerID,Code,When,Event,Price\n17850.0,a b,1700000000,buy,2.5\n 7 ,\u00e9,1700000001,,\n"
    if "tsv" in name:
        text = text.replace(",", "\t")
    columns = {"user": "CustomerID", "item": "Code", "time": "When", "value": "Price"}
    assert _rows(_write(tmp_path / name, text), columns=columns) == [
        ("17850", "a b", 1700000000, "buy", 2.5),
        ("7", "\u00e9", 1700000001, "view", None),
    ]


@pytest.mark.parametrize("name", ["log.jsonl", "log.ndjson.gz"])
def test_json_lines_of_mixed_types(tmp_path: Path, name: str) -> None:
    rows = [
        {"user": 1, "item": "a", "time": NEW_YEAR, "more": {"x": [1]}},
        {"user": "x", "item": 3, "time": "2024-01-01", "value": 4},
        {"item": "b", "time": 1.5},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert _rows(_write(tmp_path / name, text)) == [
        ("1", "a", NEW_YEAR, "view", None),
        ("x", "3", NEW_YEAR, "view", 4.0),
        (None, "b", 1, "view", None),
    ]


def test_parquet_with_typed_columns(tmp_path: Path) -> None:
    east = timezone(timedelta(hours=2))
    pl.DataFrame(
        {
            "user_id": [17850.0, None, float("nan")],
            "item_id": [1, 2, 3],
            "timestamp": [datetime(2024, 1, 1, 2, tzinfo=east), None, datetime(2024, 1, 1, tzinfo=UTC)],
        },
        schema_overrides={"timestamp": pl.Datetime("ns", "UTC")},
    ).write_parquet(tmp_path / "log.parquet")
    assert _rows(tmp_path / "log.parquet") == [
        ("17850", "1", NEW_YEAR, "view", None),
        (None, "2", None, "view", None),
        (None, "3", NEW_YEAR, "view", None),
    ]
    pl.DataFrame({"user": ["u"], "item": ["i"], "time": [date(2024, 1, 1)]}).write_parquet(tmp_path / "d.pq")
    assert _rows(tmp_path / "d.pq")[0][2] == NEW_YEAR


def test_a_folder_of_parts_is_one_log(tmp_path: Path) -> None:
    for part in range(3):
        _write(tmp_path / f"part-{part}.csv.gz", f"user,item,time\nu{part},i,{part}\n")
    (tmp_path / "_SUCCESS").touch()
    assert [row[0] for row in _rows(tmp_path)] == ["u0", "u1", "u2"]
    pl.DataFrame({"user": ["u"], "item": ["i"], "time": [1]}).write_parquet(tmp_path / "more.parquet")
    with pytest.raises(LogError, match="mixes formats"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ratings.dat", "1::1193::5::978300760\n2::661::3.5::978302109\n"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,1193,5.0,978300760\n2,661,3.5,978302109\n"),
        ("u.data", "1\t1193\t5\t978300760\n2\t661\t3.5\t978302109\n"),
        (
            "small.inter",
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
            "1\t1193\t5\t978300760.0\n2\t661\t3.5\t978302109\n",
        ),
        (
            "small.inter.gz",
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
            "1\t1193\t5\t978300760\n2\t661\t3.5\t978302109\n",
        ),
    ],
)
def test_movielens_and_recbole(tmp_path: Path, name: str, text: str) -> None:
    assert _rows(_write(tmp_path / name, text)) == [
        ("1", "1193", 978300760, "rating", 5.0),
        ("2", "661", 978302109, "rating", 3.5),
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1704067200", NEW_YEAR),
        ("1704067200.9", NEW_YEAR),
        ("1.7040672e9", NEW_YEAR),
        ("1704067200999", NEW_YEAR),
        ("-1.5", -2),
        ("99999999999", 99_999_999_999),
        ("100000000000", 100_000_000_000),  # seconds, of a year that is not believed
        ("2024-01-01", NEW_YEAR),
        ("2024-01-01T00:00:00", NEW_YEAR),
        (" 2024-01-01 00:00:00 ", NEW_YEAR),
        ("2024-01-01T00:00:00.123456Z", NEW_YEAR),
        ("2024-01-01T02:00:00+02:00", NEW_YEAR),
        ("2024-01-01T02:00+0200", NEW_YEAR),
        ("2024-01-01 02:00:00+02", NEW_YEAR),
        ("2023-12-31T19:00:00-05:00", NEW_YEAR),
        ("2024-01-01T00:00", NEW_YEAR),
        ("2024-01-01 00:00:00 UTC", NEW_YEAR),
        ("2024-02-30", None),
        ("2024-13-01T00:00:00", None),
        ("1e14", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
    ],
)
def test_times_as_text(tmp_path: Path, text: str, seconds: int | None) -> None:
    path = _write(tmp_path / "log.csv", f"user,item,time\nu,i,{text}\nu,i,{text}\n")
    assert _rows(path)[0][2] == seconds


def test_values_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.csv", "user,item,time,value\nu,i,1,many\nu,i,1,inf\nu,i,1,-2\n")
    assert [row[4] for row in _rows(path)] == [None, None, -2.0]


def test_ids_that_were_damaged_are_null_and_never_merge_two_users(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    lines = "user,item,time\n\u00e9\u00e9\u00e9,i,1\n".encode() + b"\xe9,i,2\n\xe8,i,3\nu,i,4\n"
    path.write_bytes(lines)
    assert [row[0] for row in _rows(path)] == ["\u00e9\u00e9\u00e9", None, None, "u"]


def _refusal(path: Path, format: str = "auto", columns: dict[str, str] | None = None) -> str:
    with pytest.raises(LogError) as caught:
        read_log(path, format, columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "absent.csv does not exist" in _refusal(tmp_path / "absent.csv")


def test_a_wrong_column_names_those_that_are_there(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.csv", "who,what,when\n1,2,3\n")
    assert "no column for user; it has: who, what, when. Map one with user=COLUMN" in _refusal(path)
    columns = {"user": "whom", "item": "what", "time": "when"}
    assert "no column 'whom' (for user); it has: who, what, when" in _refusal(path, columns=columns)
    assert "no field 'person'" in _refusal(path, columns={"person": "who"})


@pytest.mark.parametrize("text", ["", "user,item,time\n"])
def test_an_empty_log_is_refused(tmp_path: Path, text: str) -> None:
    assert "log.csv" in _refusal(_write(tmp_path / "log.csv", text))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "holds no files" in _refusal(tmp_path)


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.txt", "user,item,time\n1,2,3\n")
    assert "csv, tsv, parquet, jsonl, movielens, recbole" in _refusal(path)
    assert "format 'excel' is unknown" in _refusal(path, "excel")
    assert _rows(path, "csv") == [("1", "2", 3, "view", None)]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "movielens", "recbole"])
def test_a_file_of_another_format_is_refused_without_quoting_it(tmp_path: Path, format: str) -> None:
    path = _write(tmp_path / "log.any", "user,item,time\nsecret-user,2,3\n")
    assert "secret-user" not in _refusal(path, format)


_ODD_NUMBERS = [
    10**11,
    10**11 - 1,
    -(10**11),
    10**14,
    10**14 - 1,
    -(10**14),
    -(10**11) - 999,
    2**63,
    2**63 - 1,
]


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.text("0123456789+-. eT:", max_size=12),
            st.builds(
                "{}{}{}".format,
                st.sampled_from(["", " ", "+", "0"]),
                st.one_of(st.integers(-(2**63), 2**63), st.sampled_from(_ODD_NUMBERS)),
                st.sampled_from(["", " ", ".0", ".9", "e1"]),
            ),
        ),
        max_size=20,
    )
)
def test_whole_numbers_as_text_are_the_times_that_the_careful_way_reads(texts: list[str | None]) -> None:
    series = pl.Series("text", texts, dtype=pl.String)
    form = TimeForm()
    assert form._of_texts(series).equals(form._of_odd(series))
