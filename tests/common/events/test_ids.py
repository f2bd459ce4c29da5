"""One rule for ids, in every format: two users never become one unsaid, and one user never two."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from common.events import ids as rules
from common.events.catalog import Catalog, CatalogError, read_catalog
from common.events.cleaning import CleaningPolicy, clean
from common.events.ids import id_expression
from common.events.near import near_ids, said_of_near
from common.events.readers import scan_log
from common.events.rules import CleaningReport
from common.events.schema import LogError

CATALOG = Catalog(("1", "2", "3"), ("One", "Two", "Three"), ((), (), ()))
TIME = 1_500_000_000
EVERYTHING = CleaningPolicy(minimum_events=1)


def tidy(text: str) -> str | None:
    found: str | None = pl.DataFrame({"id": [text]}).select(id_expression("id", pl.String())).item()
    return found


def users_of(path: Path, catalog: Catalog = CATALOG) -> tuple[int, int]:
    """How many users a log has, and how many of its events are kept."""
    histories, report = clean(scan_log(path), catalog, EVERYTHING, bytes(32))
    return len(histories), report.events_kept


@pytest.mark.parametrize(
    ("text", "is_"),
    [
        ("101", "101"),
        ("101.0", "101"),
        ("101.000", "101"),
        ("-5.0", "-5"),
        (" 101 ", "101"),
        ("\u00a0101\u3000", "101"),
        ("10\u200b1", "101"),
        ("\ufeff101", "101"),
        ("101\x00", "101"),
        ("a\tb", "ab"),
        ("\u202eab\u202c", "ab"),
        ("so\u00adft", "soft"),
        ("e\u0301", "\u00e9"),
        ("\u2028x", "x"),
        ("101.5", "101.5"),
        ("101.", "101."),
        (".0", ".0"),
        ("v1.0", "v1.0"),
        ("1.2.0", "1.2.0"),
        ("007", "007"),
        ("007.0", "007"),
        ("A-1", "A-1"),
        ("1e5", "1e5"),
        ("\u200b", None),
        ("  ", None),
        ("", None),
        ("x\ufffd", None),
    ],
)
def test_an_id_is_its_text_without_what_nobody_sees_and_without_a_floats_point(
    text: str, is_: str | None
) -> None:
    assert tidy(text) == is_
    if is_ is not None:
        assert tidy(is_) == is_  # so that an id of the catalog is what a log's id is held against


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl", "parquet"])
def test_101_and_101_0_and_the_integer_are_one_user_and_one_item(tmp_path: Path, format: str) -> None:
    parts = tmp_path / "log"
    parts.mkdir()
    spelt = {
        "a": ({"user": ["101"], "item": ["1"]}, {"user": [101], "item": [1]}),
        "b": ({"user": ["101.0"], "item": ["2.0"]}, {"user": [101.0], "item": [2.0]}),
        "c": ({"user": [" 101\u200b"], "item": ["\ufeff3"]}, {"user": ["101"], "item": ["3"]}),
    }
    for number, (name, (text, typed)) in enumerate(spelt.items()):
        frame = pl.DataFrame({**(typed if format in ("parquet", "jsonl") else text), "time": [TIME + number]})
        file = parts / f"{name}.{format}"
        match format:
            case "parquet":
                frame.write_parquet(file)
            case "jsonl":
                frame.write_ndjson(file)
            case _:
                frame.write_csv(file, separator="\t" if format == "tsv" else ",")
    assert users_of(parts) == (1, 3)


@pytest.mark.parametrize(
    "ids",
    [
        pl.Series(["7", "8"], dtype=pl.Categorical()),
        pl.Series(["7", "8"], dtype=pl.Enum(["7", "8"])),
        pl.Series([7, 8], dtype=pl.UInt64),
        pl.Series([7, 8], dtype=pl.Int8),
        pl.Series([7.0, 8.0], dtype=pl.Float32),
        pl.Series([7.0, float("nan")], dtype=pl.Float64),
        pl.Series([Decimal("7.00"), Decimal("8.00")]),
    ],
    ids=lambda ids: str(ids.dtype),
)
def test_types_that_hold_ids_are_read(tmp_path: Path, ids: pl.Series) -> None:
    pl.DataFrame({"user": ids, "item": ["1", "2"], "time": [TIME, TIME]}).write_parquet(
        tmp_path / "l.parquet"
    )
    other = tmp_path / "text.csv"
    other.write_text(f"user,item,time\n7,1,{TIME}\n8,2,{TIME}\n")
    histories, _ = clean(scan_log(tmp_path / "l.parquet"), CATALOG, EVERYTHING, bytes(32))
    same, _ = clean(scan_log(other), CATALOG, EVERYTHING, bytes(32))
    assert set(histories.users) <= set(same.users)
    assert len(histories) == 2 - sum(
        isinstance(value, float) and math.isnan(value) for value in ids.to_list()
    )


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (pl.Series([True, False]), "of type Boolean, which is no id"),
        (pl.Series([1, 2], dtype=pl.Date), "of type Date, which is no id"),
        (pl.Series([1, 2], dtype=pl.Duration("ms")), "which is no id"),
        (pl.Series([1.5, 2.0]), "of type Float64 and has fractions"),
        (pl.Series([2.0**53 + 2, 1.0]), "up to 9,007,199,254,740,992 only"),
        (pl.Series([16777217.0, 1.0], dtype=pl.Float32), None),
        (
            pl.Series([16777219.0, 1.0], dtype=pl.Float32),
            "of type Float32, which tells whole numbers apart up to",
        ),
        (pl.Series([["1"], ["2"]]), "holds lists"),
        (pl.Series([{"a": 1}, {"a": 2}]), "holds objects"),
        (pl.Series([b"1", b"2"]), "holds bytes"),
        (pl.Series(["1.2e+09", "7"]), "powers of ten"),
        (pl.Series(["1.23457E9", "7"]), "powers of ten"),
        (pl.Series(["9007199254740994.0", "7"]), "floats beyond 2^53"),
        (pl.Series(["123456789012345678901234.00", "7"]), "floats beyond 2^53"),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
@pytest.mark.parametrize("field", ["user", "item"])
def test_types_that_hold_no_ids_are_refused_by_column_and_type(
    tmp_path: Path, ids: pl.Series, said: str | None, field: str
) -> None:
    columns = {"user": pl.Series(["u", "v"]), "item": pl.Series(["1", "2"]), "time": pl.Series([TIME, TIME])}
    pl.DataFrame({**columns, field: ids}).write_parquet(tmp_path / "l.parquet")
    if said is None:  # 2^24 + 1 is 2^24 in that type: nothing tells
        scan_log(tmp_path / "l.parquet")
        return
    with pytest.raises(LogError) as refused:
        scan_log(tmp_path / "l.parquet")
    assert said in str(refused.value)
    assert f"column '{field}'" in str(refused.value)
    if field == "item" and not ids.dtype.is_nested():
        pl.DataFrame({"item": ids, "text": ["a", "b"]}).write_parquet(tmp_path / "c.parquet")
        with pytest.raises(LogError, match="column 'item'"):
            read_catalog(tmp_path / "c.parquet")


def test_a_user_far_down_whose_digits_are_lost_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "_ROWS", 2)
    (tmp_path / "log.csv").write_text(f"user,item,time\nu,1,{TIME}\nv,1,{TIME}\n1.23457e+09,1,{TIME}\n")
    log = scan_log(tmp_path / "log.csv")
    with pytest.raises(LogError, match="the column of users has ids such as"):
        clean(log, CATALOG, EVERYTHING, bytes(32))


def test_a_catalog_that_spells_one_item_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("item,text\n1,One\n1.0,Uno\n")
    with pytest.raises(CatalogError, match="lists item '1' twice"):
        read_catalog(tmp_path / "c.csv")


@pytest.mark.parametrize(
    ("ids", "count", "by"),
    [
        (["1,234", "1234", "5"], 2, ("a comma",)),
        (["007", "7", "8"], 2, ("leading zeros",)),
        (["0", "00", "000"], 3, ("leading zeros",)),
        (["Bob", "bob", "rob"], 2, ("case",)),
        (["a-1", "a1", "b"], 2, ("a hyphen",)),
        (["a_1", "a-1"], 2, ("separators or marks",)),
        (["'x'", "x"], 2, ("an apostrophe",)),
        (['"x"', "x"], 2, ("a quotation mark",)),
        (["a b", "ab"], 2, ("a blank",)),
        (["a-1", "a1", "A1"], 3, ("case", "a hyphen")),
        (["\u00c9a", "\u00e9a"], 2, ("case",)),
        (["x\u00a7", "x"], 2, ("a mark (section sign)",)),
        (["--", "-"], 0, ()),
        (["1", "2", "10"], 0, ()),
        (["x"], 0, ()),
        ([], 0, ()),
    ],
)
def test_ids_that_differ_by_next_to_nothing_are_counted(
    ids: list[str], count: int, by: tuple[str, ...]
) -> None:
    assert near_ids(pl.Series(ids, dtype=pl.String)) == (count, by)


def test_what_is_near_is_said_before_anything_is_made_of_it(tmp_path: Path) -> None:
    users = ["1,234", "1234", "5678", "9"]
    frame = pl.DataFrame({"user": users, "item": ["1", "01", "2", "99"], "time": [TIME] * 4})
    frame.write_csv(tmp_path / "log.csv", quote_style="always")
    _, report = clean(scan_log(tmp_path / "log.csv"), CATALOG, EVERYTHING, bytes(32))
    assert report.near == (
        "4 users, 2 of whom differ from another only by a comma",
        "1 items of the log are not in the catalog, but for leading zeros",
    )
    assert report.sentences()[:2] == report.near
    assert not any(user in sentence for sentence in report.near for user in users)


def test_a_sentence_of_nothing_is_empty() -> None:
    assert said_of_near("users", 0, 5, ()) == ""
    assert isinstance(CleaningReport(0, {}, 0, 0, 0, 0, 0, 0).sentences(), tuple)
