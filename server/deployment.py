"""A server's folder: what lies where, on which ports it listens, and the environment of its processes.

The folder is made by `setup.py`, run by `operation.py`, and read by whoever asks the server something.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FLEET_PORT, CONTROL_PORT, METRICS_PORT = 9092, 9093, 9464

_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


class DeploymentError(ValueError):
    """A server's folder is not in order, or what was asked of the server cannot be; the message says what to do."""


class NotRunningError(DeploymentError):
    """The server does not answer."""


@dataclass(frozen=True)
class Deployment:
    """Where a server keeps what.

    Attributes:
        folder: of the server, mode 0700, absolute.
        host: the name or address that sites reach it by.
        fleet_port: for the sites, on all interfaces: it carries nothing else.
        control_port: on 127.0.0.1 alone; who reaches it can start runs.
        metrics_port: on 127.0.0.1 alone, for Prometheus.
    """

    folder: Path
    host: str
    fleet_port: int = FLEET_PORT
    control_port: int = CONTROL_PORT
    metrics_port: int = METRICS_PORT

    def __post_init__(self) -> None:
        if not _is_address(self.host) and not _HOST.fullmatch(self.host):
            raise DeploymentError(
                f"--host {self.host!r} is no name and no address: give what sites reach this machine by, "
                "such as fedtide.example.org, without a port"
            )
        for name, port in self.ports().items():
            if not 1 <= port <= 65535:
                raise DeploymentError(f"the {name} port is {port}, but must be from 1 to 65535")
        if len(set(self.ports().values())) < len(self.ports()):
            said = ", ".join(f"{name} {port}" for name, port in self.ports().items())
            raise DeploymentError(f"each port must be another one (given: {said})")

    @classmethod
    def load(cls, folder: Path) -> Deployment:
        """The server whose folder this is.

        Raises:
            DeploymentError: it is not in order.
        """
        folder = folder.expanduser().resolve()
        try:
            fields = tomllib.loads((folder / "server.toml").read_text(encoding="utf-8"))
            ports = {f"{name}_port": fields["ports"][name] for name in ("fleet", "control", "metrics")}
            if not all(type(port) is int for port in ports.values()):
                raise TypeError
            return cls(folder, str(fields["host"]), **ports)
        except FileNotFoundError as error:
            raise DeploymentError(
                f"{folder} holds no server: make one with `fedtide server init {folder} --host NAME`"
            ) from error
        except OSError as error:
            raise DeploymentError(f"{folder}/server.toml cannot be read ({error.strerror})") from error
        except (KeyError, TypeError, tomllib.TOMLDecodeError) as error:
            raise DeploymentError(
                f"{folder}/server.toml is damaged: it needs host, and fleet, control and metrics under [ports]"
            ) from error

    def ports(self) -> dict[str, int]:
        """Name -> port."""
        return {"fleet": self.fleet_port, "control": self.control_port, "metrics": self.metrics_port}

    def to_toml(self) -> str:
        """The text of `server.toml`."""
        ports = "\n".join(f"{name} = {port}" for name, port in self.ports().items())
        return f'# Written by `fedtide server init`.\nhost = "{self.host}"\n\n[ports]\n{ports}\n'

    @property
    def control(self) -> str:
        return f"127.0.0.1:{self.control_port}"

    @property
    def authority(self) -> Path:
        """The certificate of the authority: what sites are given."""
        return self.folder / "tls" / "ca.crt"

    @property
    def invitation(self) -> Path:
        """What sites are given: where the server is, and how it is known."""
        return self.folder / "invitation.json"

    @property
    def authority_key(self) -> Path:
        return self.folder / "tls" / "ca.key"

    @property
    def next_authority_key(self) -> Path:
        """Of a new authority, until the server's certificate is under it."""
        return self.folder / "tls" / "next-ca.key"

    @property
    def certificate(self) -> Path:
        return self.folder / "tls" / "server.crt"

    @property
    def key(self) -> Path:
        return self.folder / "tls" / "server.key"

    @property
    def secret(self) -> Path:
        """What SuperExec shows to SuperLink, so that nobody else fetches runs."""
        return self.folder / "superexec.secret"

    @property
    def database(self) -> Path:
        return self.folder / "state.db"

    @property
    def registry(self) -> Path:
        return self.folder / "registry"

    @property
    def nodes(self) -> Path:
        """Public node keys of enrolled sites, NAME.pub."""
        return self.folder / "nodes"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def units(self) -> Path:
        return self.folder / "units"

    @property
    def flower_home(self) -> Path:
        return self.folder / "flwr"

    def environment(self) -> dict[str, str]:
        """For Flower's processes: their home here, nothing fetched, nothing reported, no proxy to this machine."""
        local = "127.0.0.1,localhost"
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FLWR_HOME": str(self.flower_home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "NO_PROXY": local,
            "no_proxy": local,
        }

    def superlink_command(
        self, program: Sequence[str] = (sys.executable, "-m", "server.superlink")
    ) -> list[str]:
        """What starts SuperLink behind its guard: the Fleet API for all, everything else on loopback."""
        return [
            *program, "--host", "127.0.0.1", "--port", str(self.control_port),
            "--fleet-api-address", f"0.0.0.0:{self.fleet_port}",
            "--ssl-ca-certfile", str(self.authority), "--ssl-certfile", str(self.certificate),
            "--ssl-keyfile", str(self.key),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            "--database", str(self.database), "--isolation", "process",
            "--superexec-auth-secret-file", str(self.secret),
        ]  # fmt: skip

    def superexec_command(self) -> list[str]:
        """What starts SuperExec, which starts a process for each run."""
        return [sys.executable, "-m", "server.superexec", str(self.folder)]

    def check_private(self) -> None:
        """Raises `DeploymentError` if anyone but the owner has a right on the keys, or one is missing."""
        for path in (self.folder, self.authority_key, self.next_authority_key, self.key, self.secret):
            if path == self.next_authority_key and not path.exists():
                continue
            try:
                mode = stat.S_IMODE(path.stat().st_mode)
            except OSError as error:
                raise DeploymentError(
                    f"{path} is missing ({error.strerror}): restore it from a backup"
                ) from error
            if mode & 0o077:
                wanted = "700" if path.is_dir() else "600"
                raise DeploymentError(
                    f"{path} has mode {mode:o}, so that others may use it: run `chmod {wanted} {path}`"
                )

    def running(self) -> bool:
        """Whether a `fedtide server up` holds this folder."""
        with open_locked(self.folder / "up.lock") as mine:
            return not mine

    def answers(self) -> bool:
        """Whether SuperLink answers on both its ports, with a certificate that the authority signed."""
        import ssl
        import urllib.request

        context = ssl.create_default_context(cafile=str(self.authority))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(f"https://{self.control}/health", timeout=5):
                pass
            with socket.create_connection(("127.0.0.1", self.fleet_port), timeout=5):
                return True
        except OSError:
            return False


@contextmanager
def open_locked(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Holds a file's lock inside, if it is free within some seconds: whether it was. Dropped when its holder dies."""
    end = time.monotonic() + patience
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        while not (mine := _lock(descriptor)) and time.monotonic() < end:
            time.sleep(0.1)
        yield mine
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_address(text: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
