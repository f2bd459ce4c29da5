"""Histories: every method against a plain loop over one user at a time, and files that are private."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.events import histories
from common.events.histories import Histories, HistoriesError
from common.events.histories_files import HistoriesWriter


def _histories(lengths: list[int]) -> Histories:
    events = sum(lengths)
    return Histories(
        users=np.array([f"user-{row}" for row in range(len(lengths))], dtype=np.str_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.arange(events, dtype=np.int32),
        times=np.arange(events, dtype=np.int64) * 10 + 5,
        kinds=np.zeros(events, dtype=np.int16),
        values=np.full(events, np.nan, dtype=np.float32),
        kind_names=("view",),
    )


lengths_of_users = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(lengths_of_users, st.integers(1, 12))
def test_bounded_and_padded_keep_the_most_recent_events(lengths: list[int], most: int) -> None:
    whole = _histories(lengths)
    bounded = whole.bounded(most)
    items, times = whole.padded(np.arange(len(whole)), most)
    assert items.shape == times.shape == (len(lengths), most)
    assert items.dtype == times.dtype == np.int64
    for row in range(len(whole)):
        expected = whole.history(row).tolist()[-most:]
        assert bounded.history(row).tolist() == expected
        padding = most - len(expected)
        assert items[row].tolist() == expected + [-1] * padding
        assert times[row].tolist() == [item * 10 + 5 for item in expected] + [0] * padding
    again, _ = bounded.padded(np.arange(len(whole)), most)
    assert (again == items).all()


@given(lengths_of_users, st.integers(1, 4))
def test_without_last_and_what_it_holds_out_make_the_whole(lengths: list[int], n: int) -> None:
    whole = _histories(lengths)
    rest, held_out = whole.without_last(n)
    assert held_out.shape == (len(lengths), n)
    for row, length in enumerate(lengths):
        if length > n:
            assert [*rest.history(row), *held_out[row]] == whole.history(row).tolist()
        else:
            assert rest.history(row).tolist() == whole.history(row).tolist()
            assert (held_out[row] == -1).all()


@given(lengths_of_users, st.data())
def test_select_takes_rows_in_the_order_asked(lengths: list[int], data: st.DataObject) -> None:
    whole = _histories(lengths)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    chosen = whole.select(rows)
    assert chosen.users.tolist() == [f"user-{row}" for row in rows]
    for place, row in enumerate(rows):
        assert chosen.history(place).tolist() == whole.history(row).tolist()
    items, _ = whole.padded(rows, 3)
    assert (items == chosen.padded(np.arange(len(rows)), 3)[0]).all()


def test_a_user_with_thousands_of_events_is_one_row_of_bounded_width() -> None:
    whole = _histories([3, 50_000, 2])
    items, _ = whole.padded([0, 1, 2], 20)
    assert items.shape == (3, 20)
    assert items[1].tolist() == list(range(49_983, 50_003))
    assert whole.bounded(20).lengths.tolist() == [3, 20, 2]


def test_a_user_must_be_exactly_one_row() -> None:
    whole = _histories([1, 2])
    with pytest.raises(HistoriesError, match="more than one row"):
        whole.select([0, 0])


def test_rows_and_bounds_out_of_range_are_refused() -> None:
    whole = _histories([1, 2])
    for call in (lambda: whole.history(2), lambda: whole.select([-1]), lambda: whole.padded([2], 3)):
        with pytest.raises(IndexError):
            call()
    for wrong in (lambda: whole.bounded(0), lambda: whole.padded([0], 0), lambda: whole.without_last(0)):
        with pytest.raises(HistoriesError, match="at least 1"):
            wrong()


@pytest.mark.parametrize("field", ["offsets", "items", "times", "kinds", "values"])
def test_arrays_that_do_not_fit_together_are_refused(field: str) -> None:
    whole = _histories([1, 2])
    arrays = {name: getattr(whole, name) for name in Histories.__dataclass_fields__}
    with pytest.raises(HistoriesError):
        Histories(**{**arrays, field: arrays[field][:-1]})
    with pytest.raises(HistoriesError):
        Histories(**{**arrays, field: arrays[field].astype(np.float64)})


@pytest.mark.parametrize("mapped_from", [0, 1 << 18])
def test_what_is_saved_is_private_and_comes_back_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped_from: int
) -> None:
    monkeypatch.setattr(histories, "MAPPED_FROM", mapped_from)
    whole = _histories([2, 0, 5])
    whole.save(tmp_path / "h")
    assert [path.name for path in tmp_path.iterdir()] == ["h"]
    assert (tmp_path / "h").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "h").iterdir()} == {0o600}
    loaded = Histories.load(tmp_path / "h")
    assert isinstance(loaded.items, np.memmap) == (mapped_from == 0)
    assert not loaded.items.flags.writeable
    for name in Histories.__dataclass_fields__:
        assert np.array_equal(getattr(loaded, name), getattr(whole, name), equal_nan=name == "values")
    assert loaded.bounded(1).history(2).tolist() == [6]


def test_histories_without_events_can_be_saved(tmp_path: Path) -> None:
    whole = _histories([0, 0])
    whole.save(tmp_path / "h")
    assert len(Histories.load(tmp_path / "h")) == 2


def test_saving_never_overwrites_and_damage_is_refused(tmp_path: Path) -> None:
    whole = _histories([2, 1])
    whole.save(tmp_path / "h")
    with pytest.raises(HistoriesError, match="not empty"):
        whole.save(tmp_path / "h")
    with pytest.raises(HistoriesError, match="holds no histories"):
        Histories.load(tmp_path / "absent")
    content = (tmp_path / "h" / "items.npy").read_bytes()
    (tmp_path / "h" / "items.npy").write_bytes(content[:-2])
    with pytest.raises(HistoriesError, match="damaged"):
        Histories.load(tmp_path / "h")
    (tmp_path / "h" / "items.npy").unlink()
    with pytest.raises(HistoriesError, match="holds no histories"):
        Histories.load(tmp_path / "h")


def test_files_written_in_parts_are_those_that_numpy_writes_at_once(tmp_path: Path) -> None:
    whole = _histories([2, 0, 5, 1])
    whole.save(tmp_path / "h")
    first = whole.lengths[: len(whole) // 2].sum()
    with HistoriesWriter(tmp_path / "parts") as writer:
        for rows, events in (
            (slice(None, len(whole) // 2), slice(None, first)),
            (slice(len(whole) // 2, None), slice(first, None)),
        ):
            arrays = {name: getattr(whole, name)[events] for name in ("items", "times", "kinds", "values")}
            writer.add(whole.users[rows], whole.lengths[rows], **arrays)
        writer.finish(whole.kind_names)
    for name in ("users", "offsets", "items", "times", "kinds", "values"):
        expected = io.BytesIO()
        np.save(expected, getattr(whole, name))
        for folder in ("h", "parts"):
            assert (tmp_path / folder / f"{name}.npy").read_bytes() == expected.getvalue()
    assert (tmp_path / "parts" / "histories.json").read_bytes() == (
        tmp_path / "h" / "histories.json"
    ).read_bytes()
