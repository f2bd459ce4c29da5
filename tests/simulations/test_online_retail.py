"""Online Retail: what counts as a purchase and a product, and that one customer decides nothing for another."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.assets import AssetError
from common.events.schema import EVENT_SCHEMA, LogError
from simulations.online_retail import load_online_retail

Line = tuple[str | None, int, datetime, float, float | None]


def day(number: int) -> datetime:
    return datetime(2011, 1, number, 9, 30)


LINES: list[Line] = [
    ("WHITE  MUG ", 2, day(1), 2.5, 17850.0),
    ("white mug", 1, day(3), 2.5, 17850.0),  # bought again: the first purchase counts
    ("BLUE LAMP", 1, day(2), 9.0, 17850.0),
    ("BLUE LAMP", -1, day(4), 9.0, 17851.0),  # a return
    ("POSTAGE", 1, day(1), 18.0, 17851.0),
    ("Manual", 1, day(1), 18.0, 17851.0),
    ("BLACK BAROQUE CARRIAGE CLOCK", 1, day(5), 7.0, 17851.0),  # a product, though carriage is none
    ("RED CHAIR", 1, day(1), 4.0, None),  # anonymous: nobody's event, but the shop sells it
    ("damaged", 1, day(1), 0.0, None),
    (None, 1, day(1), 1.0, 17851.0),
]


def parquet(folder: Path, lines: list[Line]) -> Path:
    names = ("Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID")
    columns: dict[str, list[Any]] = {
        name: [line[place] for line in lines] for place, name in enumerate(names)
    }
    file = folder / "online_retail.parquet"
    pl.DataFrame(columns).with_columns(pl.col("InvoiceDate").cast(pl.Datetime("ns"))).write_parquet(file)
    return file


def test_first_purchases_of_products_by_known_customers(tmp_path: Path) -> None:
    dataset = load_online_retail(parquet(tmp_path, LINES))
    log = dataset.log.collect()
    assert dict(log.schema) == dict(EVENT_SCHEMA)
    assert log.select("user", "item").rows() == [
        ("17850", "WHITE MUG"),
        ("17850", "BLUE LAMP"),
        ("17851", "BLACK BAROQUE CARRIAGE CLOCK"),
    ]
    assert log["time"][0] == 1_293_874_200


def test_the_catalog_is_the_shops_whole_list_of_products(tmp_path: Path) -> None:
    dataset = load_online_retail(parquet(tmp_path, LINES).parent)  # a folder is as good as the file
    assert dataset.catalog.ids == ("BLACK BAROQUE CARRIAGE CLOCK", "BLUE LAMP", "RED CHAIR", "WHITE MUG")
    assert any("no item is dropped" in note for note in dataset.notes)


def test_one_customers_lines_change_no_others(tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    everyone = load_online_retail(parquet(tmp_path, LINES)).log.collect()
    others = [line for line in LINES if line[4] != 17850.0]
    alone = load_online_retail(parquet(tmp_path / "without", others)).log.collect()
    assert everyone.filter(pl.col("user") != "17850").rows() == alone.rows()


def test_a_file_that_is_not_it_is_an_error_in_words(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(LogError, match="lacks columns"):
        load_online_retail(tmp_path / "x.parquet")
    with pytest.raises(LogError, match="no Parquet file"):
        load_online_retail(tmp_path / "missing.parquet")


def test_without_a_path_or_a_cache_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTIDE_HOME", str(tmp_path))
    with pytest.raises(AssetError, match="--source FOLDER"):
        load_online_retail()
