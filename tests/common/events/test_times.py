"""Times in the forms that people have; a column's numbers have one unit; and what cannot be believed is refused."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, clean
from common.events.readers import read_log, scan_log
from common.events.rules import CleaningReport
from common.events.schema import LogError
from common.events.times import FORMS, Span, check_times

WHEN = 1_500_000_000  # 2017-07-14 02:40:00 UTC
DAY = 1_499_990_400
CATALOG = Catalog(("1", "2", "3"), ("One", "Two", "Three"), ((), (), ()))
EVERYTHING = CleaningPolicy(minimum_events=1)


def written(folder: Path, times: list[str] | pl.Series, format: str = "csv") -> Path:
    file = folder / f"log.{format}"
    frame = pl.DataFrame({"user": ["u"] * len(times), "item": ["1"] * len(times), "time": times})
    frame.write_parquet(file) if format == "parquet" else frame.write_csv(file, quote_style="always")
    return file


def seconds(path: Path, **options: object) -> list[int | None]:
    found: list[int | None] = scan_log(path, **options).frame.select("time").collect()["time"].to_list()  # type: ignore[arg-type]
    return found


def report_of(path: Path, **options: object) -> CleaningReport:
    return clean(scan_log(path, **options), CATALOG, EVERYTHING, bytes(32))[1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "is_"),
    [
        ("2017-07-14T02:40:00Z", WHEN),
        ("2017-07-14T02:40:00z", WHEN),
        ("2017-07-14 02:40:00 UTC", WHEN),
        ("2017-07-14 02:40:00 GMT", WHEN),
        ("2017-07-14 02:40:00utc", WHEN),
        ("2017-07-14 02:40:00,250", WHEN),
        ("2017-07-14 02:40:00.250", WHEN),
        ("2017-07-14 02:40:00,250 UTC", WHEN),
        ("2017-07-14T02:40:00.123456789Z", WHEN),
        ("2017-07-14 04:40:00+02:00", WHEN),
        ("2017-07-14 04:40:00 +0200", WHEN),
        ("2017-07-14T04:40:00.5+02", WHEN),
        ("2017-07-14 02:40", WHEN),
        ("2017-07-14T02:40Z", WHEN),
        ("2017-07-14", DAY),
        ("2017/07/14 02:40:00", WHEN),
        ("2017/7/14", DAY),
        ("20170714T024000Z", WHEN),
        ("20170714 02:40:00", WHEN),
        ("Fri, 14 Jul 2017 02:40:00 +0000", WHEN),
        ("Fri, 14 Jul 2017 02:40:00 GMT", WHEN),
        ("14 Jul 2017 02:40:00", WHEN),
        ("Fri Jul 14 02:40:00 2017", WHEN),
        ("Fri Jul 14 02:40:00 +0000 2017", WHEN),
        ("14/Jul/2017:02:40:00 +0000", WHEN),
        ("Jul 14, 2017", DAY),
        ("14 July 2017 02:40:00", None),
        ("20170714", DAY),
        ("201707140240", WHEN),
        ("20170714024000", WHEN),
        ("20170714.0", DAY),
        ("1500000000", WHEN),
        ("1500000000.9", WHEN),
        ("1.5e9", WHEN),
        ("1500000000123", WHEN),
        ("1500000000123456", WHEN),
        ("1500000000123456789", WHEN),
        ("07/14/2017 02:40:00", None),
        ("14.07.2017", None),
        ("2017-07-14 02:40:00 PM", None),
        ("2017-13-14", None),
        ("2017-02-30 00:00:00", None),
        ("2017-07-14 25:00:00", None),
        ("tomorrow", None),
        ("", None),
    ],
)
def test_a_form_is_read_or_is_no_time(tmp_path: Path, text: str, is_: int | None) -> None:
    assert seconds(written(tmp_path, [text, text])) == [is_, is_]


@pytest.mark.parametrize(
    ("form", "text", "is_"),
    [
        ("%d.%m.%Y %H:%M", "14.07.2017 02:40", WHEN),
        ("%m/%d/%Y %I:%M:%S %p", "07/14/2017 02:40:00 AM", WHEN),
        ("%m/%d/%Y %I:%M:%S %p", "07/14/2017 02:40:00 a.m.", WHEN),
        ("%m/%d/%Y %I:%M:%S %p", "07/14/2017 02:40:00 p. m.", WHEN + 12 * 3600),
        ("%d/%m/%Y %I:%M %p", "14/07/2017 02:40 pm", WHEN + 12 * 3600),
        ("%d/%m/%Y", "14/07/2017", DAY),
        ("%m/%d/%Y", "07/14/2017", DAY),
        ("%Y-%m-%d %H:%M:%S %z", "2017-07-14 04:40:00 +0200", WHEN),
        ("excel", "42930.11111111", WHEN),
        ("excel", "42930", DAY),
        ("epoch-ms", "1500000000123", WHEN),
        ("epoch-s", "1500000000", WHEN),
        ("compact", "20170714", DAY),
    ],
)
def test_a_form_that_is_given_is_read_and_no_other(tmp_path: Path, form: str, text: str, is_: int) -> None:
    path = written(tmp_path, [text, text])
    assert seconds(path, time_format=form) == [is_, is_]
    assert report_of(path, time_format=form).events_kept in (1, 2)  # two at one time are one event
    with pytest.raises(LogError, match="has no time in the form --time-format"):
        scan_log(written(tmp_path, ["once", "upon"]), time_format=form)


@pytest.mark.parametrize("form", ["soon", "YYYY-MM-DD", "%Q", "epoch", ""])
def test_a_form_that_is_none_is_refused(tmp_path: Path, form: str) -> None:
    with pytest.raises(LogError, match="--time-format"):
        scan_log(written(tmp_path, ["2017-07-14"]), time_format=form)


@pytest.mark.parametrize(
    "times",
    [
        pl.Series([WHEN, WHEN], dtype=pl.Int64),
        pl.Series([WHEN, WHEN], dtype=pl.UInt32),
        pl.Series([WHEN * 1000, WHEN * 1000]),
        pl.Series([WHEN * 10**6, WHEN * 10**6]),
        pl.Series([WHEN * 10**9, WHEN * 10**9]),
        pl.Series([float(WHEN), WHEN + 0.5]),
        pl.Series(["2017-07-14 02:40:00"] * 2, dtype=pl.Categorical()),
        pl.Series(["2017-07-14 02:40:00"] * 2, dtype=pl.Enum(["2017-07-14 02:40:00"])),
        pl.Series([dt.datetime(2017, 7, 14, 2, 40)] * 2, dtype=pl.Datetime("ns")),
        pl.Series([dt.datetime(2017, 7, 14, 2, 40)] * 2)
        .dt.replace_time_zone("UTC")
        .dt.convert_time_zone("Asia/Tokyo"),
        pl.Series([20170714024000, 20170714024000]),
    ],
    ids=lambda times: str(times.dtype),
)
def test_types_of_times_are_read(tmp_path: Path, times: pl.Series) -> None:
    assert seconds(written(tmp_path, times, "parquet")) == [WHEN, WHEN]


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (
            pl.Series([WHEN, WHEN], dtype=pl.Float32),
            "Float32, which tells seconds of today apart to 128 s only",
        ),
        (pl.Series([dt.time(2, 40)] * 2), "of type Time, which holds no instants"),
        (pl.Series([dt.timedelta(1)] * 2), "which holds no instants"),
        (pl.Series([True, False]), "of type Boolean, which holds no instants"),
        (pl.Series([[1], [2]]), "holds lists"),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_types_that_hold_no_times_are_refused(tmp_path: Path, times: pl.Series, said: str) -> None:
    with pytest.raises(LogError) as refused:
        scan_log(written(tmp_path, times, "parquet"))
    assert said in str(refused.value)
    assert "column 'time'" in str(refused.value)


@pytest.mark.parametrize(
    ("times", "which"),
    [
        (["511", "512", "1111"], "before 1990"),  # MMDD
        (["42930", "42931", "42932"], "before 1990"),  # a spreadsheet's
        (["1", "2", "3"], "before 1990"),
        (["9999999999", "9999999998", "9999999997"], "in the future"),
        (["2109-01-01", "2110-01-01", "2111-01-01"], "in the future"),
        (["1970-01-01", "1970-01-02", "1970-01-03"], "before 1990"),
        (["-5", "-6", "-7"], "before 1990"),
        (["12:30", "2017-07-14", "2017-07-15"], None),
    ],
)
def test_a_span_that_cannot_be_believed_is_refused_unless_told(
    tmp_path: Path, times: list[str], which: str | None
) -> None:
    path = written(tmp_path, times)
    if which is None:
        with pytest.raises(LogError, match="1 of 3 events have no time that can be read"):
            report_of(path)
        assert report_of(path, sure=True).dropped["no readable time"] == 1
        return
    with pytest.raises(LogError) as refused:
        report_of(path)
    words = str(refused.value)
    assert f"100% of them {which}" in words
    assert "--time-format" in words
    assert "--yes" in words
    with pytest.raises(LogError, match="--yes where they are right"):
        check_times(read_log(path), span=True, forms=True)
    assert report_of(path, sure=True).events_kept == 3


def test_a_few_odd_times_are_reported_with_the_span(tmp_path: Path) -> None:
    times = [f"2017-07-14 02:40:{second:02}" for second in range(40)]
    report = report_of(written(tmp_path, [*times, "1969-12-31", "2150-01-01", "soon"]))
    assert report.days == "1969-12-31 to 2150-01-01"
    assert (report.early, report.late) == (1, 1)
    assert report.dropped["no readable time"] == 1


def test_the_forms_are_named_where_too_many_times_are_in_none(tmp_path: Path) -> None:
    path = written(tmp_path, ["14.07.2017", "2017-07-14"] * 20)
    with pytest.raises(LogError) as refused:
        report_of(path)
    assert FORMS in str(refused.value)
    assert "14.07" not in str(refused.value)


def test_order_that_is_lost_is_said(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": ["u"] * 3, "item": ["1", "2", "3"], "time": ["2017-07-14"] * 3})
    frame.write_csv(tmp_path / "log.csv")
    report = report_of(tmp_path / "log.csv")
    assert report.tied_events == 3
    assert any("100% of events share their time" in sentence for sentence in report.sentences())


def test_parts_of_one_log_have_one_unit(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "a.csv").write_text(f"user,item,time\nu,1,{WHEN * 1000}\n")
    (folder / "b.csv").write_text(f"item,user,time\n2,u,{WHEN * 1000 + 1000}\n")
    assert seconds(folder) == [WHEN, WHEN + 1]


def test_a_span_counts_what_it_is_given() -> None:
    span = Span(now=2_000_000_000.0)
    assert span.days == "none"
    span.check()
    span.add(np.array([WHEN, 0, 3_000_000_000]))
    span.add(np.array([], dtype=np.int64))
    assert (span.events, span.early, span.late) == (3, 1, 1)
    assert span.days == "1970-01-01 to 2065-01-24"
    span.check()  # no half of them is odd
