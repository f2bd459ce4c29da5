"""Quotes in text files: none swallows a row, none is lost, and what can be read two ways is refused."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common.events.plain
from common.events.catalog import read_catalog
from common.events.layout import CATALOG, Layout
from common.events.plain import Plain
from common.events.quoting import look_at_quotes
from common.events.schema import LogError
from tests.common.events.reading import Row, events, refusal, write

FOUR: list[Row] = [(f"u{n}", f"{n}", 1_500_000_000 + n) for n in range(1, 5)]


def _log(folder: Path, tracks: list[str], separator: str = ",", name: str = "log.csv") -> Path:
    """Four events with a track each, as a line says it."""
    rows = [
        [user or "", item or "", str(time), track]
        for (user, item, time), track in zip(FOUR, tracks, strict=True)
    ]
    lines = [["user", "item", "time", "track"], *rows]
    return write(folder / name, "".join(separator.join(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "tracks",
    [
        ['"Open title', "B", 'closed here"', "C"],
        ['"Wheel" guest tells', "B", "C", "D"],
        ['5" disc', 'disc 12"', '"', '""'],
        ['"quoted whole"', 'two "words" here', '"Open', "D"],
        ["A", "B", "C", '"never closed'],
        ['"', '"', '"', '"'],
        ['say ""this""', '"a" "b"', "'", '"""'],
        ['"Open', '"Open', 'close"', 'close"'],
        ['ends"', '"begins', "C", 'ends"'],
        ['back\\"slash', '"back\\"slash"', "C", "D"],
    ],
)
def test_quotes_in_tsv_are_text(tmp_path: Path, tracks: list[str]) -> None:
    assert events(_log(tmp_path, tracks, "\t", "log.tsv")) == FOUR


def test_tsv_has_quotes_where_it_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "log.tsv", 'user\titem\ttime\n"u\t1"\t1\t2\n')
    assert events(path, quotes="double") == [("u1", "1", 2)]  # an id has no control characters
    quoted = write(tmp_path / "q.tsv", '"user"\t"item"\t"time"\n"u"\t"1"\t"2"\n')
    assert "--quotes double" in refusal(quoted)
    assert events(quoted, quotes="double") == [("u", "1", 2)]
    places = "user=1,item=2,time=3"
    bare = write(tmp_path / "p.tsv", '"u"\t"1"\t"2"\n"v"\t"1"\t"2"\n')
    assert "--quotes double" in refusal(bare, places)
    assert events(bare, places, quotes="double") == [("u", "1", 2), ("v", "1", 2)]
    assert events(write(tmp_path / "o.tsv", '"u"\t1\t2\n'), places) == [('"u"', "1", 2)]


@pytest.mark.parametrize(
    "tracks",
    [
        ['"Open title', "B", 'closed here"', "C"],
        ['"Open title', 'closed here"', "B", "C"],
        ["A", '"Open', "C", 'closed"'],
        ['"Open', "B", "C", 'closed "now" "again"'],
        ['"Open', "", "", '"'],
    ],
)
def test_a_csv_that_can_be_read_two_ways_is_refused_until_the_person_says_which(
    tmp_path: Path, tracks: list[str]
) -> None:
    path = _log(tmp_path, tracks)
    try:
        found = events(path)
    except LogError:
        message = refusal(path)
        assert "read as rows of their own" in message
        assert "--quotes none" in message
        assert "--quotes double" in message
        assert "Open" not in message
    else:
        assert found == FOUR
    assert events(path, quotes="none") == FOUR


def test_the_case_of_two_events_of_four_is_refused(tmp_path: Path) -> None:
    assert "lines 2 to 4" in refusal(_log(tmp_path, ['"Open title', "B", 'closed here"', "C"]))
    assert len(events(_log(tmp_path, ['"Open title', "B", 'closed here"', "C"]), quotes="double")) == 2


@pytest.mark.parametrize(
    "tracks",
    [
        ['5" disc', "B", "C", "D"],
        ['12" mix', '7" mix', "C", 'disc 5"'],
        ['"Wheel" guest tells', "B", "C", "D"],
        ["A", "B", "C", '"never closed'],
        ['"5"" disc"', '"a, b"', '""', "D"],
        ['"a, b"', '5" disc', '"c, ""d"""', "D"],
        ['5"', '"6"', '7"', '"8"'],
        ['back\\"slash', "B", "C", "D"],
        ['say ""this""', "B", "C", "D"],
        ["5' 3\"", "6' 1\"", "C", "D"],
    ],
)
def test_inch_marks_and_words_in_quotes_are_text_in_csv(tmp_path: Path, tracks: list[str]) -> None:
    assert events(_log(tmp_path, tracks)) == FOUR


@pytest.mark.parametrize(
    "track",
    [
        '"first\nsecond"',
        '"first\r\nsecond"',
        '"first\n\n\nsecond, with, commas, more"',
        '"a ""word""\nand more"',
        '"one\ntwo, three, four, five"',
        '"\n"',
        '"ends with a quote """\n'.strip(),
        '"1 line,\n2 lines,\n3 lines"',
        '"a,b\nc,d"',
        '"' + "many lines\n" * 300 + '"',
    ],
)
def test_lines_within_a_quoted_field_are_no_rows(tmp_path: Path, track: str) -> None:
    assert events(_log(tmp_path, [track, "B", track, '5" disc'])) == FOUR


