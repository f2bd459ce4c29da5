"""The files with which an operating system keeps a site up: a systemd unit and a compose file."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from common.assets import home

UNITS, UNIT, COMPOSE = "units", "fedtide-site.service", "compose.yaml"

_UNIT = """[Unit]
Description=Fedtide site in {folder}
After=network-online.target
Wants=network-online.target

[Service]
Type=simple
User={user}
Environment="FEDTIDE_HOME={home}"
ExecStart="{run_command}" site up --log-json "{run_folder}"
Restart=always
RestartSec=10
WatchdogSec=120
KillMode=mixed
TimeoutStopSec=60
UMask=0077
NoNewPrivileges=true
PrivateTmp=true
ProtectProc=invisible
ProtectSystem=strict
ReadWritePaths="{folder}" "-{home}"

[Install]
WantedBy=multi-user.target
"""

_COMPOSE = """# An image with fedtide installed, of the version that made this site, is yours to build and name.
services:
  fedtide-site:
    image: "${{FEDTIDE_IMAGE:?name an image with fedtide {version} installed}}"
    command: ["fedtide", "site", "up", "--log-json", "{folder}"]
    user: "${{FEDTIDE_USER:?set to uid:gid of the owner of the site}}"
    restart: always
    stop_grace_period: 60s
    read_only: true
    tmpfs: ["/tmp"]
    security_opt: ["no-new-privileges:true"]
    volumes:
      - type: bind
        source: "{folder}"
        target: "{folder}"
      - type: bind
        source: "{home}"
        target: "{home}"
    environment:
      FEDTIDE_HOME: "{home}"
"""


def write_units(folder: Path, final: Path) -> None:
    """Writes both into `folder`/units, for a site that is to stand in `final` and belong to who runs this."""
    from importlib.metadata import version

    where = folder / UNITS
    where.mkdir(mode=0o700)
    facts = {
        "folder": final,
        "home": home().absolute(),
        "user": getpass.getuser(),
        "command": Path(sys.executable).with_name("fedtide"),
        "version": version("fedtide"),
    }
    # systemd takes % for a specifier, and in a command $ for a variable; compose takes $ for one everywhere.
    unit = {name: str(fact).replace("%", "%%") for name, fact in facts.items()}
    run = {f"run_{name}": fact.replace("$", "$$") for name, fact in unit.items()}
    compose = {name: str(fact).replace("$", "$$") for name, fact in facts.items()}
    (where / UNIT).write_text(_UNIT.format(**unit, **run), encoding="utf-8")
    (where / COMPOSE).write_text(_COMPOSE.format(**compose), encoding="utf-8")
