"""Online Retail: invoice lines of a UK gift shop, read in place or from the cache, as a simulation's data set.

The copy that this reads lacks invoice and stock numbers, so (customer, time) is the invoice and the description
is the item. What is public: the shop's list of products, which is the shop's and not a customer's. It is taken
from all lines, anonymous ones included, and no item is dropped for being rare among customers: the usual
"5-core" filter is a function of all customers' data, would itself be a release, and is not made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from common.assets import Asset, AssetFile, Say, fetch
from common.events.catalog import make_catalog
from common.events.schema import EVENT_SCHEMA, LogError
from common.events.times import TimeForm
from simulations.datasets import Dataset

ONLINE_RETAIL = Asset(
    name="online-retail",
    licence=(
        "Daqing Chen, Online Retail, UCI Machine Learning Repository, 2015, DOI 10.24432/C5BW33; given by several "
        "public uses as CC BY 4.0"
    ),
    files=(
        AssetFile(
            "online_retail.parquet",
            "d4bf11013582a8f3a068b6762a7e12d9899d456d615d5340ce998a61bc46c12a",
            2_261_355,
            "online_retail.parquet",
        ),
    ),
    package="",
    version="",
    notes=(
        "no registry carries it: give the folder of a Parquet copy with Description, Quantity, InvoiceDate, "
        "UnitPrice, CustomerID as --source (to keep it in the cache) or as `fedtide simulate --data-path`"
    ),
)

NOT_PRODUCTS = frozenset(
    [
        "POSTAGE",
        "DOTCOM POSTAGE",
        "MANUAL",
        "CARRIAGE",
        "NEXT DAY CARRIAGE",
        "DISCOUNT",
        "SAMPLES",
        "BANK CHARGES",
        "AMAZON FEE",
        "ADJUST BAD DEBT",
        "CRUK COMMISSION",
        "HIGH RESOLUTION IMAGE",
        "DOTCOMGIFTSHOP GIFT VOUCHER",
    ]
)
_COLUMNS = {"Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID"}


def load_online_retail(
    path: Path | None = None, *, offline: bool = False, say: Say = lambda _: None
) -> Dataset:
    """First purchases of each customer of the shop, with the shop's products as the public catalog.

    Args:
        path: the Parquet file, or its folder, read in place; None for the cache.

    Raises:
        AssetError: no path is given, and the cache does not hold it.
        LogError: the file cannot be read, or lacks a column.
    """
    if path is None:
        path = fetch(ONLINE_RETAIL, offline=offline, say=say)
    path = Path(path).expanduser()
    file = path / ONLINE_RETAIL.files[0].name if path.is_dir() else path
    try:
        names = set(pl.read_parquet_schema(file))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise LogError(
            f"{file} is no Parquet file that can be read: give Online Retail's file or folder"
        ) from error
    if not names >= _COLUMNS:
        raise LogError(f"{file.name} lacks columns {', '.join(sorted(_COLUMNS - names))} of Online Retail")
    lines = (
        pl.scan_parquet(file)
        .with_columns(
            item=pl.col("Description").str.to_uppercase().str.replace_all(r"\s+", " ").str.strip_chars(" ")
        )
        .filter(
            pl.col("item").is_not_null()
            & (pl.col("Quantity") > 0)
            & (pl.col("UnitPrice") > 0)
            & ~pl.col("item").is_in(sorted(NOT_PRODUCTS))
        )
    )
    products: Sequence[str] = lines.select("item").unique().sort("item").collect()["item"].to_list()
    catalog = make_catalog((item, item.capitalize(), ()) for item in products)
    purchases = (
        lines.filter(pl.col("CustomerID").is_not_null())
        .select(
            user=pl.col("CustomerID").cast(pl.Int64).cast(pl.String),
            item="item",
            time=TimeForm().expression("InvoiceDate", pl.Datetime("ns")),
            kind=pl.lit("purchase"),
            value=pl.lit(None, dtype=pl.Float32),
        )
        .group_by("user", "item", "kind", "value")
        .agg(pl.col("time").min())  # a customer's first purchase of a product: of that customer's rows alone
        .select(*EVENT_SCHEMA)
        .sort("user", "time", "item")
    )
    return Dataset(
        public=True,
        name=ONLINE_RETAIL.name,
        log=purchases,
        catalog=catalog,
        users=purchases.select("user").unique().sort("user").collect(),
        licence=ONLINE_RETAIL.licence,
        notes=(
            "The shop's own list of products is public here; no item is dropped for how few customers bought it.",
            "Most consecutive events lie in one invoice, whose inner order is arbitrary: leave-one-out is largely "
            "basket completion.",
        ),
    )
