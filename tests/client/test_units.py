"""The files that keep a site up name its folder as systemd and compose read it, whatever signs it has."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from client.units import COMPOSE, UNIT, write_units

ODD = "50% of $HOME, north"


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    site = folder / ODD
    site.mkdir()
    monkeypatch.setenv("FEDTIDE_HOME", str(folder / "a % cache"))
    write_units(site, site)
    return (site / "units" / UNIT).read_text(), site


def test_a_percent_sign_or_a_dollar_in_a_folders_name_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, site = written(tmp_path, monkeypatch)
    assert unit.replace("%%", "").count("%") == 0
    (command,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert command.endswith(f'"{tmp_path}/50%% of $$HOME, north"')
    assert f'ReadWritePaths="{tmp_path}/50%% of $HOME, north" "-{tmp_path}/a %% cache"' in unit
    service = yaml.safe_load((site / "units" / COMPOSE).read_text())["services"]["fedtide-site"]
    assert service["command"][-1] == str(site).replace("$", "$$")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_reads_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, site = written(tmp_path, monkeypatch)
    done = subprocess.run(
        ["systemd-analyze", "verify", site / "units" / UNIT],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert UNIT not in done.stderr, done.stderr
