"""The Flower app bundle: our packages, and nothing else that happens to lie in the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_bundle_ships_our_packages_and_no_file_beside_them(tmp_path: Path) -> None:
    app = tmp_path / "fedtide"
    app.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, app)
    for name in ("common", "client", "server", "simulations"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    (app / "log.jsonl").write_text('{"user": "alice"}\n')  # a local log must never travel
    (app / "client" / "site.json").write_text("{}")
    subprocess.run(
        [str(Path(sys.executable).with_name("flwr")), "build", "--app", str(app)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(tmp_path / "flwr")},
    )
    (bundle,) = tmp_path.glob("*.fab")
    names = set(zipfile.ZipFile(bundle).namelist())
    assert {"pyproject.toml", "server/app.py", "client/app.py", "common/wire.py"} <= names
    shipped = {name for name in names if name.endswith((".json", ".jsonl"))}
    assert shipped == set()
    roots = {name.partition("/")[0] for name in names if name.endswith(".py")}
    assert roots == {"server", "client", "common"}
