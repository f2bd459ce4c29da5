"""The catalog: its formats, its refusals, and a digest that stands for its content."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from common.events.catalog import Catalog, CatalogError, read_catalog
from common.events.schema import LogError

TOY = Catalog(ids=("1", "2"), texts=("Toy Story (1995)", ""), categories=(("Animation", "Comedy"), ()))


def test_rows_are_found_by_id() -> None:
    assert (TOY.row("2"), len(TOY), dict(TOY.index)) == (1, 2, {"1": 0, "2": 1})
    with pytest.raises(CatalogError, match="'3' is not in the catalog"):
        TOY.row("3")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", 'item,title,genres\n1,"Toy Story (1995)",Animation|Comedy\n2,,(no genres listed)\n'),
        ("c.tsv", "id\ttext\tcategory\n1\tToy Story (1995)\tAnimation | Comedy\n2\t\t\n"),
        (
            "c.jsonl",
            '{"item": 1, "text": "Toy Story (1995)", "categories": ["Animation", "Comedy"]}\n'
            '{"item": 2, "text": null, "categories": []}\n',
        ),
        ("movies.csv", "movieId,title,genres\n1,Toy Story (1995),Animation|Comedy\n2,,(no genres listed)\n"),
        ("movies.dat", "1::Toy Story (1995)::Animation|Comedy\n2::::\n"),
        (
            "c.item",
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "1\tToy Story\t1995\tAnimation Comedy\n2\t\tunknown\t\n",
        ),
    ],
)
def test_each_format_gives_the_same_catalog(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_catalog(tmp_path / name) == TOY


def test_parquet_with_lists_and_mapped_columns(tmp_path: Path) -> None:
    pl.DataFrame(
        {"sku": [1, 2], "label": [TOY.texts[0], None], "tags": [["Animation", "Comedy"], None]}
    ).write_parquet(tmp_path / "c.parquet")
    columns = {"item": "sku", "text": "label", "categories": "tags"}
    assert read_catalog(tmp_path / "c.parquet", columns=columns) == TOY


def test_the_items_of_movielens_100k_are_latin_1_with_genre_flags(tmp_path: Path) -> None:
    flags = ["0"] * 19
    flags[5] = flags[15] = "1"
    line = f"543|Mis\u00e9rables, Les (1995)|01-Jan-1995||http://x|{'|'.join(flags)}\n"
    (tmp_path / "u.item").write_bytes(line.encode("latin-1"))
    assert read_catalog(tmp_path / "u.item") == Catalog(
        ("543",), ("Mis\u00e9rables, Les (1995)",), (("Comedy", "Sci-Fi"),)
    )
    (tmp_path / "u.item").write_bytes(b"1|Toy Story\n")
    with pytest.raises(CatalogError, match="line 1 has 2 fields"):
        read_catalog(tmp_path / "u.item")


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("1,a\n1,b\n", "lists item '1' twice"),
        ("1,a\n,b\n", "item without an id"),
        ("", "catalog is empty"),
    ],
)
def test_what_is_no_catalog_is_refused(tmp_path: Path, rows: str, problem: str) -> None:
    (tmp_path / "c.csv").write_text("item,text\n" + rows)
    with pytest.raises(CatalogError, match=problem):
        read_catalog(tmp_path / "c.csv")


def test_a_missing_text_column_is_refused_with_the_names_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("item,words\n1,a\n")
    with pytest.raises(LogError, match=r"no column for text; it has: item, words\. Map one with text="):
        read_catalog(tmp_path / "c.csv")


def test_what_is_saved_is_loaded_and_has_the_same_digest(tmp_path: Path) -> None:
    odd = Catalog(("\u2028", 'a"b'), ("line\nbreak", "\ud7ff \U0001f30a"), ((), ("x|y",)))
    odd.save(tmp_path / "c.jsonl")
    assert Catalog.load(tmp_path / "c.jsonl") == odd
    assert Catalog.load(tmp_path / "c.jsonl").digest() == odd.digest()
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_the_digest_changes_with_content_and_order() -> None:
    others = [
        Catalog(TOY.ids[::-1], TOY.texts[::-1], TOY.categories[::-1]),
        Catalog(TOY.ids, ("Toy Story", ""), TOY.categories),
        Catalog(TOY.ids, TOY.texts, (("Animation",), ())),
        Catalog(("1", "3"), TOY.texts, TOY.categories),
    ]
    assert len({TOY.digest(), *(other.digest() for other in others)}) == 5


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="does not exist"):
        Catalog.load(tmp_path / "c.jsonl")
    TOY.save(tmp_path / "c.jsonl")
    content = (tmp_path / "c.jsonl").read_bytes()
    (tmp_path / "c.jsonl").write_bytes(content[:-9])
    with pytest.raises(CatalogError, match="damaged"):
        Catalog.load(tmp_path / "c.jsonl")
