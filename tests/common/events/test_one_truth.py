"""One log, written in every format that is read, gives the same users, events, order and report."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.events.catalog import Catalog
from common.events.cleaning import CleaningPolicy, CleaningReport, clean
from common.events.histories import Histories
from common.events.layout import Layout
from common.events.readers import scan_log
from common.events.schema import LogError

CATALOG = Catalog(tuple(map(str, range(8))), ("",) * 8, ((),) * 8)
FIRST = 1_400_000_000


@dataclass(frozen=True)
class Event:
    """An event as it is in truth: users and items are numbers, times whole seconds."""

    user: int
    item: int
    time: int
    kind: str
    value: float | None


EVENTS = st.lists(
    st.builds(
        Event,
        user=st.integers(0, 5),
        item=st.integers(0, 9),
        time=st.integers(FIRST, FIRST + 50),
        kind=st.sampled_from(["view", "buy"]),
        value=st.sampled_from([None, 1.0, 2.5]),
    ),
    min_size=1,
    max_size=40,
)
Written = Callable[[list[Event], Path], tuple[Path, dict[str, object]]]


def iso(seconds: int, form: str) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime(form)


def texts(events: list[Event], spelt: Callable[[Event], dict[str, object]]) -> pl.DataFrame:
    return pl.DataFrame([spelt(event) for event in events], infer_schema_length=None)


def plain(event: Event) -> dict[str, object]:
    return {
        "user": str(event.user),
        "item": str(event.item),
        "time": str(event.time),
        "kind": event.kind,
        "value": "" if event.value is None else str(event.value),
    }


def spelt_as_floats(event: Event) -> dict[str, object]:
    when = iso(event.time, "%Y-%m-%dT%H:%M:%SZ")
    return plain(event) | {"user": f" {event.user}.0", "item": f"{event.item}.00\u200b", "time": when}


def _csv(events: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
    texts(events, plain).write_csv(folder / "log.csv")
    return folder / "log.csv", {}


def _odd_csv(events: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
    text = texts(events, spelt_as_floats).write_csv(separator=";", quote_style="always")
    (folder / "odd.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder / "odd.csv", {"layout": Layout(separator=";")}


def _utf16(events: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "wide.csv").write_bytes(texts(events, plain).write_csv().encode("utf-16"))
    return folder / "wide.csv", {}


def _tsv(events: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
    frame = texts(events, lambda event: plain(event) | {"time": iso(event.time, "%Y-%m-%d %H:%M:%S UTC")})
    (folder / "log.tsv.gz").write_bytes(gzip.compress(frame.write_csv(separator="\t").encode()))
    return folder / "log.tsv.gz", {}


def _places(events: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
    frame = texts(events, lambda event: plain(event) | {"time": iso(event.time, "%d.%m.%Y %H:%M:%S")})
    frame.write_csv(folder / "bare.csv", include_header=False)
    columns = {"user": "1", "item": "2", "time": "3", "kind": "4", "value": "5"}
    return folder / "bare.csv", {"columns": columns, "time_format": "%d.%m.%Y %H:%M:%S"}


def _json_lines(events: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
    rows = [
        {"user": event.user, "item": str(event.item), "time": event.time * 1000, "kind": event.kind,
         "value": event.value, "context": {"n": number}}
        for number, event in enumerate(events)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "log.jsonl", {}


def _parquet(events: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
    frame = texts(events, plain).with_columns(
        pl.col("user").cast(pl.Float64),
        pl.col("item").cast(pl.Int16),
        pl.from_epoch(pl.col("time").cast(pl.Int64)).dt.replace_time_zone("UTC"),
        pl.col("value").cast(pl.Float64, strict=False),
        pl.col("kind").cast(pl.Categorical()),
    )
    frame.write_parquet(folder / "log.parquet")
    return folder / "log.parquet", {}


def _parts(events: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
    middle = len(events) // 2
    for name, some in (("a=1", events[:middle]), ("a=2", events[middle:])):
        if some:
            (folder / "parts" / name).mkdir(parents=True)
            frame = texts(some, lambda event: plain(event) | {"time": str(event.time * 10**6)})
            columns = frame.columns if name == "a=1" else frame.columns[::-1]
            frame.select(columns).write_csv(folder / "parts" / name / "part.csv")
    return folder / "parts", {}


WAYS: tuple[Written, ...] = (_csv, _odd_csv, _utf16, _tsv, _places, _json_lines, _parquet, _parts)


def read(
    events: list[Event], way: Written, policy: CleaningPolicy
) -> tuple[Histories, CleaningReport] | LogError:
    with tempfile.TemporaryDirectory() as folder:
        path, options = way(events, Path(folder))
        try:
            return clean(scan_log(path, **options), CATALOG, policy, bytes(32))  # type: ignore[arg-type]
        except LogError as error:  # nothing is left
            return error


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EVENTS, st.sampled_from([1, 2]), st.sampled_from(["same-event", "same-item", "keep"]))
def test_every_way_of_writing_a_log_gives_the_same(
    events: list[Event], minimum: int, duplicates: str
) -> None:
    policy = CleaningPolicy(minimum_events=minimum, duplicates=duplicates)  # type: ignore[arg-type]
    first = read(events, WAYS[0], policy)
    for way in WAYS[1:]:
        other = read(events, way, policy)
        if isinstance(first, LogError) or isinstance(other, LogError):
            assert "nothing is left" in str(first)
            assert str(other) == str(first), way
            continue
        (histories, report), (same, counted) = first, other
        assert counted == report, way
        for name in ("users", "offsets", "items", "times", "kinds"):
            assert np.array_equal(getattr(histories, name), getattr(same, name)), (way, name)
        assert np.array_equal(histories.values, same.values, equal_nan=True), way
        assert histories.kind_names == same.kind_names, way


def test_the_comparison_can_fail() -> None:
    events = [Event(1, 1, FIRST, "view", None), Event(1, 2, FIRST + 1, "view", None)]

    def split(rows: list[Event], folder: Path) -> tuple[Path, dict[str, object]]:
        odd = [plain(rows[0]), plain(rows[1]) | {"user": "1-"}]  # another id, by a mark
        pl.DataFrame(odd).write_csv(folder / "log.csv")
        return folder / "log.csv", {}

    policy = CleaningPolicy(minimum_events=1)
    first, other = read(events, _csv, policy), read(events, split, policy)
    assert not isinstance(first, LogError)
    assert not isinstance(other, LogError)
    assert (len(first[0]), len(other[0])) == (1, 2)
