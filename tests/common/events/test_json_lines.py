"""JSON as people have it: columns that nobody asked for refuse nothing, and what is asked for is one text a row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from common.events.catalog import Catalog, read_catalog
from common.events.cleaning import CleaningPolicy, clean
from common.events.readers import read_log, scan_log
from common.events.schema import LogError
from tests.common.events.reading import Row, events, refusal, write

WANTED: list[Row] = [(f"u{n % 3}", f"i{n}", n) for n in range(1100)]


def _objects(**more: Any) -> list[dict[str, Any]]:
    return [{"user": user, "item": item, "time": time, **more} for user, item, time in WANTED]


def _lines(objects: list[Any]) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


@pytest.mark.parametrize(
    "late",
    [
        {"tags": "text"},
        {"tags": {"a": 1}},
        {"tags": None},
        {"tags": [["a"], {"b": 2}]},
        {"tags": 1.5},
        {"never met": [1]},
        {"never met": {"user": {"item": [1]}}},
        {"never met": "NaN"},
        {"value": [1]},
        {"kind": {"a": 1}},
        {"rating": float("nan")},
        {"rating": float("inf")},
        {"tags": "\ud83d\ude00 \u2028"},
        {"tags": 123456789012345678901234567890},
        {"tags": 'a \\ " b'},
    ],
)
def test_a_column_that_nobody_asked_for_refuses_nothing(tmp_path: Path, late: dict[str, Any]) -> None:
    objects = _objects(tags=["a"])
    objects[-1] |= late
    objects[2] |= late
    assert events(write(tmp_path / "log.jsonl", _lines(objects))) == sorted(WANTED, key=repr)
    objects = _objects(tags=["a"])
    objects[-1] |= late
    assert events(write(tmp_path / "log.jsonl", _lines(objects))) == sorted(WANTED, key=repr)


def test_values_that_are_no_numbers_are_missing(tmp_path: Path) -> None:
    text = '{"user":"u","item":1,"time":1,"rating":NaN}\n{"user":"u","item":2,"time":2,"rating":3}\n'
    text += '{"user":"u","item":3,"time":3,"rating":-Infinity}\n{"user":"u","item":NaN,"time":4}\n'
    frame = read_log(write(tmp_path / "log.jsonl", text)).collect()
    assert frame["value"].to_list() == [None, 3.0, None, None]
    assert frame["item"].to_list() == ["1", "2", "3", None]


@pytest.mark.parametrize(
    ("value", "what"),
    [({"id": 1}, "object"), ([1, 2], "list"), ({}, "object"), ([], "list"), ([{"id": 1}], "list")],
)
@pytest.mark.parametrize("column", ["user", "item", "time"])
@pytest.mark.parametrize("row", [0, 1050])
def test_objects_and_lists_in_a_column_that_is_asked_for_are_refused_by_its_name(
    tmp_path: Path, value: object, what: str, column: str, row: int
) -> None:
    objects = _objects()
    objects[row][column] = value
    message = refusal(write(tmp_path / "log.jsonl", _lines(objects)))
    assert repr(column) in message
    assert what in message


def test_an_object_of_the_same_name_within_another_is_none(tmp_path: Path) -> None:
    objects = _objects()
    objects[3]["meta"] = {"user": {"x": 1}, "item": [1]}
    assert events(write(tmp_path / "log.jsonl", _lines(objects))) == sorted(WANTED, key=repr)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["log.json", "log.jsonl", "log.json.gz"])
def test_an_array_of_objects_is_read(tmp_path: Path, indent: int | None, name: str) -> None:
    text = json.dumps(_objects(tags=["[", "]", "{"]), indent=indent).encode()
    path = write(tmp_path / name, gzip.compress(text) if name.endswith("gz") else text)
    assert events(path) == sorted(WANTED, key=repr)


def test_objects_over_several_lines_and_beside_each_other_are_read(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(each, indent=1) for each in _objects()[:5])
    assert len(events(write(tmp_path / "log.json", text))) == 5
    text = "".join(json.dumps(each) for each in _objects()[:5])
    assert len(events(write(tmp_path / "log.json", text))) == 5


def test_lines_of_pythons_own_spelling_are_read(tmp_path: Path) -> None:
    lines = "".join(f"{each!r}\n" for each in _objects(name='it\'s "this"', rating=None, seen=True))
    assert events(write(tmp_path / "log.json", lines)) == sorted(WANTED, key=repr)
    hostile = write(tmp_path / "bad.json", "{'user': __import__('os').getpid(), 'item': 1, 'time': 1}\n")
    assert "no JSON object" in refusal(hostile)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"user":"u","item":1,"time":1}\n{"user":"secret","it\n', "line 2 is no JSON object"),
        ('[{"user":"u","item":1,"time":1},{"user":"secret"', "object 2 is no JSON object"),
        ("[1, 2]", "holds a text or number"),
        ('[["secret", 1, 1]]', "holds a list"),
        ('{"users": {"secret": [1]}}', "objects within an object"),
        ('{"log": [{"user":"secret","item":1,"time":1}]}', "objects within an object"),
        ("user,item,time\nsecret,1,1\n", "does not begin as JSON does: name its format with --format"),
        ("<events/>", "does not begin as JSON does"),
        ('{"who":"secret","item":1,"time":1}\n', "no column for user; it has: who, item, time"),
        ("[]", "no column for user"),
    ],
)
def test_what_is_no_log_in_json_is_refused_without_quoting_it(tmp_path: Path, text: str, said: str) -> None:
    message = refusal(write(tmp_path / "log.json", text))
    assert said in message
    assert "secret" not in message


def test_a_mapped_column_may_come_late(tmp_path: Path) -> None:
    objects = _objects()
    objects[1090]["action"] = "buy"
    path = write(tmp_path / "log.jsonl", _lines(objects))
    kinds = read_log(path, columns={"kind": "action"}).collect()["kind"].to_list()
    assert (kinds.count("buy"), kinds.count("view")) == (1, 1099)
    assert "no column 'absent'" in refusal(path, "kind=absent")


def test_json_with_blank_lines_and_ends_of_other_systems(tmp_path: Path) -> None:
    text = "\n" + _lines(_objects()).replace("\n", "\r\n") + "\n\n"
    assert events(write(tmp_path / "log.jsonl", text)) == sorted(WANTED, key=repr)


def test_catalogs_in_json_of_any_shape(tmp_path: Path) -> None:
    rows = [
        {"item": "1", "title": "A", "category": ["x", "y"], "description": ["one", "two"]},
        {"item": "2", "title": "B", "category": [["x", "z"]], "description": "three"},
        {"item": "3", "title": "C", "category": "x|w", "price": {"a": 1}},
        {"item": "4", "title": None, "category": None},
    ]
    for text in (_lines(rows), json.dumps(rows, indent=2), "".join(f"{row!r}\n" for row in rows)):
        path = write(tmp_path / "items.json", text)
        catalog = read_catalog(path)
        assert catalog.texts == ("A", "B", "C", "")
        assert catalog.categories[:2] == (("x", "y"), ("x", "z"))
        described = read_catalog(path, columns={"text": "description"})
        assert described.texts == ("one two", "three", "", "")
    with pytest.raises(LogError, match="column 'price'"):
        read_catalog(path, columns={"text": "price"})


def test_a_damaged_line_far_down_is_named_without_quoting_it(tmp_path: Path) -> None:
    text = _lines(_objects()) + '{"user":"secret","item"\n' + _lines(_objects())
    path = write(tmp_path / "log.jsonl", text)
    with pytest.raises(LogError, match="line 1101 is no JSON object") as caught:
        clean(scan_log(path), Catalog(("i1",), ("",), ((),)), CleaningPolicy(), bytes(32))
    assert "secret" not in str(caught.value)


def test_half_a_letter_is_lost_and_merges_nobody(tmp_path: Path) -> None:
    text = '{"user":"\\ud800","item":1,"time":1}\n{"user":"\\udbff","item":1,"time":2}\n'
    text += '{"user":"\\ud83d\\ude00","item":1,"time":3}\n'
    users = [user for user, _, _ in events(write(tmp_path / "log.jsonl", text))]
    assert sorted(map(str, users)) == ["None", "None", "\U0001f600"]
