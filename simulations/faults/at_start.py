"""What is wrong when a site or a server is started: it says so and does not start; the others' run goes on."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.certificates import new_authority, new_server_certificate
from simulations.faults.judging import charges, mark
from simulations.faults.place import OTHERS, SITES, VICTIM, FaultError, Place, free_ports
from simulations.faults.rows import Fault, Shown, found, wait_for, whole_run


def _checked(place: Place, site: str, pattern: str, **extra: str) -> str:
    done = place.fedtide("site", "check", place.folder / site, "--json", inside=site == VICTIM, extra=extra)
    if done.returncode != 1:
        return ""
    import json

    for each in json.loads(done.stdout):
        said = f"{each['name']}: {each['said']}: {each['way_out']}"
        if each["holds"] is False and found(said, pattern):
            return f"`site check`: {said}"
    return ""


def _while_down(place: Place, name: str, check: str, up: str, **extra: str) -> Shown:
    """The victim is checked and started with a fault, and stays out of a run of the others."""
    place.up[VICTIM].end()
    checked = _checked(place, VICTIM, check, **extra)
    running = place.start_site(VICTIM, **extra)
    try:
        before = whole_run(place, name)
        said = wait_for(place, running, up)
    finally:
        running.end()
    return Shown(name, before, [checked, f"`site up`: {said}" if said else ""])


def _back(place: Place) -> None:
    place.start_site(VICTIM)
    place.wait_online(VICTIM)


def wrong_authority(place: Place) -> Shown:
    """The victim holds another authority's certificate."""
    file = place.folder / VICTIM / "ca.crt"
    kept = file.read_bytes()
    file.write_bytes(new_authority()[0])
    try:
        return _while_down(
            place, "wrong-ca", "does not come from ca.crt: ask", "does not fit ca.crt.*site check"
        )
    finally:
        file.write_bytes(kept)
        _back(place)


def not_enrolled(place: Place) -> Shown:
    """A site that nobody enrolled comes up beside the others."""
    name = "stranger"
    place.make_site(name)
    checked = _checked(place, name, "does not know this node's key.*fedtide server enroll")
    running = place.start_site(name)
    before = whole_run(place, "not-enrolled")
    said = wait_for(place, running, "does not know this node's key.*fedtide server enroll")
    running.end()
    spent = charges(place.folder / name / "ledger", (place.run_folder("not-enrolled") or Path()).name)
    note = "the stranger was asked nothing" if not spent else "the stranger was charged"
    return Shown("not-enrolled", before, [checked, f"`site up`: {said}" if said else ""], SITES, note)


def shifted_clock(folder: Path) -> Path:
    """Makes the library that shifts a process's clock.

    Raises:
        FaultError: there is no C compiler.
    """
    source, library = Path(__file__).with_name("clock.c"), folder / "clock.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FaultError(
            f"the shifted clock needs a C compiler ({error}): `apt install gcc libc6-dev`"
        ) from error
    return library


def wrong_clock(place: Place, shift: int) -> Shown:
    """The victim's clock is off: `site check` measures it, `site up` names it."""
    extra = {"LD_PRELOAD": str(shifted_clock(place.folder)), "FEDTIDE_CLOCK_SHIFT": str(shift)}
    way = "ahead" if shift > 0 else "behind"
    try:
        return _while_down(
            place,
            f"clock-{way}",
            rf"clock: .*{way}.*: set both clocks by NTP",
            "clock.*NTP.*site check",
            **extra,
        )
    finally:
        _back(place)


@contextmanager
def _shown_certificate(certificate: bytes, key: bytes, folder: Path, host: str) -> Iterator[int]:
    """A listener that shows a certificate; its port."""
    for name, data in (("shown.crt", certificate), ("shown.key", key)):
        (folder / name).write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "shown.crt", folder / "shown.key")
    with socket.create_server((host, 0)) as listening:
        stop = threading.Event()

        def serve() -> None:
            listening.settimeout(0.2)
            while not stop.is_set():
                try:
                    context.wrap_socket(listening.accept()[0], server_side=True).close()
                except OSError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            stop.set()
            thread.join()


