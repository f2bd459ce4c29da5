"""Plain files: what is packed, or in another encoding than UTF-8, as a plain UTF-8 file that can be scanned in parts.

A file that is plain already is read where it is. Of others a copy is made, which holds what the log holds: it has
no name where the system has such files (mode 0600 elsewhere), lies in the folder of whoever reads, and is gone when
the process is, however it ends.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import lzma
import re
import resource
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import polars as pl

from common.events.layout import Asked, Layout
from common.events.parts import Part, only_member
from common.events.schema import LogError

_BLOCK, _FIRST = 1 << 22, 1 << 16  # of the first block, little: often it is all that is asked for
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PACKED: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
)
_TOO_MANY = "there are more parts to be copied than files may be open at once (ulimit -n): join some of them"
_HIGH = re.compile(rb"[\x80-\xff]+")
_OTHER: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "Parquet", "parquet"),
    (b"\xd0\xcf\x11\xe0", "an old office document", ""),
    (b"SQLite format 3\x00", "a database", ""),
    (b"%PDF", "a PDF", ""),
    (b"<!DOCTYPE", "a web page", ""),
    (b"<!doctype", "a web page", ""),
    (b"<html", "a web page", ""),
    (b"version https://git-lfs", "a pointer of Git LFS to the file", ""),
)


class Plain:
    """A file that is UTF-8 text once it is unpacked, which is what its bytes are here; its copy lives as long as it.

    Attributes:
        path: of the file: plain, or packed in a way that polars reads.
    """

    def __init__(self, path: Path, copy: IO[bytes] | None = None, packed: str | None = None) -> None:
        self.path = path
        self._copy, self._packed = copy, packed

    def blocks(self) -> Iterator[bytes]:
        """The bytes, some at a time.

        Raises:
            LogError: it is cut off or damaged.
        """
        if self._packed is not None:
            yield from _unpacked_blocks(self.path, self._packed)
            return
        size = _FIRST
        with self.path.open("rb", buffering=0) as file:
            while block := file.read(size):
                yield block
                size = _BLOCK

    def lines(self) -> Iterator[bytes]:
        """The lines, each with its end."""
        held = b""
        for block in self.blocks():
            lines = (held + block).split(b"\n")
            held = lines.pop()
            for line in lines:
                yield line + b"\n"
        if held:
            yield held

    def head(self) -> bytes:
        """The first bytes, some or all."""
        return next(self.blocks(), b"")[: 1 << 16]


def make_copy(pieces: Iterable[bytes], work: Path | None) -> Plain:
    """A file of these bytes, in a folder; None: where the system keeps such files.

    Raises:
        LogError: the disk is full, or the folder is not to be written.
    """
    try:
        file, path = _new_file(work)
    except OSError as error:
        raise _no_room(work, error) from error
    for piece in pieces:  # a fault of what is read passes as it is
        try:
            file.write(piece)
        except OSError as error:
            raise _no_room(work, error) from error
    file.flush()
    return Plain(path, file)


def _new_file(work: Path | None) -> tuple[IO[bytes], Path]:
    if Path("/proc/self/fd").is_dir():
        file: IO[bytes] = tempfile.TemporaryFile(dir=work)  # noqa: SIM115 - it lives as long as it is read
        return file, Path(f"/proc/self/fd/{file.fileno()}")
    file = tempfile.NamedTemporaryFile(dir=work, delete=False)  # noqa: SIM115
    path = Path(file.name)
    weakref.finalize(file, path.unlink, missing_ok=True)
    return file, path


def allow_files(count: int) -> None:
    """Lets the process have as many files open at once, as far as it may let itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _cannot_read(path: Path, error: OSError) -> LogError:
    if error.errno == errno.EMFILE:
        return LogError(_TOO_MANY)
    return LogError(f"{path} cannot be read: {error.strerror}")


def _no_room(work: Path | None, error: OSError) -> LogError:
    where = work or tempfile.gettempdir()
    if error.errno == errno.EMFILE:
        return LogError(
            "the log has more parts to be copied than files may be open at once: join some of them"
        )
    return LogError(f"{where} cannot take a plain copy of the file: {error.strerror}; make room there")


def plain_text(
    part: Part,
    layout: Layout,
    work: Path | None,
    asked: Asked,
    look: Callable[[bytes], None] | None = None,
) -> tuple[Plain, list[str], bool]:
    """A part as plain UTF-8 without a mark, and what is to be said of it.

    UTF-8 is read as such. With a mark, or with zeros in every other byte, a file is UTF-16 or UTF-32. A file that
    is not UTF-8 is Windows-1252 (which has Latin-1's letters); but one that has more letters in UTF-8 than damaged
    ones is UTF-8 that was damaged in places, and these stay marked as lost (U+FFFD): an id with one names nobody.

    Args:
        look: shown every block of the file as it is, while its letters are looked at.

    Returns:
        The text, what is to be said of it, and whether `look` has seen all of it as it is now.

    Raises:
        LogError: it is packed in a way that is not read, cut off, or in none of these encodings.
    """
    plain = _unpacked(part, work)
    head = plain.head()
    for magic, what, format in _OTHER:
        if head.startswith(magic):
            way_out = (
                f"say {asked.option('format')} {format}"
                if format
                else "fetch the file itself, or export it as CSV"
            )
            raise LogError(f"{part.path} is {what}, whatever its name says: {way_out}")
    encoding, seen = layout.encoding, False
    if encoding == "auto":
        marked = _encoding_by_mark(head)
        seen = marked is None and look is not None
        encoding = marked or _encoding_by_letters(plain, part, asked, look)
    name = codecs.lookup(encoding).name
    if name == "utf-8" and not head.startswith(codecs.BOM_UTF8):
        mended = _with_newlines(plain, work)
        return mended, [], seen and mended is plain
    notes = [] if name == "utf-8" else [f"{part.shown} is read as {_shown(name)}"]
    if name == "utf-8":
        return _with_newlines(make_copy(_without_mark(plain), work), work), notes, False
    try:
        return _with_newlines(make_copy(_decoded(plain, encoding), work), work), notes, False
    except UnicodeError as error:
        raise LogError(
            f"{part.path} is not in {_shown(name)}: name its encoding with {asked.option('encoding')}"
        ) from error


