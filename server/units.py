"""The systemd units and the compose file of a server: SuperLink and SuperExec, each restarted when it ends."""

from __future__ import annotations

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
    """One unit: `fedtide server up` watches both processes, and systemd watches it."""
    return f"""\
# systemd unit of a Fedtide server: copy it to /etc/systemd/system, set User=, then
# `systemctl enable --now fedtide-server`.
[Unit]
Description=Fedtide server (SuperLink and SuperExec)
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User=fedtide
WorkingDirectory={_quoted(server.folder)}
ExecStart={_quoted(executable)} server up {_quoted(server.folder)}
Restart=always
RestartSec=5
TimeoutStopSec=40
KillMode=control-group
UMask=0077
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ReadWritePaths={_quoted(server.folder)}

[Install]
WantedBy=multi-user.target
"""


def _quoted(text: object) -> str:
    """As systemd reads it: % begins a specifier there, and a space ends a word."""
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if any(sign.isspace() for sign in escaped) else escaped


def _compose(server: Deployment) -> str:
    """One service: the image holds Fedtide, the folder holds all else, at the same path as outside."""
    folder = str(server.folder).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f"""\
# For `docker compose up -d` or `podman compose up -d`; FEDTIDE_IMAGE is an image with Fedtide installed,
# FEDTIDE_USER the uid:gid that owns the folder.
services:
  server:
    image: ${{FEDTIDE_IMAGE:-fedtide:latest}}
    user: "${{FEDTIDE_USER:-1000:1000}}"
    command: ["fedtide", "server", "up", "{folder}"]
    restart: always
    init: true
    stop_grace_period: 40s
    read_only: true
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    tmpfs: [/tmp]
    volumes:
      - type: bind
        source: "{folder}"
        target: "{folder}"
    ports:
      # Sites reach this one. Control and metrics stay on the container's own loopback.
      - "{server.fleet_port}:{server.fleet_port}"
"""
