"""`fedtide server`: make a server, run it, enrol sites, run plans, and see what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server import membership_cli, run_cli

if TYPE_CHECKING:
    from server.deployment import Deployment

app = typer.Typer(
    help="The coordinator: make it, run it, enrol sites, run plans.",
    no_args_is_help=True,
    suggest_commands=False,  # click does, and once is enough
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _load(folder: Path) -> Deployment:
    from server.deployment import Deployment

    return Deployment.load(folder)


@app.command()
def init(
    folder: Folder,
    host: Annotated[str, typer.Option(help="The name or address that sites reach this machine by.")],
    port: Annotated[int, typer.Option(help="For the sites, on all interfaces: open this one only.")] = 9092,
    control_port: Annotated[int, typer.Option(help="On 127.0.0.1, for the commands below.")] = 9093,
    metrics_port: Annotated[int, typer.Option(help="On 127.0.0.1, for Prometheus.")] = 9464,
    as_json: AsJson = False,
) -> None:
    """Make a server: an authority and a certificate, secrets, a registry, systemd unit and compose file."""
    from server.deployment import Deployment
    from server.hosts import checked_host
    from server.invitations import write_invitation
    from server.setup import make_server

    host = checked_host(host)
    server = Deployment(folder.expanduser().resolve(), host, port, control_port, metrics_port)
    make_server(server)
    digest = write_invitation(server).digest
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if as_json:
        made = {
            "folder": str(server.folder),
            "server": address,
            "invitation": str(server.invitation),
            "invitation_sha256": digest,
        }
        print(json.dumps(made | {"units": [str(file) for file in sorted(server.units.iterdir())]}, indent=2))
        return
    print(
        f"The server's folder is {server.folder}; keep a backup of it, as its keys and registry are not made twice."
    )
    _say_invitation(server)
    print("Give sites the invitation, and read that fingerprint to them by telephone. Next:")
    print(f"  fedtide server up {server.folder}")
    print(
        "  fedtide site init SITE --invitation invitation.json --logs LOG --catalog CATALOG ...   (at each site)"
    )


@app.command()
def invitation(folder: Folder, as_json: AsJson = False) -> None:
    """Write what sites are given, of the server as it is now, and say its fingerprint: nothing in it is secret.

    A site takes it in by `fedtide site init` or `fedtide site connect`, and both people compare the fingerprint.
    """
    from server.invitations import write_invitation

    server = _load(folder)
    if not as_json:
        _say_invitation(server)
        return
    digest = write_invitation(server).digest
    print(json.dumps({"invitation": str(server.invitation), "invitation_sha256": digest}, indent=2))


@app.command()
def up(
    folder: Folder,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log as JSON lines.")] = False,
) -> None:
    """Run the server in the foreground, until SIGINT or SIGTERM: SuperLink, SuperExec and metrics."""
    import sys

    from common.logs import set_up_logs
    from server.operation import operate

    set_up_logs(sys.stderr, log_json)
    operate(_load(folder))


@app.command()
def renew(
    folder: Folder,
    host: Annotated[
        str | None,
        typer.Option(help="The name or address that sites reach this machine by from now on."),
    ] = None,
    authority: Annotated[
        bool, typer.Option("--authority", help="Make a new authority, for sites to hold beside the old one.")
    ] = False,
    switch: Annotated[
        bool, typer.Option("--switch", help="Sign under the new authority: once every site has it.")
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop", help="Take the old authority out of ca.crt: once the new one is in use.")
    ] = False,
) -> None:
    """Make a new certificate for the server under the same authority; sites need nothing new.

    With --authority, --switch and --drop, one after the other, the authority itself is replaced, and no site is cut
    off.
    """
    from common.cli import UserError
    from server.hosts import checked_host
    from server.renewal import begin_authority, drop_authority, renew_certificate, switch_authority

    if sum((host is not None, authority, switch, drop)) > 1:
        raise UserError("--host, --authority, --switch and --drop are steps of their own: give one of them")
    host = None if host is None else checked_host(host)
    server = _load(folder)
    if authority and not begin_authority(server):
        _say_authority(server)
        print(
            "The server goes on under the old one. Give every site the new invitation (`fedtide site connect SITE "
            f"--invitation FILE` there); then `fedtide server renew {server.folder} --switch`."
        )
        _say_invitation(server)
        return
    if drop:
        print(f"{server.authority} holds the authority in use, and {drop_authority(server)} less.")
        return
    if authority:
        _say_authority(server)
        print("The old one has expired, so every site needs the new invitation before it can connect.")
        _say_invitation(server)
    elif switch:
        switch_authority(server)
        print("A site that has not taken the new invitation in is cut off until it has.")
    else:
        server = renew_certificate(server, host)
    _say_certificate(server)
    if host is not None:
        print("Sites that are to use the new name take the new invitation in; they need no new enrolment.")
        _say_invitation(server)


def _say_invitation(server: Deployment) -> None:
    from common.privacy.enrolment import fingerprint
    from server.invitations import write_invitation

    digest = write_invitation(server).digest
    print(f"Invitation: {server.invitation}")
    print(f"Invitation fingerprint: {fingerprint(digest)}")


def _say_authority(server: Deployment) -> None:
    from server.certificates import authorities, fingerprint_of

    new = authorities(server.authority)[-1]
    print(f"Authority, SHA-256: {fingerprint_of(new)}, until {new.not_valid_after_utc:%Y-%m-%d}")


def _say_certificate(server: Deployment) -> None:
    from server.certificates import certificate_ends, loaded, names_of

    certificate, found = loaded(server.certificate), certificate_ends(server)
    print(
        f"{server.certificate} is new, until {certificate.not_valid_after_utc:%Y-%m-%d}, for "
        f"{', '.join(names_of(certificate))}; restart `fedtide server up` to use it."
    )
    for warning in found.warnings:
        print(f"Note: {warning}.")


@app.command()
def backup(
    folder: Folder,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The copy: a folder that is not there yet.")
    ],
    as_json: AsJson = False,
) -> None:
    """Copy the server's folder so that the copy is right, while the server is up and runs are at work; check the copy.

    To restore it: end `fedtide server up`, put the copy in the folder's place, start it, and repeat the command of
    each unfinished run. The copy holds the server's keys.
    """
    from server.backup import back_up

    done = back_up(_load(folder), target)
    if as_json:
        print(json.dumps({**vars(done), "folder": str(done.folder)}, indent=2))
        return
    print(
        f"{done.folder} is a copy: {len(done.sites)} sites, {len(done.runs)} runs; every receipt was found in it."
    )
    if done.unfinished:
        print(f"Unfinished in it: {', '.join(done.unfinished)}.")
    print("Keep it as safe as the server itself: its keys are in it.")


@app.command()
def enroll(
    enrolment: Annotated[Path, typer.Argument(metavar="ENROLMENT_FILE", help="From `fedtide site init`.")],
    name: Annotated[str, typer.Option(help="What the site is to be called here.")],
    server: Annotated[Path | None, typer.Option(help="The server's folder.")] = None,
    registry: Annotated[
        Path | None, typer.Option(help="A registry alone, without a server; made where it is absent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take a site's key and ledger in, so that its updates may be admitted, and its node's key.

    Compare the fingerprints with the site's administrator before: whoever's keys these are will be that site. A
    site that is enrolled already under the same name and ledger may bring another node key.
    """
    from common.cli import UserError
    from server.enrolling import enroll as take_in

    if (server is None) == (registry is None):
        raise UserError("give --server with the server's folder (or, for a registry alone, --registry)")
    try:
        data = enrolment.read_bytes()
    except OSError as error:
        raise UserError(
            f"the enrolment file {enrolment} cannot be read ({error.strerror}): the site's `site init` wrote it"
        ) from error
    done = take_in(data, name, _load(server) if server else None, registry)
    if as_json:
        print(json.dumps(done.as_json(), indent=2))
        return
    print(f"Site {name} is enrolled.")
    print(f"Key fingerprint: {done.fingerprint}")
    if done.node_fingerprint:
        print(f"Node key fingerprint: {done.node_fingerprint}")
    print(f"Its guarantee to each of its users: (epsilon {done.epsilon:g}, delta {done.delta:g}) for good.")
    said = {
        "registered": "Its node is registered: the site may connect.",
        "pending": "The server is not up: `fedtide server up` will register its node.",
        "none": "The file names no node key, so no node of this site can connect: `fedtide site connect` makes it one.",
    }
    if done.node is not None:
        print(said[done.node])


for _command in (
    membership_cli.sites,
    membership_cli.remove,
    membership_cli.bar,
    membership_cli.unbar,
    run_cli.fits,
    run_cli.run,
    run_cli.discard,
):
    app.command()(_command)


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show sites, when they were last heard of, runs, rounds, bytes and refusals; the server may be down."""
    from rich.console import Console

    from server.overview import overview
    from server.status import print_overview

    found = overview(_load(folder))
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print_overview(Console(), found)
