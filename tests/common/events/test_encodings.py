"""Encodings and packed files: read as what they are, without a lossy id, or refused in words."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import polars as pl
import pytest

from common.events.catalog import read_catalog
from common.events.layout import LOG, Layout
from common.events.parts import Part
from common.events.plain import make_copy, plain_text
from common.events.readers import scan_log
from common.events.schema import LogError
from tests.common.events.reading import Row, events, refusal, write

ACCENTS: list[Row] = [("Jos\u00e9", "caf\u00e9", 1), ("Ren\u00e8e", "na\u00efve", 2), ("u", "i", 3)]
EURO: list[Row] = [("5 \u20ac", "\u201cquoted\u201d", 1), ("u", "i", 2)]


def _csv(rows: list[Row], end: str = "\n") -> str:
    return end.join(["user,item,time", *(",".join(map(str, row)) for row in rows)]) + end


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "iso8859-15"],
)
@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl", "log.csv.gz"])
def test_an_encoding_is_found_out(tmp_path: Path, encoding: str, name: str) -> None:
    text = _csv(ACCENTS)
    if "tsv" in name:
        text = text.replace(",", "\t")
    if "jsonl" in name:
        text = "".join(f'{{"user":"{user}","item":"{item}","time":{time}}}\n' for user, item, time in ACCENTS)
    content = text.encode(encoding)
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert events(path) == sorted(ACCENTS, key=repr)


def test_marks_are_taken_off_whatever_the_byte_order(tmp_path: Path) -> None:
    for mark, encoding in ((codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_BE, "utf-32-be")):
        path = write(tmp_path / "log.csv", mark + _csv(ACCENTS).encode(encoding))
        assert events(path) == sorted(ACCENTS, key=repr)
    headless = write(tmp_path / "bare.csv", codecs.BOM_UTF8 + b"u,i,1\nv,j,2\n")
    assert events(headless, "user=1,item=2,time=3") == [("u", "i", 1), ("v", "j", 2)]
    rated = write(tmp_path / "ratings.dat", codecs.BOM_UTF8 + b"1::2::5::3\n")
    assert events(rated) == [("1", "2", 3)]
    inter = write(
        tmp_path / "a.inter", codecs.BOM_UTF8 + b"user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n"
    )
    assert events(inter) == [("1", "2", 3)]


def test_windows_signs_are_read_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", _csv(EURO).encode("cp1252"))
    assert events(path) == sorted(EURO, key=repr)
    assert scan_log(path).notes == ("log.csv is read as Windows-1252, as it is not UTF-8",)
    assert scan_log(write(tmp_path / "plain.csv", _csv(EURO))).notes == ()


@pytest.mark.parametrize("encoding", ["gb18030", "shift_jis", "cp1251", "euc_kr", "koi8-r", "big5"])
def test_other_encodings_are_refused_until_they_are_named(tmp_path: Path, encoding: str) -> None:
    words = {
        "gb18030": "\u4e09\u4f53\u7684\u4e16\u754c",
        "big5": "\u4e09\u9ad4\u7684\u4e16\u754c",
        "shift_jis": "\u6771\u4eac\u306e\u7269\u8a9e",
        "euc_kr": "\uc11c\uc6b8\uc758 \ubc24",
    }.get(encoding, "\u041c\u043e\u0441\u043a\u0432\u0430 \u0441\u043b\u0435\u0437\u0430\u043c")
    path = write(tmp_path / "items.csv", f"item,title\n1,{words}\n2,{words}\n".encode(encoding))
    with pytest.raises(
        LogError, match="neither UTF-8 nor Windows-1252: name its encoding with --catalog-encoding"
    ):
        read_catalog(path)
    assert read_catalog(path, layout=Layout(encoding=encoding)).texts == (words, words)
    assert "--encoding" in refusal(
        write(tmp_path / "log.csv", f"user,item,time\n{words},1,2\n".encode(encoding))
    )


def test_an_encoding_that_does_not_fit_or_is_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", _csv(ACCENTS).encode("latin-1"))
    assert "is not in" in refusal(path, encoding="utf-16")
    assert "is not in ASCII" in refusal(path, encoding="ascii")
    for name in ("klingon", "base64", "hex"):
        with pytest.raises(LogError, match="unknown"):
            Layout(encoding=name)


def test_utf8_that_is_asked_for_is_read_with_its_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", _csv(ACCENTS).encode("latin-1"))
    assert sorted(map(repr, (user for user, _, _ in events(path, encoding="utf-8")))) == [
        "'u'",
        "None",
        "None",
    ]


def test_damage_in_a_utf8_catalog_is_counted_and_its_other_titles_are_whole(tmp_path: Path) -> None:
    lines = "item,title\n1,Am\u00e9lie\n2,L\u00e9on\n".encode() + b"3,caf\xc3\n" + "4,a\ufffdb\n".encode()
    said: list[str] = []
    catalog = read_catalog(write(tmp_path / "items.csv", lines), say=said.append)
    assert catalog.texts == ("Am\u00e9lie", "L\u00e9on", "caf\ufffd", "a\ufffdb")
    assert len(said) == 1
    assert said[0].startswith("2 of 4 texts of catalog items.csv")


def test_movielens_titles_are_read_in_their_own_encoding(tmp_path: Path) -> None:
    text = "1::L\u00e9on (1994)::Drama\n2::Am\u00e9lie: The Film (2001)::Comedy|Romance\n3::X::(no genres listed)\n"
    for encoding in ("utf-8", "latin-1", "utf-8-sig"):
        catalog = read_catalog(write(tmp_path / "movies.dat", text.encode(encoding)))
        assert catalog.ids == ("1", "2", "3")
        assert catalog.texts == ("L\u00e9on (1994)", "Am\u00e9lie: The Film (2001)", "X")
        assert catalog.categories == (("Drama",), ("Comedy", "Romance"), ())
    flags = "|".join(["0"] * 18 + ["1"])
    for encoding in ("utf-8", "latin-1"):
        item = f"1|L\u00e9on (1994)|01-Jan-1994||http://x|{flags}\n"
        catalog = read_catalog(write(tmp_path / "u.item", item.encode(encoding)))
        assert (catalog.texts, catalog.categories) == (("L\u00e9on (1994)",), (("Western",),))


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_ends_of_lines_of_any_system(tmp_path: Path, end: str) -> None:
    assert events(write(tmp_path / "log.csv", _csv(ACCENTS, end))) == sorted(ACCENTS, key=repr)
    path = write(tmp_path / "bare.csv", f"u,i,1{end}v,j,2{end}")
    assert events(path, "user=1,item=2,time=3") == [("u", "i", 1), ("v", "j", 2)]


def _packed(kind: str, content: bytes, folder: Path) -> bytes:
    if kind == "zst":
        pl.LazyFrame({"line": content.decode().splitlines()}).sink_csv(
            folder / "made.zst",
            compression="zstd",
            include_header=False,
            quote_style="never",
            check_extension=False,
        )
        return (folder / "made.zst").read_bytes()
    if kind == "zip":
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("folder/events.csv", content)
            archive.writestr("__MACOSX/._events.csv", b"x")
        return held.getvalue()
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](content)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst", "zip"])
def test_packed_logs_are_read(tmp_path: Path, kind: str) -> None:
    rows: list[Row] = [(f"u{n % 7}", f"i{n}", n) for n in range(1000)]
    packed = _packed(kind, _csv(rows).encode(), tmp_path)
    for name in (f"log.csv.{kind}", "log.csv", f"LOG.CSV.{kind.upper()}"):
        assert events(write(tmp_path / "l" / name, packed)) == sorted(rows, key=repr)
    if kind == "zip":
        assert events(write(tmp_path / "archive.zip", packed)) == sorted(rows, key=repr)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst", "zip"])
def test_a_packed_file_that_is_cut_off_is_refused(tmp_path: Path, kind: str) -> None:
    rows: list[Row] = [(os.urandom(8).hex(), f"i{n}", n) for n in range(2000)]
    packed = _packed(kind, _csv(rows).encode(), tmp_path)
    path = write(tmp_path / f"log.csv.{kind}", packed[: len(packed) // 2])
    assert "cut off" in refusal(path)


def test_an_archive_of_several_files_names_them(tmp_path: Path) -> None:
    path = tmp_path / "log.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("ratings.csv", "movies.csv"):
            archive.writestr(name, "user,item,time\n")
    assert "2 files (ratings.csv, movies.csv)" in refusal(path)
    with zipfile.ZipFile(path, "w"):
        pass
    assert "holds no file" in refusal(path, format="csv")


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("log.xlsx", "as CSV"),
        ("log.tar.gz", "unpack"),
        ("log.tgz", "unpack"),
        ("log.7z", "unpack"),
        ("log.csv.lz4", "unpack"),
        ("log.feather", "as Parquet"),
        ("log.orc", "as Parquet"),
        ("log.pkl", "as Parquet"),
        ("log.mat", "as Parquet"),
        ("log.sqlite", "as CSV"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, name: str, way_out: str) -> None:
    message = refusal(write(tmp_path / name, b"anything"))
    assert "is not read" in message
    assert way_out in message


def test_a_file_whose_name_says_another_format_is_found_out(tmp_path: Path) -> None:
    pl.DataFrame({"user": ["u"], "item": ["i"], "time": [1]}).write_parquet(tmp_path / "log.csv")
    assert "--format parquet" in refusal(tmp_path / "log.csv")
    assert events(tmp_path / "log.csv", format="parquet") == [("u", "i", 1)]
    assert "of another format" in refusal(write(tmp_path / "log.parquet", _csv(ACCENTS)))


def test_a_copy_is_nobody_elses_and_gone_with_the_log(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    path = write(tmp_path / "log.csv.bz2", bz2.compress(_csv(ACCENTS).encode()))
    log = scan_log(path, work=work)
    (copy,) = log.kept
    assert copy.path.stat().st_mode & 0o777 == 0o600
    assert log.frame.collect().height == 3
    number = Path(copy.path).name
    del log, copy
    assert list(work.iterdir()) == []
    if Path("/proc/self/fd").is_dir():
        assert not os.path.lexists(f"/proc/self/fd/{number}") or str(work) not in os.readlink(
            f"/proc/self/fd/{number}"
        )


def test_a_folder_that_cannot_take_a_copy_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot take a plain copy"):
        make_copy([b"x"], tmp_path / "absent")


def test_no_copy_is_made_of_what_is_plain(tmp_path: Path) -> None:
    for name, content in (
        ("log.csv", _csv(ACCENTS).encode()),
        ("log.csv.gz", gzip.compress(_csv(ACCENTS).encode())),
    ):
        path = write(tmp_path / name, content)
        plain, notes, _ = plain_text(Part(path, path.name, {}), Layout(), None, LOG)
        assert (plain.path, notes) == (path, [])


def test_packed_files_that_were_joined_are_read_whole(tmp_path: Path) -> None:
    rows: list[Row] = [(f"u{n % 7}", f"i{n}", n) for n in range(1000)]
    text = _csv(rows).encode()
    halves = gzip.compress(text[:7000]) + gzip.compress(text[7000:])
    assert events(write(tmp_path / "log.csv.gz", halves)) == sorted(rows, key=repr)


_MANY = """
import resource, sys
from common.events.readers import read_log
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
try:
    print(read_log(sys.argv[1]).collect().height)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "said"), [(900, "150"), (64, "more parts to be copied than files may be open")]
)
def test_more_packed_parts_than_files_may_be_open(tmp_path: Path, limit: int, said: str) -> None:
    for number in range(150):
        write(
            tmp_path / "log" / f"{number}.csv.bz2", bz2.compress(f"user,item,time\nu,{number},1\n".encode())
        )
    command = [sys.executable, "-c", _MANY, str(tmp_path / "log"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert said in done.stdout, done.stderr
