"""Files without a line of names: read by places, and never quoted where they are not; separators that a name hides."""

from __future__ import annotations

import gzip
import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from common.events.catalog import Catalog, read_catalog
from common.events.cleaning import CleaningPolicy, clean
from common.events.fields import looks_like_a_name
from common.events.readers import scan_log
from common.events.schema import LogError
from tests.common.events.reading import Row, events, refusal, write

ROWS: list[Row] = [("u1", "i1", 1_511_544_070), ("u1", "i3", 1_511_544_079), ("u2", "i2", 1_511_544_071)]
PLACES = "user=1,item=2,time=3"


def _text(separator: str = ",", order: str = "uit") -> str:
    lines = []
    for user, item, time in ROWS:
        fields = {"u": user, "i": item, "t": str(time), "x": "extra"}
        lines.append(separator.join(fields[each] or "" for each in order))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "order", "columns"),
    [
        ("log.csv", "uit", PLACES),
        ("log.csv", "tiu", "user=3,item=2,time=1"),
        ("log.csv", "xuxitx", "user=2,item=4,time=5"),
        ("log.tsv", "uit", PLACES),
        ("log.tab", "xiut", "time=4,user=3,item=2"),
        ("log.csv.gz", "uit", PLACES),
    ],
)
def test_a_log_without_names_is_read_by_places_with_its_first_row(
    tmp_path: Path, name: str, order: str, columns: str
) -> None:
    text = _text("," if "csv" in name else "\t", order)
    path = write(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text)
    assert events(path, columns) == ROWS


@pytest.mark.parametrize(
    "first",
    [
        "person-17@example.org,1,1511544070",
        "17,1,1511544070",
        "alice,hammer,2017-07-15",
        "alice,hammer,2017-07-15T10:00:00Z",
        "user_000001,i,1511544070.5",
        "alice,hammer,15/07/2017 10:00",
        "alice,hammer,Nov 23 2017",
        "0017,0001,20170715",
        "\u738b\u82b3,\u9524\u5b50,2017-07-15",
        '"alice","hammer","2017-07-15"',
        "3F2504E0-4F89-11D3-9A0C-0305E82C3301,hammer,1511544070",
        "alice,hammer,-1",
    ],
)
def test_a_first_row_is_never_quoted_nor_taken_for_names(tmp_path: Path, first: str) -> None:
    path = write(tmp_path / "log.csv", first + "\nbob,hammer,1511544071\n")
    by_row = dict(zip(("user", "item", "time"), first.split(","), strict=True))
    for columns in (None, ",".join(f"{field}={value}" for field, value in by_row.items()), "user=who"):
        message = refusal(path, columns)
        assert "first line does not look like column names" in message
        assert "--columns user=1,item=2,time=3" in message
        assert not any(value.strip('"') in message for value in by_row.values() if len(value) > 2)
    assert len(events(path, PLACES)) == 2


@pytest.mark.parametrize(
    "text", ["alice,hammer\nbob,nail\n", "alice,hammer,soon\nbob,nail,late\n", "alice,hammer,soon\n"]
)
def test_a_first_row_of_words_alone_is_not_quoted_either(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "log.csv", text)
    for columns in (None, "user=who"):
        message = refusal(path, columns)
        assert "alice" not in message
        assert "hammer" not in message
        assert "--columns user=1,item=2,time=3" in message


@pytest.mark.parametrize(
    "header",
    ["user,item,time", "User ID,Item,Date", '"user","item","time"', "0,1,2", "1,2,3", "uid,sku,When (UTC)"],
)
def test_places_of_a_file_that_has_names_pass_over_them(tmp_path: Path, header: str) -> None:
    assert events(write(tmp_path / "log.csv", header + "\n" + _text()), PLACES) == ROWS


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("user=0,item=1,time=2", "from 1"),
        ("user=1,item=2,time=9", "no column '9' (for time)"),
        ("user=1,item=2", "no column for time"),
        ("user=1,item=name,time=3", "does not look like column names"),
    ],
)
def test_places_that_are_not_there_are_refused(tmp_path: Path, columns: str, said: str) -> None:
    message = refusal(write(tmp_path / "log.csv", _text()), columns)
    assert said in message
    assert "u1" not in message


def test_parts_of_which_the_first_alone_has_names(tmp_path: Path) -> None:
    write(tmp_path / "log" / "part-0.csv", "user,item,time\n" + "\n".join(_text().splitlines()[:1]) + "\n")
    write(tmp_path / "log" / "part-1.csv", "\n".join(_text().splitlines()[1:]) + "\n")
    message = refusal(tmp_path / "log")
    assert "part-1.csv: its first line does not look like column names" in message
    assert events(tmp_path / "log", PLACES) == ROWS


