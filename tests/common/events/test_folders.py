"""Folders: what lies in folders below is read, partitions are columns, and parts may differ where nobody asks."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest

from common.events.catalog import read_catalog
from common.events.readers import read_log, scan_log
from tests.common.events.reading import events, refusal, write

HEADER = "user,item,time\n"


def test_folders_below_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write(log / "a.csv", HEADER + "u,1,1\n")
    write(log / "b" / "c.csv", HEADER + "u,2,2\n")
    write(log / "b" / "d" / "e.csv.gz", gzip.compress((HEADER + "u,3,3\n").encode()))
    assert events(log) == [("u", "1", 1), ("u", "2", 2), ("u", "3", 3)]


def test_hidden_files_and_marks_of_success_are_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write(log / "date=2017-07-15" / "part-0.csv", HEADER + "u,1,1\n")
    for name in (
        "_SUCCESS",
        ".part-0.csv.crc",
        "_metadata",
        ".hidden/x.csv",
        "_temporary/0/y.csv",
        "_committed_1",
    ):
        write(log / name, HEADER + "v,9,9\n")
    write(log / "date=2017-07-16" / "part-1.csv", "")
    assert events(log) == [("u", "1", 1)]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_partitions_are_columns(tmp_path: Path, kind: str) -> None:
    for number, (day, event) in enumerate([("2017-07-15", "view"), ("2017-07-16", "buy%20now")]):
        folder = tmp_path / "log" / f"date={day}" / f"event={event}"
        folder.mkdir(parents=True)
        frame = pl.DataFrame({"user": [f"u{number}"], "item": [number]})
        path = folder / f"part.{kind}"
        {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[kind](path)
    frame = read_log(tmp_path / "log", columns={"time": "date"}).collect().sort("user")
    assert frame["kind"].to_list() == ["view", "buy now"]
    assert frame["time"].to_list() == [1500076800, 1500163200]


def test_a_partition_without_a_value_is_none_and_a_column_of_the_file_wins(tmp_path: Path) -> None:
    write(tmp_path / "log" / "kind=__HIVE_DEFAULT_PARTITION__" / "a.csv", HEADER + "u,1,1\n")
    write(tmp_path / "log" / "user=x" / "b.csv", HEADER + "u,2,2\n")
    frame = read_log(tmp_path / "log").collect().sort("time")
    assert frame["user"].to_list() == ["u", "u"]
    assert frame["kind"].to_list() == ["view", "view"]


def test_a_thousand_partitions_are_read(tmp_path: Path) -> None:
    for number in range(1000):
        write(tmp_path / "log" / f"hour={number}" / "part.csv", HEADER + f"u{number},{number},{number}\n")
    assert len(events(tmp_path / "log")) == 1000


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"user": pl.Int32}, {"user": pl.Int64}),
        ({"user": pl.Int8, "item": pl.UInt16}, {"user": pl.UInt64, "item": pl.Int32}),
        ({"user": pl.Int64}, {"user": pl.Float64}),
        ({"user": pl.Int64}, {"user": pl.String}),
        ({"time": pl.Int64}, {"time": pl.Int32}),
        ({"item": pl.Categorical}, {"item": pl.String}),
        ({"more": pl.Int64}, {"more": pl.List(pl.Int64)}),
        ({"more": pl.Int64}, {}),
    ],
)
def test_parquet_parts_of_other_types_are_read_where_they_mean_the_same(
    tmp_path: Path, first: dict[str, pl.DataType], second: dict[str, pl.DataType]
) -> None:
    (tmp_path / "log").mkdir()
    for name, types in (("a", first), ("b", second)):
        frame = pl.DataFrame({"user": [1, 2], "item": [3, 4], "time": [5, 6]})
        if "more" in types:
            frame = frame.with_columns(more=pl.lit(1))
        text = {key: dtype for key, dtype in types.items() if dtype == pl.Categorical}
        frame = frame.with_columns(pl.col(key).cast(pl.String) for key in text)
        frame = frame.with_columns(
            (pl.concat_list(key) if isinstance(dtype, pl.List) else pl.col(key).cast(dtype)).alias(key)
            for key, dtype in types.items()
        )
        frame.select(reversed(frame.columns)).write_parquet(tmp_path / "log" / f"{name}.parquet")
    assert events(tmp_path / "log") == [("1", "3", 5)] * 2 + [("2", "4", 6)] * 2


def test_csv_parts_of_other_columns_and_order_are_read(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.csv", "user,item,time,more\nu,1,1,x\n")
    write(tmp_path / "log" / "b.csv", "time,user,item\n2,u,2\n")
    write(tmp_path / "log" / "c.csv", "user_id,item,time,kind\nu,3,3,buy\n")
    frame = read_log(tmp_path / "log").collect().sort("time")
    assert frame["item"].to_list() == ["1", "2", "3"]
    assert frame["kind"].to_list() == ["view", "view", "buy"]


def test_a_part_that_lacks_a_column_is_named_with_it(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.csv", HEADER + "u,1,1\n")
    write(tmp_path / "log" / "b" / "c.csv", "user,sku,time\nu,1,1\n")
    assert "log b/c.csv has no column for item; it has: user, sku, time" in refusal(tmp_path / "log")
    assert "has no column 'sku' (for item)" in refusal(tmp_path / "log", "item=sku")


def test_a_part_whose_column_holds_lists_is_named_with_column_and_type(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    pl.DataFrame({"user": [1], "item": ["a"], "time": [1]}).write_parquet(tmp_path / "log" / "a.parquet")
    pl.DataFrame({"user": [1], "item": [["a"]], "time": [1]}).write_parquet(tmp_path / "log" / "b.parquet")
    message = refusal(tmp_path / "log")
    assert "b.parquet: column 'item' (for item) holds lists, type List(String)" in message


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    pl.DataFrame({"user": [1], "item": ["a"], "time": [1]}).write_parquet(tmp_path / "log" / "a.parquet")
    write(tmp_path / "log" / "b.parquet", (tmp_path / "log" / "a.parquet").read_bytes()[:-20])
    assert "b.parquet" in refusal(tmp_path / "log")


def test_tables_with_versions_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.csv", HEADER + "u,1,1\n")
    write(tmp_path / "log" / "_delta_log" / "0.json", "{}")
    assert "Delta or Iceberg" in refusal(tmp_path / "log")


def test_a_link_back_is_no_loop(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.csv", HEADER + "u,1,1\n")
    (tmp_path / "log" / "again").symlink_to(tmp_path / "log", target_is_directory=True)
    write(tmp_path / "elsewhere" / "b.csv", HEADER + "u,2,2\n")
    (tmp_path / "log" / "other").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert events(tmp_path / "log") == [("u", "1", 1), ("u", "2", 2)]


def test_folders_of_empty_files_or_of_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log" / "date=1").mkdir(parents=True)
    assert "holds no files" in refusal(tmp_path / "log")
    write(tmp_path / "log" / "date=1" / "a.csv", "")
    assert "is empty" in refusal(tmp_path / "log")


def test_how_many_events_there_are_is_known_beforehand(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.csv", HEADER + "u,1,1\nu,2,2")
    write(tmp_path / "log" / "b" / "c.csv", HEADER + '"u",1,1\n"u\nv",2,2\n')
    assert scan_log(tmp_path / "log").events == 4


def test_a_catalog_may_be_a_folder_of_parts(tmp_path: Path) -> None:
    write(tmp_path / "items" / "a.csv", "item,title\n1,One\n")
    write(tmp_path / "items" / "more" / "b.csv", "title,item\nTwo,2\n")
    assert read_catalog(tmp_path / "items").texts == ("One", "Two")


def test_what_is_said_of_many_parts_is_short(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / "log" / f"{number:02}.csv", (HEADER + f"caf\u00e9,{number},1\n").encode("latin-1"))
    notes = scan_log(tmp_path / "log").notes
    assert notes[0] == "00.csv is read as Windows-1252, as it is not UTF-8"
    assert notes[3:] == ("so much was to be said of 17 files more",)
