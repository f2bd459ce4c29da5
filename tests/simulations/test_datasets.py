"""Data sets: MovieLens-100K whole and as documented, one's own data, and the command that fetches."""

from __future__ import annotations

import bz2
import gc
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from client.cli import app as site_app
from common.assets import home
from common.events.catalog import CatalogFile
from common.events.cleaning import CleaningPolicy, clean
from common.events.layout import Layout
from common.events.schema import LogError
from server.cli import app as server_app
from simulations.cli import simulate_app
from simulations.data_cli import app
from simulations.datasets import MOVIELENS_100K, Dataset, load_movielens_100k, load_own

runner = CliRunner()


@pytest.fixture(scope="module")
def movielens() -> Dataset:
    return load_movielens_100k()


def test_movielens_100k_is_whole(movielens: Dataset) -> None:
    log = movielens.log.collect()
    assert (len(log), log["user"].n_unique(), log["item"].n_unique()) == (100_000, 943, 1_682)
    assert set(log["item"]) == set(movielens.catalog.ids)
    assert set(log["user"]) == set(movielens.users["user"])
    assert log.null_count().sum_horizontal().item() == 0
    assert (log["time"].min(), log["time"].max()) == (874_724_710, 893_286_638)
    assert log["value"].unique().sort().to_list() == [1, 2, 3, 4, 5]
    assert {"user", "zip_code", "age", "gender", "occupation"} == set(movielens.users.columns)


def test_movielens_100k_texts_are_titles_with_years_and_categories_genres(movielens: Dataset) -> None:
    catalog = movielens.catalog
    assert catalog.texts[catalog.row("1")] == "Toy Story (1995)"
    assert catalog.categories[catalog.row("1")] == ("Animation", "Children's", "Comedy")
    assert all(catalog.texts)
    assert len({name for names in catalog.categories for name in names}) == 19
    assert "research" in movielens.licence


def test_movielens_100k_cleans_to_943_histories_of_which_three_quarters_are_tied(movielens: Dataset) -> None:
    histories, report = clean(movielens.log, movielens.catalog, CleaningPolicy(), bytes(32))
    assert (len(histories), histories.events, report.tied_events) == (943, 100_000, 75_772)
    assert set(report.dropped.values()) == {0}


def _own(folder: Path) -> Path:
    log = folder / "shop.csv"
    log.write_text("who,sku,at,label\na,1,1,Tea\na,2,2,Cup\nb,1,3,Tea pot\nb,9,4,\n,1,5,Tea\n")
    return log


COLUMNS = {"user": "who", "item": "sku", "time": "at"}


def test_own_data_without_a_catalog_declares_the_item_list_public_and_says_so(tmp_path: Path) -> None:
    own = load_own(_own(tmp_path), columns=COLUMNS, sure=True)
    assert (own.catalog.ids, own.catalog.texts) == (("1", "2", "9"), ("1", "2", "9"))
    assert own.users["user"].to_list() == ["a", "b"]
    assert own.name == "shop"
    assert any("declares the log's own item list public" in note for note in own.notes)
    named = load_own(_own(tmp_path), columns={**COLUMNS, "text": "label"}, sure=True)
    assert named.catalog.texts == ("Tea pot", "Cup", "9")


@pytest.mark.parametrize("item", ["sku", "item", "code"])
def test_own_data_with_a_catalog_of_its_own_columns(tmp_path: Path, item: str) -> None:
    (tmp_path / "items.csv").write_text(f"{item},title,genres\n1,Tea,Drink|Hot\n2,Cup,\n")
    columns = {**COLUMNS, "catalog_item": item} if item == "code" else COLUMNS
    own = load_own(_own(tmp_path), tmp_path / "items.csv", columns=columns, sure=True)
    assert own.catalog.ids == ("1", "2")
    assert own.catalog.categories == (("Drink", "Hot"), ())
    assert own.notes == ()