@pytest.mark.parametrize("name", ["log.parquet", "log.jsonl"])
def test_formats_that_have_names_say_so_where_places_are_given(tmp_path: Path, name: str) -> None:
    frame = pl.DataFrame({"user": ["u"], "item": ["i"], "time": [1]})
    path = tmp_path / name
    frame.write_parquet(path) if name.endswith("parquet") else frame.write_ndjson(path)
    assert "it has: user, item, time" in refusal(path, PLACES)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user,item,time,item\nu,i,1,j\n")
    assert "two columns 'item'" in refusal(path)
    assert events(path, PLACES.replace("item=2", "item=4")) == [("u", "j", 1)]
    other = write(tmp_path / "other.csv", "user,item,time,note,note\nu,i,1,j,k\n")
    assert events(other) == [("u", "i", 1)]


def test_a_catalog_without_names_is_read_by_places(tmp_path: Path) -> None:
    path = write(tmp_path / "news.tsv", "N1\tsports\tA title\nN2\tnews\tAnother\n")
    catalog = read_catalog(path, columns={"item": "1", "categories": "2", "text": "3"})
    assert (catalog.ids, catalog.texts, catalog.categories) == (
        ("N1", "N2"),
        ("A title", "Another"),
        (("sports",), ("news",)),
    )
    with_names = write(tmp_path / "c.csv", "item,title\nabc,Words\n")
    assert read_catalog(with_names, columns={"item": "1", "text": "2"}).ids == ("abc",)
    without = write(tmp_path / "d.csv", "abc,Words\ndef,More\n")
    assert read_catalog(without, columns={"item": "1", "text": "2"}).ids == ("abc", "def")
    numbered = write(tmp_path / "e.csv", "17,Words\n18,More\n")
    with pytest.raises(LogError, match="--catalog-columns item=1,text=2"):
        read_catalog(numbered)