def _shown(encoding: str) -> str:
    return {"cp1252": "Windows-1252, as it is not UTF-8"}.get(encoding, encoding.upper())


def _encoding_by_mark(head: bytes) -> str | None:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    sample = head[: len(head) // 2 * 2]
    if len(sample) >= 4 and b"\0" in sample:
        low, high = sample[0::2].count(0), sample[1::2].count(0)
        most = 0.4 * len(sample) / 2
        if high > most and low < most / 8:
            return "utf-16-le"
        if low > most and high < most / 8:
            return "utf-16-be"
    return None


def _encoding_by_letters(plain: Plain, part: Part, asked: Asked, look: Callable[[bytes], None] | None) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    right = wrong = runs = long_runs = 0
    pending = False
    for block in plain.blocks():
        if look is not None:
            look(block)
        if block.isascii() and not pending:
            continue
        text = decoder.decode(block)
        pending = bool(decoder.getstate()[0])
        lost, marked = text.count("\ufffd"), block.count("\ufffd".encode())
        right += len(text) - len(text.encode("ascii", "ignore")) - max(0, lost - marked)
        if lost > marked:
            wrong += lost - marked
            found = _HIGH.findall(block)
            runs, long_runs = runs + len(found), long_runs + sum(len(run) > 3 for run in found)
    wrong += len(decoder.decode(b"", True))
    if right >= wrong:
        return "utf-8"
    if long_runs > runs / 10:  # a language of Windows-1252 has one or two such letters in a row
        raise LogError(
            f"{part.path} is neither UTF-8 nor Windows-1252: name its encoding with {asked.option('encoding')}, "
            "such as gb18030, shift_jis or cp1251"
        )
    return "cp1252"


def _without_mark(plain: Plain) -> Iterator[bytes]:
    first = True
    for block in plain.blocks():
        yield block.removeprefix(codecs.BOM_UTF8) if first else block
        first = False


def _decoded(plain: Plain, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    first = True
    for block in plain.blocks():
        text = decoder.decode(block)
        yield (text.removeprefix("\ufeff") if first and text else text).encode()
        first = first and not text
    yield decoder.decode(b"", True).encode()


def _with_newlines(plain: Plain, work: Path | None) -> Plain:
    """The file, with lines that end in a carriage return alone made to end in a newline."""
    head = plain.head()
    if b"\r" not in head or b"\n" in head:
        return plain
    if any(b"\n" in block for block in plain.blocks()):
        return plain
    return make_copy((block.replace(b"\r", b"\n") for block in plain.blocks()), work)


def _unpacked(part: Part, work: Path | None) -> Plain:
    try:
        with part.path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise _cannot_read(part.path, error) from error
    packed = next((kind for magic, kind in _PACKED if head.startswith(magic)), None)
    if packed in (None, "gzip", "zstandard"):
        return Plain(part.path, packed=packed)
    return make_copy(_unpacked_blocks(part.path, packed), work)


def _unpacked_blocks(path: Path, packed: str) -> Iterator[bytes]:
    try:
        yield from _UNPACK[packed](path)
    except pl.exceptions.PolarsError as error:
        raise LogError(
            f"{path} is cut off, or holds another encoding than UTF-8: unpack it with zstd -d, and give the file"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError) as error:
        if isinstance(error, OSError) and error.strerror is not None:
            raise _cannot_read(path, error) from error
        raise LogError(f"{path} is cut off or damaged: fetch or write it again") from error


def _stream(open_: Callable[[Path], io.BufferedIOBase]) -> Callable[[Path], Iterator[bytes]]:
    def blocks(path: Path) -> Iterator[bytes]:
        with open_(path) as file:
            while block := file.read(_BLOCK):
                yield block

    return blocks


@contextmanager
def _member(path: Path) -> Iterator[IO[bytes]]:
    name = only_member(path)
    with zipfile.ZipFile(path) as archive:
        try:
            opened = archive.open(name)
        except (RuntimeError, NotImplementedError) as error:
            raise LogError(
                f"{path} is locked, or packed in a rare way: unpack it, and give the file in it"
            ) from error
        with opened:
            yield opened


def _zip_blocks(path: Path) -> Iterator[bytes]:
    with _member(path) as file:
        while block := file.read(_BLOCK):
            yield block


def _zstandard_blocks(path: Path) -> Iterator[bytes]:
    for lines in pl.scan_lines(path).collect_batches(engine="streaming"):
        yield "\n".join([*lines["line"].to_list(), ""]).encode()


_UNPACK: dict[str, Callable[[Path], Iterator[bytes]]] = {
    "gzip": _stream(gzip.GzipFile),
    "bzip2": _stream(bz2.BZ2File),
    "xz": _stream(lzma.LZMAFile),
    "zip": _zip_blocks,
    "zstandard": _zstandard_blocks,
}