def test_titles_with_quotes_are_kept_in_a_catalog(tmp_path: Path) -> None:
    lines = 'item,title\n1,5" disc\n2,"Wheel" guest tells\n3,"a, ""b"""\n4,"two\nlines"\n'
    catalog = read_catalog(write(tmp_path / "items.csv", lines))
    assert catalog.texts == ('5" disc', '"Wheel" guest tells', 'a, "b"', "two\nlines")
    tabs = 'item\tcategory\ttitle\nN1\ta\tPlain\nN2\ta\t"Wheel" guest tells\nN3\ta\t"Open\n'
    assert read_catalog(write(tmp_path / "items.tsv", tabs)).texts == (
        "Plain",
        '"Wheel" guest tells',
        '"Open',
    )


def test_a_catalog_that_can_be_read_two_ways_names_its_own_options(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", 'item,title\n1,"Open\n2,Two\n3,closed"\n4,Four\n')
    with pytest.raises(
        LogError, match="--catalog-quotes none where quotes are text, or --catalog-quotes double"
    ):
        read_catalog(path)
    assert len(read_catalog(path, layout=Layout(quotes="none"))) == 4
    assert len(read_catalog(path, layout=Layout(quotes="double"))) == 2
    assert CATALOG.option("quotes") == "--catalog-quotes"


def test_a_line_whose_quotes_fit_no_reading_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", 'user,item,time,track\nu,1,2,"a, b" c\n')
    message = refusal(path)
    assert "the quotes of line 2" in message
    assert "--quotes none" in message


def test_many_stray_quotes_take_no_long_time_and_lose_no_row(tmp_path: Path) -> None:
    lines = [f'u{n},{n},{1_500_000_000 + n},{n}" disc' for n in range(20_000)]
    path = write(tmp_path / "log.csv", "user,item,time,track\n" + "\n".join(lines) + "\n")
    assert len(events(path)) == 20_000


def test_a_log_without_names_that_begins_with_a_stray_quote(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", 'u1,1,1500000001,"Open\nu2,2,1500000002,B\nu3,3,1500000003,closed"\n')
    assert "lines 1 to 3" in refusal(path, "user=1,item=2,time=3")
    assert len(events(path, "user=1,item=2,time=3", quotes="none")) == 3


_TEXT = st.text(st.sampled_from('ab1 ,"\n;\t\u00e9'), max_size=12)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=8))
def test_what_a_csv_writer_wrote_is_read_or_refused_and_never_misread(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(["note", "user", "item", "time", "more"])
    wanted = []
    for number, (before, after) in enumerate(texts):
        writer.writerow([before, f"u{number}", f"i{number}", number, after])
        wanted.append((f"u{number}", f"i{number}", number))
    path = write(tmp_path_factory.mktemp("quoting") / "log.csv", written.getvalue())
    assert events(path, quotes="double") == sorted(wanted, key=repr)
    try:
        found = events(path)
    except LogError as error:
        assert "read as rows of their own" in str(error)  # noqa: PT017 - both ways out are right
    else:
        assert found == sorted(wanted, key=repr)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=0) | st.text(st.sampled_from('a,"\n\r'), max_size=60).map(str.encode))
def test_where_a_block_ends_does_not_matter(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    plain = Plain(write(tmp_path_factory.mktemp("blocks") / "log.csv", content))
    whole = look_at_quotes(plain, ",", True)
    for size in (1, 2, 3, 7):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(common.events.plain, "_BLOCK", size)
            patched.setattr(common.events.plain, "_FIRST", size)
            seen = look_at_quotes(plain, ",", True)
            # Whether a line is blank is asked of files with quotes in whole blocks: too often is no harm.
            assert seen == (replace(whole, blank=seen.blank) if whole.quoted else whole)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.sampled_from(["a", "", "b c", "x"]), min_size=1, max_size=5), min_size=1, max_size=6)
)
def test_the_widest_row_is_found(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    text = "\n".join(map(",".join, rows))
    for end in ("", "\n"):
        if not text + end:
            continue
        plain = Plain(write(tmp_path_factory.mktemp("rows") / "log.csv", text + end))
        seen = look_at_quotes(plain, ",", True)
        assert seen.widest == max(map(len, rows))
        assert len(rows[seen.line - 1]) == seen.widest


def _slow_look(content: str) -> tuple[bool, int, int]:
    """Tidiness, rows and fields of the widest row, letter by letter."""
    inside, tidy, rows, fields, widest = False, True, 0, 1, 0
    for place, letter in enumerate(content):
        before, after = content[place - 1] if place else "\n", content[place + 1 : place + 2] or "\n"
        if letter == '"':
            tidy = tidy and (after in ',\n"\r' if inside else before in ',\n"')
            inside = not inside
        elif letter == "\n":
            tidy = tidy and not inside
            if not inside:
                rows, widest, fields = rows + 1, max(widest, fields), 1
        elif letter == "," and not inside:
            fields += 1
    if content and not content.endswith("\n"):
        rows, widest = rows + 1, max(widest, fields)
    return tidy and not inside, rows, widest


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.sampled_from(['"', '""', "a", ",", "\n", "\r\n", '","', '"\n"', '",']), max_size=25).map(
        "".join
    )
)
def test_what_is_seen_at_once_is_what_a_slow_look_sees(
    tmp_path_factory: pytest.TempPathFactory, content: str
) -> None:
    plain = Plain(write(tmp_path_factory.mktemp("look") / "log.csv", content))
    tidy, rows, widest = _slow_look(content)
    for size in (1, 3, 1 << 16):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(common.events.plain, "_BLOCK", size)
            patched.setattr(common.events.plain, "_FIRST", size)
            seen = look_at_quotes(plain, ",", True)
        assert (seen.tidy, seen.rows) == (tidy, rows)
        if not content.endswith('"') or tidy:
            assert seen.widest == widest