def expired_certificate(place: Place) -> Shown:
    """The server's certificate has run out: it does not start; renewed, it does, and the sites come back alone."""
    tls = place.server / "tls"
    expired, key = new_server_certificate(
        (tls / "ca.crt").read_bytes(), (tls / "ca.key").read_bytes(), place.host, days=-1
    )
    connection = place.folder / VICTIM / "connection.json"
    kept = connection.read_text()
    with _shown_certificate(expired, key, place.folder, place.host) as port:
        connection.write_text(kept.replace(str(place.ports[0]), str(port)))
        checked = _checked(
            place, VICTIM, "certificate expired on .*the server's owner runs `fedtide server renew`"
        )
        connection.write_text(kept)
    place.up["server"].end()
    (tls / "server.crt").write_bytes(expired)
    (tls / "server.key").write_bytes(key)
    refused = place.fedtide("server", "up", place.server)
    said = found(refused.stderr, "fedtide server renew") if refused.returncode else ""
    place.well("server", "renew", place.server)
    place.start_server()
    place.wait_online(*SITES)
    before = whole_run(place, "expired")
    return Shown(
        "expired",
        before,
        [checked, f"`server up`: {said}" if said else ""],
        SITES,
        "all sites came back by themselves",
    )


def new_authority_in_steps(place: Place) -> Shown:
    """The server's authority is replaced in its three steps; after each, every site is connected."""
    said = place.well("server", "renew", place.server, "--authority")
    place.up["server"].end()
    place.start_server()
    place.wait_online(*SITES)  # none has the new one yet
    for name in SITES:
        place.up[name].end()
        place.well("site", "connect", place.folder / name, "--invitation", place.server / "invitation.json")
        place.start_site(name)
    place.wait_online(*SITES)  # under the old one still
    place.well("server", "renew", place.server, "--switch")
    place.up["server"].end()
    place.start_server()
    place.wait_online(*SITES)
    drop = ("server", "renew", place.server, "--drop")
    place.until(lambda: not place.fedtide(*drop).returncode, "the end of the old authority", 1.0)
    before = whole_run(place, "authority")
    return Shown(
        "authority",
        before,
        [f"`server renew --authority`: {found(said, 'goes on under the old one')}"],
        SITES,
        "all sites were connected after each step, and none got a new node key",
    )


def second_server(place: Place) -> str:
    """A second server wants the first one's port; what it says."""
    second = place.folder / "second"
    shutil.rmtree(second, ignore_errors=True)
    one, other = free_ports(2)
    place.well(
        "server", "init", second, "--host", "127.0.0.1", "--port", place.ports[0],
        "--control-port", one, "--metrics-port", other,
    )  # fmt: skip
    refused = place.fedtide("server", "up", second)
    return found(refused.stderr, "is in use by another process: `ss -ltnp`") if refused.returncode else ""


def port_in_use(place: Place) -> Shown:
    """A second server and a site want ports that are taken."""
    said = second_server(place)
    place.up[OTHERS[0]].end()
    metrics = place.ports[2]
    site = place.fedtide("site", "up", place.folder / OTHERS[0], "--metrics-port", metrics)
    told = (
        found(site.stderr, "is in use by another process: choose another --metrics-port")
        if site.returncode
        else ""
    )
    place.start_site(OTHERS[0])
    place.wait_online(*SITES)
    before = whole_run(place, "port")
    return Shown(
        "port", before, [f"`server up`: {said}" if said else "", f"`site up`: {told}" if told else ""], SITES
    )


def unlisted_bundle(place: Place) -> Shown:
    """The victim's list holds another bundle than the server's."""
    policy = place.folder / VICTIM / "policy.toml"
    kept = policy.read_text()
    lines = [line for line in kept.splitlines() if not line.startswith("bundles")]
    policy.write_text("\n".join([f'bundles = ["{"0" * 64}"]', *lines]) + "\n")
    try:
        before = mark(place, "bundle", SITES)
        whole_run(place, "bundle")
        said = found(
            (place.folder / VICTIM / "logs" / "site.log").read_text(), "a bundle is refused: its sha256"
        )
        folder = place.run_folder("bundle")
        at_server = found((folder / "server.log").read_text(), f"{VICTIM} is left out") if folder else ""
        spent = charges(place.folder / VICTIM / "ledger", folder.name) if folder else [None]
    finally:
        policy.write_text(kept)
    note = f"{VICTIM} was charged nothing" if not spent else f"{VICTIM} WAS CHARGED"
    return Shown(
        "bundle",
        before,
        [f"site: {said}" if said else "", f"server: {at_server}" if at_server else ""],
        OTHERS,
        note,
    )


FAULTS = (
    Fault("wrong-ca", "wrong CA at a site", wrong_authority),
    Fault("not-enrolled", "key not enrolled", not_enrolled),
    Fault("clock-ahead", "a site's clock 10 minutes ahead", lambda place: wrong_clock(place, 600)),
    Fault("clock-behind", "a site's clock 10 minutes behind", lambda place: wrong_clock(place, -600)),
    Fault("bundle", "bundle not on a site's list", unlisted_bundle),
    Fault("port", "port in use, at server and site", port_in_use),
    Fault("expired", "the server's certificate has expired", expired_certificate),
    Fault("authority", "the server's authority is replaced", new_authority_in_steps),
)
