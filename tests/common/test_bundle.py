"""The bundle: thin, the same bytes for the same code, and the very bytes that Flower's own command builds."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from common import bundle
from common.bundle import BundleError, build_bundle, bundle_hash, installed_code


def test_flower_builds_the_bundle_whose_hash_a_site_lists(tmp_path: Path) -> None:
    built = build_bundle(tmp_path / "fedtide")
    assert built.sha256 == bundle_hash() == build_bundle(tmp_path / "again").sha256
    assert built.code == installed_code()
    subprocess.run(
        [str(Path(sys.executable).with_name("flwr")), "build", "--app", str(built.path)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={"PATH": os.defpath, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(tmp_path / "flwr")},
    )
    (fab,) = tmp_path.glob("*.fab")
    assert hashlib.sha256(fab.read_bytes()).hexdigest() == built.sha256
    names = set(zipfile.ZipFile(fab).namelist())
    assert names == {"pyproject.toml", "fedtide_server.py", "fedtide_client.py", ".info/CONTENT"}


def test_its_modules_give_the_apps_that_are_installed(tmp_path: Path) -> None:
    built = build_bundle(tmp_path / "fedtide")
    script = (
        "import fedtide_client, fedtide_server, client.app, server.app;"
        "assert fedtide_client.app is client.app.app;"
        "assert fedtide_server.app is server.app.app;"
        "print(fedtide_client.CODE)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=built.path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == built.code


def test_a_changed_line_at_a_site_is_another_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, hash_before = installed_code(), bundle_hash()
    for package in bundle.CODE_PACKAGES:
        found = Path(__import__(package).__file__).parent
        shutil.copytree(found, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    script = "from common.bundle import *; print(installed_code(), bundle_hash())"

    def said() -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        ).stdout.split()

    assert said() == [before, hash_before]
    with (tmp_path / "client" / "training.py").open("a") as file:
        file.write("\n")
    code, sha256 = said()
    assert code != before
    assert sha256 != hash_before


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"user": "alice"}\n')
    with pytest.raises(BundleError, match=r"log\.jsonl"):
        build_bundle(tmp_path)