@pytest.mark.parametrize(
    ("separator", "spelt"),
    [
        (";", ";"),
        ("|", "|"),
        ("::", "::"),
        ("\t", "tab"),
        (" ", "space"),
        (",", "comma"),
        ("\x01", "\x01"),
        ("\u00a6", "\u00a6"),
        ("||", "||"),
        ("~", "~"),
        ("###", "###"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_separators_by_option(tmp_path: Path, separator: str, spelt: str, named: bool) -> None:
    text = (separator.join(["user", "item", "time"]) + "\n" if named else "") + _text(separator)
    for name in ("log.csv", "log.txt", "log.data", "log"):
        path = write(tmp_path / name, text)
        assert events(path, None if named else PLACES, separator=spelt) == ROWS


@pytest.mark.parametrize(
    ("separator", "said"), [(";", "';'"), ("|", "'|'"), ("::", "'::'"), ("\t", "tab"), (" ", "space")]
)
@pytest.mark.parametrize("named", [True, False])
def test_a_wrong_separator_is_found_out_and_said(
    tmp_path: Path, separator: str, said: str, named: bool
) -> None:
    text = (separator.join(["user", "item", "time"]) + "\n" if named else "") + _text(separator)
    message = refusal(write(tmp_path / "log.csv", text))
    assert f"--separator {said}" in message
    assert "u1" not in message


def test_comma_in_a_tsv_is_found_out_too(tmp_path: Path) -> None:
    assert "--separator ','" in refusal(write(tmp_path / "log.tsv", "user,item,time\n" + _text()))


def test_blanks_in_any_number_are_one_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "out.txt", "  u1   i1 1511544070\nu2 i2    1511544071  \n")
    assert events(path, PLACES, separator="space") == [("u1", "i1", 1511544070), ("u2", "i2", 1511544071)]
    quoted = write(tmp_path / "q.txt", 'user item time\n"u 1" i1 1511544070\n')
    assert events(quoted, separator="space") == [("u 1", "i1", 1511544070)]


def test_semicolons_with_quotes_and_commas_within(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", 'user;item;time;note\n"u;1";i;1;"a, b"\n')
    assert events(path, separator=";") == [("u;1", "i", 1)]


@pytest.mark.parametrize("separator", ["", '"', "\n", "a\nb", "\x1f"])
def test_what_cannot_stand_between_fields_is_refused(tmp_path: Path, separator: str) -> None:
    with pytest.raises(LogError, match="cannot stand between fields"):
        events(write(tmp_path / "log.csv", _text()), PLACES, separator=separator)


def test_a_spreadsheets_own_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "sep=;\nuser;item;time\nu;i;1\n")
    assert "sep=" in refusal(path)
    assert "--separator" in refusal(path)


@pytest.mark.parametrize("quoted", ["", ',"a, b"'])
@pytest.mark.parametrize("short", ["", "\n", "u,1\n"])
def test_a_line_with_more_fields_than_names_is_named_without_quoting_it(
    tmp_path: Path, quoted: str, short: str
) -> None:
    text = "user,item,time" + (",note" if quoted else "") + "\n"
    text += "".join(f"u,{n},{n}{quoted}\n" for n in range(3000)) + short
    line = text.count("\n") + 1
    path = write(tmp_path / "log.csv", text + f"secret-user,2,3{quoted},4,5\n" + short)
    message = refusal(path)
    assert f"line {line} has {6 if quoted else 5} fields, where the first has {4 if quoted else 3}" in message
    assert "--separator" in message
    assert "secret-user" not in message
    assert len(events(write(tmp_path / "right.csv", text))) == 3000 + ("u" in short)


@pytest.mark.parametrize("quoted", [',"a\nb"', ',5" disc'])
def test_a_wide_line_with_quotes_is_named_too(tmp_path: Path, quoted: str) -> None:
    text = "user,item,time,note\n" + f"u,1,1{quoted}\n"
    message = refusal(write(tmp_path / "log.csv", text + f"secret-user,2,3{quoted},4,5\n"))
    assert re.search("line [345] ", message)
    assert "secret-user" not in message


def test_a_line_of_names_that_lacks_one_is_found_out(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user,item,time\n1,u,i,1500000000\n2,u,j,1500000001\n")
    assert "line 2 has 4 fields, where the first has 3" in refusal(path)


def test_names_that_lack_one_are_passed_over_where_places_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user,item,time\n1,u,i,1500000000\n2,u,j,1500000001\n")
    assert events(path, "user=2,item=3,time=4") == [("u", "i", 1500000000), ("u", "j", 1500000001)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("named", [True, False])
def test_blank_lines_are_no_events(tmp_path: Path, end: str, named: bool) -> None:
    lines = (
        ["", "user,item,time", "u,i,1", "", "", "v,j,2", ""] if named else ["", "u,i,1", "", "v,j,2", "", ""]
    )
    path = write(tmp_path / "log.csv", end.join(lines) + end)
    assert events(path, None if named else PLACES) == [("u", "i", 1), ("v", "j", 2)]


def test_a_first_line_of_any_length_is_read(tmp_path: Path) -> None:
    more = 20_000
    text = "user,item,time," + ",".join(f"c{n}" for n in range(more)) + "\nu,i,1" + "," * more + "\n"
    assert events(write(tmp_path / "log.csv", text)) == [("u", "i", 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!DOCTYPE html><html>", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a pointer of Git LFS"),
        ('{"user":"secret","item":1,"time":1}\n', "--format jsonl"),
        ('[{"user":"secret","item":1,"time":1}]\n', "--format jsonl"),
        ("\n\n\n", "is empty"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, text: str, said: str) -> None:
    message = refusal(write(tmp_path / "log.csv", text))
    assert said in message
    assert "secret" not in message


def test_rows_that_are_read_are_held_against_the_lines_of_the_file(tmp_path: Path) -> None:
    log = scan_log(write(tmp_path / "log.csv", "user,item,time\nu,1,1\nv,1,2\n"))
    assert log.events == 2
    with pytest.raises(LogError, match="2 rows were read of 3 that the log's files have"):
        clean(
            replace(log, events=3), Catalog(("1",), ("",), ((),)), CleaningPolicy(minimum_events=1), bytes(32)
        )


@pytest.mark.parametrize(
    "text",
    [
        "user",
        "user_id",
        "CustomerID",
        "Item (SKU)",
        "t_dat",
        "event.time",
        "Unit price \u20ac",
        "\u7528\u6237ID",
        "_id",
        "#",
    ],
)
def test_names_look_like_names(text: str) -> None:
    assert looks_like_a_name(text)


@pytest.mark.parametrize(
    "text", ["1", "2017-07-15", "a@b.org", "user_000001", "1.5e9", "12:30", "-1", "x" * 70]
)
def test_values_do_not(text: str) -> None:
    assert not looks_like_a_name(text)