def test_own_data_in_the_layout_of_grouplens(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t7\t5\t881250949\n")
    (tmp_path / "u.item").write_bytes(
        ("7|Twelve Monkeys (1995)|x||y|" + "|".join("0" * 19)).encode("latin-1")
    )
    own = load_own(tmp_path / "u.data", tmp_path / "u.item")
    assert own.catalog.texts == ("Twelve Monkeys (1995)",)
    assert own.log.collect().rows() == [("1", "7", 881250949, "rating", 5.0)]


def test_own_data_refuses_what_it_cannot_map(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no field 'person'"):
        load_own(_own(tmp_path), columns={"person": "who"})
    with pytest.raises(LogError, match="no column for user; it has: who, sku, at, label"):
        load_own(_own(tmp_path))
    with pytest.raises(LogError, match=r"items\.csv does not exist"):
        load_own(_own(tmp_path), tmp_path / "items.csv", columns=COLUMNS)


def test_the_command_prints_path_files_and_licence(movielens: Dataset) -> None:
    done = runner.invoke(app, ["fetch", "movielens-100k", "--json"])
    assert done.exit_code == 0
    (facts,) = json.loads(done.stdout)
    assert facts["path"] == str(home() / "assets" / "movielens-100k")
    assert {file["sha256"] for file in facts["files"]} == {file.sha256 for file in MOVIELENS_100K.files}
    shown = runner.invoke(app, ["fetch", "movielens-100k"])
    assert "GroupLens research licence" in shown.stdout
    assert "ml-100k.inter" in shown.stdout


def test_the_command_takes_a_local_folder_offline(
    movielens: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = home() / "assets" / "movielens-100k"
    monkeypatch.setenv("FEDTIDE_HOME", str(tmp_path))
    refused = runner.invoke(app, ["fetch", "movielens-100k", "--offline"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: cannot get movielens-100k")
    assert refused.stderr.count("\n") == 1
    listed = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert [asset["path"] for asset in listed] == [None, None, None]
    done = runner.invoke(app, ["fetch", "movielens-100k", "--offline", "--source", str(there)])
    assert done.exit_code == 0
    assert load_movielens_100k(offline=True).catalog == movielens.catalog


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fetch", "netflix"], "no asset 'netflix'"),
        (["fetch", "default", "--source", "."], "name it instead"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], says: str) -> None:
    refused = runner.invoke(app, arguments)
    assert refused.exit_code == 1
    assert says in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_command_imports_nothing_heavy_until_it_runs() -> None:
    heavy = ("polars", "torch", "numpy")
    code = f"import sys, simulations.data_cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_log_of_parquet_parts_is_own_data_too(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(2):
        pl.DataFrame({"user": [f"u{part}"], "item": ["i"], "time": [part]}).write_parquet(
            folder / f"{part}.parquet"
        )
    assert load_own(folder, sure=True).users["user"].to_list() == ["u0", "u1"]


def test_own_data_without_names_is_read_by_places_with_options_of_its_own_for_each_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "log.any").write_text("1500000000;u;A1\n1500000001;v;A2\n")
    (tmp_path / "items.any").write_bytes("A1|Caf\u00e9\nA2|Tea\n".encode("latin-1"))
    catalog = CatalogFile(tmp_path / "items.any", "csv", {"item": "1", "text": "2"}, Layout("|"))
    places = {"time": "1", "user": "2", "item": "3"}
    own = load_own(tmp_path / "log.any", columns=places, layout=Layout(";"), catalog=catalog)
    assert own.users["user"].to_list() == ["u", "v"]
    assert own.catalog.texts == ("Caf\u00e9", "Tea")
    assert own.notes == ("items.any is read as Windows-1252, as it is not UTF-8.",)
    assert own.log.collect().height == 2


def test_the_log_of_a_packed_file_stays_readable(tmp_path: Path) -> None:
    (tmp_path / "log.csv.bz2").write_bytes(bz2.compress(b"user,item,time\nu,i,1500000000\n"))
    (tmp_path / "items.csv").write_text("item,title\ni,I\n")
    own = load_own(tmp_path / "log.csv.bz2", tmp_path / "items.csv")
    gc.collect()
    assert own.log.collect().rows()[0][:3] == ("u", "i", 1500000000)


def test_the_commands_have_the_options_for_a_catalog() -> None:
    for command_app, command in ((site_app, ["init"]), (server_app, ["run"]), (simulate_app, [])):
        said = CliRunner().invoke(command_app, [*command, "--help"], terminal_width=200).output
        for option in ("format", "columns", "separator", "quotes", "encoding"):
            assert f"--catalog-{option}" in said
            assert f" --{option}" in said or command_app is server_app
