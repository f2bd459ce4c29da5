"""The systemd units and the compose file of a server: SuperLink and SuperExec, each restarted when it ends."""

from __future__ import annotations

import getpass

from common.assets import home
from server.deployment import Deployment


def unit_files(server: Deployment, executable: str) -> dict[str, str]:
    """File name -> text.

    Args:
        executable: the `fedtide` command, with its whole path.
    """
    return {
        "fedtide-server.service": _service(server, executable),
        "compose.yaml": _compose(server),
    }


def _service(server: Deployment, executable: str) -> str:
    """One unit: `fedtide server up` watches both processes, and systemd watches it, with a watchdog where it hangs."""
    return f"""\
# Copy it to /etc/systemd/system, then `systemctl enable --now fedtide-server`.
[Unit]
Description=Fedtide server (SuperLink and SuperExec)
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User={getpass.getuser()}
Environment={_quoted(f"FEDTIDE_HOME={home()}")}
WorkingDirectory={_escaped(server.folder)}
ExecStart={_quoted(executable)} server up --log-json {_quoted(server.folder)}
Restart=always
RestartSec=5
WatchdogSec=120
TimeoutStopSec=40
KillMode=mixed
UMask=0077
NoNewPrivileges=true
PrivateTmp=true
ProtectProc=invisible
ProtectSystem=strict
LimitNOFILE=65536
MemoryMax=8G
TasksMax=4096
ReadWritePaths={_quoted(server.folder)} {_quoted(f"-{home()}")}

[Install]
WantedBy=multi-user.target
"""


def _escaped(text: object) -> str:
    """As systemd reads a setting that is one path: % begins a specifier."""
    return str(text).replace("%", "%%")


def _quoted(text: object) -> str:
    """As systemd reads a list of words: a space ends one. A folder's name has no quote or backslash."""
    escaped = _escaped(text)
    return f'"{escaped}"' if any(sign.isspace() for sign in escaped) else escaped


def _compose(server: Deployment) -> str:
    """One service: the image holds Fedtide, the folder holds all else, at the same path as outside."""
    folder, cache = (str(path).replace("$", "$$") for path in (server.folder, home()))
    return f"""\
# An image with fedtide installed is yours to build and name. Other commands on this server (enroll, run, status)
# run inside: `docker compose exec server fedtide server status "{folder}"`.
services:
  server:
    image: "${{FEDTIDE_IMAGE:?name an image with fedtide installed}}"
    user: "${{FEDTIDE_USER:?set to uid:gid of the owner of the folder}}"
    command: ["fedtide", "server", "up", "--log-json", "{folder}"]
    environment:
      FEDTIDE_HOME: "{cache}"
    restart: always
    init: true
    stop_grace_period: 40s
    read_only: true
    mem_limit: 8g
    pids_limit: 4096
    ulimits:
      nofile: 65536
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    tmpfs: [/tmp]
    volumes:
      - type: bind
        source: "{folder}"
        target: "{folder}"
      - type: bind
        source: "{cache}"
        target: "{cache}"
    ports:
      # Sites reach this one. Control and metrics stay on the container's own loopback.
      - "{server.fleet_port}:{server.fleet_port}"
"""
