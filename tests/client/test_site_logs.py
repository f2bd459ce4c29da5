"""`fedtide site init` on logs and catalogs as people have them: what the site holds, or one line that says why not."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import polars as pl
import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.cli import app
from client.sources import Sources
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.events.layout import Layout
from tests.tiny import tiny_plan

ITEMS = "item,title\n1,One\n2,Two\n3,Three\n4,Four\n"
HEADER = "user,item,time\n"
SECRET = "person-17@example.org"


def _write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def _init(folder: Path, log: str, catalog: str = "items.csv", *more: str) -> Result:
    plan = folder / "plan.json"
    plan.write_text(tiny_plan(folder / "no-model-needed", privacy={"users_per_site": 1}).to_json())
    words = ["init", "S", "--logs", log, "--catalog", catalog, "--epsilon", "8", "--delta", "1e-4"]
    options = ["--users-at-least", "1", "--minimum-events", "1", "--typical-plan", "plan.json"]
    return CliRunner().invoke(app, [*words, *options, *more])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


_NUMBERS = pl.DataFrame({"user": [1, 2], "item": [1, 2], "time": [1_500_000_000] * 2})


def _parquet(frame: pl.DataFrame, path: Path) -> bytes:
    frame.write_parquet(path)
    return path.read_bytes()


HELD: dict[str, tuple[dict[str, str | bytes], list[str], int, int]] = {
    "folder-and-subfolders": (
        {
            "log/a.csv": HEADER + "u,1,1500000000\nu,2,1500000001\n",
            "log/2017/b.csv": HEADER + "u,3,1500086400\nv,3,1500086400\n",
        },
        ["log"],
        2,
        4,
    ),
    "folder-hive": (
        {
            "log/date=2017-07-14/a.csv": HEADER + "u,1,1500000000\n",
            "log/date=2017-07-15/a.csv": HEADER + "u,3,1500086400\n",
        },
        ["log"],
        1,
        2,
    ),
    "headerless": (
        {"log.csv": f"{SECRET},1,1511544070\nother,2,1511544071\n{SECRET},3,1511544079\n"},
        ["log.csv", "items.csv", "--columns", "user=1,item=2,time=3"],
        2,
        3,
    ),
    "jsonl-late-other-column": (
        {
            "log.jsonl": "".join(
                f'{{"user":"u{n % 9}","item":"{n % 3 + 1}","time":{1500000000 + n},"tags":["a"]}}\n'
                for n in range(1100)
            )
            + '{"user":"u1","item":"1","time":1600000000,"tags":"b"}\n'
        },
        ["log.jsonl"],
        9,
        1101,
    ),
    "jsonl-nan": (
        {
            "log.jsonl": '{"user":"u1","item":"1","time":1500000000,"rating":NaN}\n'
            '{"user":"u1","item":"2","time":1500000001,"rating":3}\n'
        },
        ["log.jsonl"],
        1,
        2,
    ),
    "utf16-log": (
        {"log.csv": (HEADER + "u,1,1500000000\nu,2,1500000001\n").encode("utf-16")},
        ["log.csv"],
        1,
        2,
    ),
    "tsv-quote-log": (
        {
            "log.tsv": 'user\titem\ttime\ttrack\nu1\t1\t1500000000\t"Open\nu2\t2\t1500000001\tB\n'
            'u3\t3\t1500000002\tclosed"\nu4\t4\t1500000003\tC\n'
        },
        ["log.tsv"],
        4,
        4,
    ),
    "tsv-quote-refused": (
        {
            "items.tsv": 'item\tcategory\ttitle\nN1\ta\tPlain\nN2\ta\t"Wheel" guest tells\nN3\ta\tOther\n',
            "log.csv": HEADER + "u,N1,1500000000\nu,N3,1500000001\n",
        },
        ["log.csv", "items.tsv"],
        1,
        2,
    ),
    "latin1-catalog-csv": (
        {
            "latin.csv": "item,title\n1,Am\u00e9lie\n2,L\u00e9on\n".encode("latin-1"),
            "log.csv": HEADER + "u,1,1500000000\nu,2,1500000001\n",
        },
        ["log.csv", "latin.csv"],
        1,
        2,
    ),
    "catalog-json-dead-end": (
        {
            "items.json": '{"item":"1","title":"A"}\n{"item":"2","title":"B"}\n',
            "log.json": '{"user":"u","item":"1","time":1500000000}\n{"user":"u","item":"2","time":1500000001}\n',
        },
        ["log.json", "items.json", "--format", "jsonl"],
        1,
        2,
    ),
    "catalog-of-no-name": (
        {"items.any": "1;One\n2;Two\n", "log.any": "1500000000;u;1\n1500000001;u;2\n"},
        [
            *("log.any", "items.any", "--separator", ";", "--columns", "time=1,user=2,item=3"),
            *("--catalog-format", "csv", "--catalog-separator", ";", "--catalog-columns", "item=1,text=2"),
        ],
        1,
        2,
    ),
    "ml10m-utf8-dat": (
        {
            "movies.dat": "1::L\u00e9on (1994)::Drama\n2::Am\u00e9lie (2001)::Comedy\n",
            "ratings.dat": "1::1::5::838985046\n1::2::4.5::838983525\n",
        },
        ["ratings.dat", "movies.dat"],
        1,
        2,
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_a_site_holds_what_the_files_hold(here: Path, name: str) -> None:
    files, arguments, users, events = HELD[name]
    _write(here, {"items.csv": ITEMS, **files})
    done = _init(here, *arguments)
    assert done.exit_code == 0, done.output
    histories = Histories.load(here / "S" / "histories")
    assert (len(histories), len(histories.items)) == (users, events)
    texts = Catalog.load(here / "S" / "catalog.jsonl").texts
    assert not any("\ufffd" in text or "\u00c3" in text for text in texts)
    assert ("is read as Windows-1252" in done.output) == (name == "latin1-catalog-csv")
    assert ("is read as UTF-16" in done.output) == (name == "utf16-log")


def test_parts_of_other_widths_are_one_log(here: Path) -> None:
    _write(
        here,
        {
            "items.csv": ITEMS,
            "log/a.parquet": _parquet(_NUMBERS.with_columns(pl.col("user").cast(pl.Int32)), here / "x"),
            "log/b.parquet": _parquet(_NUMBERS.with_columns(item=pl.col("item") + 2), here / "x"),
        },
    )
    assert _init(here, "log").exit_code == 0
    histories = Histories.load(here / "S" / "histories")
    assert (len(histories), len(histories.items)) == (2, 4)


_LOG = f"{SECRET},1,1511544070\nother,2,1511544071\n"
REFUSED: dict[str, tuple[dict[str, str | bytes], list[str], str]] = {
    "message-quotes-user": ({"log.csv": _LOG}, ["log.csv"], "--columns user=1,item=2,time=3"),
    "headerless-first-row-lost": (
        {"log.csv": _LOG},
        ["log.csv", "items.csv", "--columns", f"user={SECRET},item=1,time=1511544070"],
        "--columns user=1,item=2,time=3",
    ),
    "stray-quote": (
        {
            "log.csv": f'{HEADER.strip()},note\n{SECRET},1,1500000000,"Open\nu,2,1500000001,B\nu,3,1500000002,closed"\n'
        },
        ["log.csv"],
        "--quotes none",
    ),
    "semicolons": ({"log.csv": "user;item;time\n" + _LOG.replace(",", ";")}, ["log.csv"], "--separator ';'"),
    "catalog-of-no-name": (
        {"items.any": ITEMS, "log.csv": HEADER + _LOG},
        ["log.csv", "items.any"],
        "--catalog-format",
    ),
    "catalog-in-another-encoding": (
        {
            "c.csv": "item,title\n1,\u4e09\u4f53\u7684\u4e16\u754c\n".encode("gb18030"),
            "log.csv": HEADER + _LOG,
        },
        ["log.csv", "c.csv"],
        "--catalog-encoding",
    ),
    "archive-of-no-known-kind": ({"log.7z": b"7z", "log.csv": HEADER}, ["log.7z"], "unpack it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_with_the_option_that_there_is_and_no_user_in_it(here: Path, name: str) -> None:
    files, arguments, said = REFUSED[name]
    _write(here, {"items.csv": ITEMS, **files})
    done = _init(here, *arguments)
    assert done.exit_code != 0
    message = str(done.exception)
    assert said in message, message
    assert SECRET not in message
    assert "1511544070" not in message
    assert message.isprintable()
    if said.startswith("--"):
        assert (
            said.partition(" ")[0] in CliRunner().invoke(app, ["init", "--help"], terminal_width=200).output
        )
    assert not (here / "S").exists()
    assert not [path for path in here.iterdir() if path.name.endswith(".partial")]


def test_a_basket_is_refused_by_column_and_type(here: Path) -> None:
    basket = pl.DataFrame({"user": ["u", "v"], "item": [["1", "2"], ["3"]], "time": [1500000000] * 2})
    _write(here, {"items.csv": ITEMS, "log.parquet": _parquet(basket, here / "x")})
    message = str(_init(here, "log.parquet").exception)
    assert "column 'item' (for item) holds lists, type List(String)" in message


def test_the_options_are_kept_in_the_sites_folder(here: Path) -> None:
    files, arguments, _, _ = HELD["catalog-of-no-name"]
    _write(here, files)
    done = _init(here, *arguments, "--quotes", "none", "--catalog-encoding", "latin-1", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["notes"] == ["items.any is read as ISO8859-1"]
    assert stat.S_IMODE((here / "S" / "sources.json").stat().st_mode) == 0o600
    kept = Sources.load(here / "S")
    assert kept.logs == here / "log.any"
    assert kept.columns == {"time": "1", "user": "2", "item": "3"}
    assert (kept.layout, kept.format) == (Layout(";", "none"), "auto")
    assert kept.catalog_layout == Layout(";", "auto", "latin-1")
    assert kept.catalog_format == "csv"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--separator", '"'], "--separator '\"' cannot stand between fields"),
        (["--catalog-separator", ""], "--catalog-separator '' cannot stand between fields"),
        (["--quotes", "single"], "--quotes 'single' is unknown: choose auto, double, none"),
        (["--encoding", "klingon"], "--encoding 'klingon' is unknown"),
        (["--catalog-format", "excel"], "format 'excel' is unknown"),
        (["--columns", "user=1,user=2"], "--columns names user twice"),
        (["--catalog-columns", "item"], "--catalog-columns 'item' must read field=column"),
    ],
)
def test_an_option_that_is_wrong_is_named(here: Path, options: list[str], said: str) -> None:
    _write(here, {"items.csv": ITEMS, "log.csv": HEADER + "u,1,1500000000\n"})
    assert said in str(_init(here, "log.csv", "items.csv", *options).exception)
