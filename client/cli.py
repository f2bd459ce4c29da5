"""`fedtide site`: make a site, see what its budget has come to, verify its ledger, withdraw.

What is printed here is for the site's own administrator: counts of users and events must not leave the site.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from client.upkeep_cli import app as upkeep
from common import columns as reading

if TYPE_CHECKING:
    from common.invitation import Invitation

app = typer.Typer(
    help="A data site: its folder, its privacy ledger, its budget.",
    no_args_is_help=True,
    suggest_commands=False,  # click does, and once is enough
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(upkeep)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


InvitationFile = Annotated[
    Path | None,
    typer.Option("--invitation", help="The server's invitation.json; compare its fingerprint by telephone."),
]


def _invited(file: Path | None) -> Invitation | None:
    from client.connection import read_invitation

    return None if file is None else read_invitation(file)


def _say_invitation(invitation: Invitation) -> None:
    from common.privacy.enrolment import fingerprint

    print(f"Invitation fingerprint: {fingerprint(invitation.digest)}")
    print(
        "Compare it with the server's owner by telephone before the site goes up: whoever's key stands in the "
        "invitation can spend what the policy allows."
    )


@app.command()
def init(
    folder: Folder,
    logs: Annotated[Path, typer.Option(help="The behaviour log: a file, or a folder of parts.")],
    catalog: Annotated[Path, typer.Option(help="The public catalog: it must say nothing about any user.")],
    epsilon: Annotated[float, typer.Option(help="All that may ever be spent on this data.")],
    delta: Annotated[float, typer.Option(help="Far below 1/users.")],
    users_at_least: Annotated[int, typer.Option(help="Public lower bound of users: sums are divided by it.")],
    typical_plan: Annotated[
        Path | None, typer.Option(help="A run's plan that the budget is to serve best; else the default's.")
    ] = None,
    name: Annotated[str, typer.Option(help="For this site's own logs; else the folder's name.")] = "",
    format: reading.LogFormat = "auto",
    columns: reading.LogColumns = None,
    separator: reading.LogSeparator = None,
    quotes: reading.LogQuotes = "auto",
    encoding: reading.LogEncoding = "auto",
    time_format: reading.LogTimes = None,
    yes: reading.Sure = False,
    catalog_format: reading.CatalogFormat = "auto",
    catalog_columns: reading.CatalogColumns = None,
    catalog_separator: reading.CatalogSeparator = None,
    catalog_quotes: reading.CatalogQuotes = "auto",
    catalog_encoding: reading.CatalogEncoding = "auto",
    family: Annotated[
        list[str] | None, typer.Option(help="A model family that may be trained here; may be repeated.")
    ] = None,
    minimum_events: Annotated[int, typer.Option(help="Users with fewer are left out.")] = 3,
    max_events_per_user: Annotated[int, typer.Option(help="Users with more are taken for robots.")] = 10_000,
    invitation: InvitationFile = None,
    language_model: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER: a language model that a plan may name, and where it is; may be repeated."
        ),
    ] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="Noisy metrics may be released.")] = False,
    engine: Annotated[str | None, typer.Option(help="Of a step: fast, or opacus: Opacus' own hooks.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, which is the default; cuda; or auto: cuda where it is.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of the arithmetic; else as many as cores, four at most.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Users computed at once: a step's memory follows it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a site: clean and de-identify its log, open its ledger, and write the file that enrols it.

    The folder gets mode 0700. The budget given here is the only one that this data will ever have.
    """
    from rich.console import Console

    from client.init_options import admitted, model_folders, typical_events
    from client.long_work import long_work
    from client.making import ENROLMENT, make_site
    from client.policy import POLICY, performance_of
    from client.sources import Sources
    from common.cli import UserError
    from common.events.cleaning import CleaningPolicy
    from common.privacy.enrolment import fingerprint, node_fingerprint

    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda: there is no accelerator that torch can use here; give --device auto, or cpu"
            )
    try:
        with long_work() as progress:
            made = make_site(
                folder,
                Sources(
                    logs,
                    catalog,
                    format,
                    reading.column_mapping(columns, "--columns"),
                    reading.text_layout(separator, quotes, encoding),
                    catalog_format,
                    reading.column_mapping(catalog_columns, "--catalog-columns"),
                    reading.text_layout(catalog_separator, catalog_quotes, catalog_encoding, "catalog-"),
                    time_format,
                    yes,
                ),
                epsilon=epsilon,
                delta=delta,
                users_at_least=users_at_least,
                typical_plan=(events := typical_events(typical_plan, epsilon, delta, users_at_least)),
                name=name,
                families=tuple(family or ("recommend",)),
                policy=CleaningPolicy(minimum_events=minimum_events, max_events_per_user=max_events_per_user),
                metrics=metrics,
                language_models=model_folders(language_model),
                performance=performance_of(
                    engine=engine, device=device, threads=threads, micro_batch=micro_batch
                ),
                invitation=(invited := _invited(invitation)),
                progress=progress,
            )
    except ValueError as error:
        if type(error) is ValueError:  # a checked argument of a plain function: its message is for the person
            raise UserError(str(error)) from error
        if type(error).__name__ == "ValidationError":  # of the policy that was asked for
            from client.policy import Limits, fault_lines

            raise UserError(fault_lines(error, Limits, "a policy")) from error  # type: ignore[arg-type]
        raise
    site = made.site
    typical = admitted(site, events)
    if as_json:
        facts = {
            "folder": str(site.folder),
            "key_id": made.key_id,
            "enrolment": str(site.folder / ENROLMENT),
            "typical_runs_admitted": typical.runs,
            "notes": list(made.notes),
            "node_key": made.node_key,
            "invitation_sha256": None if invited is None else invited.digest,
        }
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    console.print(made.report.table())
    for sentence in made.report.sentences():
        console.print(f"Note: {sentence}.", style="yellow", highlight=False)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for note in made.notes:
        say(f"Note: {note}.")
    say(f"Site {site.name} is made in {site.folder}")
    say(f"Key fingerprint: {fingerprint(made.key_id)}")
    if made.node_key is not None:
        say(f"Node key fingerprint: {node_fingerprint(made.node_key)}")
    if invited is not None:
        _say_invitation(invited)
    say(f"Guarantee: (epsilon {epsilon:g}, delta {delta:g}) for each user, whatever is run on this data.")
    say(typical.sentence())
    say(f"Hand {site.folder / ENROLMENT} to the server: `fedtide server enroll` (nothing in it is secret).")
    say(f"What may run here stands in {site.folder / POLICY}: read it, and narrow it as you like.")
    if made.node_key is not None:
        say(
            f"Next, once it is enrolled: `fedtide site check {site.folder}`, then `fedtide site up {site.folder}`."
        )
    say(f"Keep {site.folder / 'secret'} and the ledger backed up together; a budget does not reset.")


@app.command()
def connect(folder: Folder, invitation: InvitationFile = None) -> None:
    """Take a server's invitation, or give the site a new node key; its ledger and data stay as they are.

    With --invitation the site keeps its node key, if it has one: of the same server, nothing is to be enrolled again.
    Without, it gets a new one, and the server enrols the new enrolment.json under the site's old name.
    """
    from client.making import ENROLMENT, connect_site
    from common.privacy.enrolment import node_fingerprint

    invited = _invited(invitation)
    node_key, is_new = connect_site(folder, invited)
    if invited is not None:
        print(f"The site's server is {invited.host}, port {invited.port}.")
        _say_invitation(invited)
    print(f"Node key fingerprint: {node_fingerprint(node_key)}{'' if is_new else ', as before'}")
    if is_new:
        print(
            f"Hand {folder / ENROLMENT} to the server: `fedtide server enroll` under the site's name; then "
            f"`fedtide site check {folder}`."
        )
    else:
        print(
            f"Next: `fedtide site check {folder}`. A server that has not enrolled this site needs "
            f"{folder / ENROLMENT}."
        )


@app.command()
def status(
    folder: Folder,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the burn-down as a PNG, too.")] = None,
) -> None:
    """Say how much of the budget is spent, and draw how it burnt down."""
    from client.authority import authority_warning
    from client.burn_down import draw, facts, show
    from client.ledger import Ledger
    from client.site_folder import Site

    site = Site.load(folder)
    with Ledger.open(site.ledger_folder) as ledger:
        found = ledger.status()
    warning = authority_warning(folder)
    if plot is not None:
        draw(found, site.name, plot)
    if as_json:
        print(json.dumps(facts(site.name, found) | {"warnings": [warning] if warning else []}, indent=2))
    else:
        show(site.name, found)
        if warning:
            print(f"Warning: {warning}.")
        if plot is not None:
            print(f"The burn-down is drawn in {plot}")


@app.command()
def check(folder: Folder, as_json: AsJson = False) -> None:
    """Test all that the site needs, from the way to the server to a training step, and spend nothing.

    Exit code 1 when something does not hold. Counts of users are shown here only.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from client.check import check_site

    console = Console(stderr=as_json)
    with console.status("checking …") as status:

        def tell(what: str, done: int, of: int | None) -> None:
            status.update(f"checking … {what}" + (f" {done / of:.0%}" if of else ""))

        findings = list(check_site(folder.expanduser().resolve(), tell))
    if as_json:
        print(json.dumps([vars(each) for each in findings], indent=2))
    else:
        table = Table(title=f"the site in {escape(str(folder))}")
        for column in ("", "test", "found", "the way out"):
            table.add_column(column, overflow="fold")
        signs = {True: "[green]✓[/]", False: "[red]✗[/]", None: "?"}
        for each in findings:
            table.add_row(signs[each.holds], each.name, escape(each.said), escape(each.way_out))
        console.print(table)
    if any(each.holds is False for each in findings):
        raise typer.Exit(1)


@app.command()
def budget(
    folder: Folder,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two looks.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Say what is left of the budget, and how many more rounds like the last one fit in it."""
    from client.budget import facts, show, watch_budget
    from client.site_folder import Site

    site = Site.load(folder)
    if watch:
        watch_budget(site, every)
    elif as_json:
        print(json.dumps(facts(site), indent=2))
    else:
        show(site)


@app.command()
def up(
    folder: Folder,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of loopback, for Prometheus; 0 for any free one.")
    ] = 0,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
) -> None:
    """Run the site in the foreground: connect to the server, answer what the policy allows, until Ctrl-C.

    What dies is started again. Everything ends with this command.
    """
    from client.agent import Agent

    Agent(folder, metrics_port).run(sys.stderr, as_json=log_json)


@app.command()
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Verify the whole ledger: every entry, signature, charge and anchor, and the data it began with.

    Exit code 1, naming the fault, when something does not hold.
    """
    from client.ledger import Ledger
    from client.ledger_errors import LedgerBehindError, LedgerDamagedError, MarkLostError
    from client.long_work import long_work
    from client.making import data_unchanged
    from client.site_folder import Site
    from common.privacy.faults import ReceiptError

    site = Site.load(folder)
    try:
        with Ledger.open(site.ledger_folder) as ledger:
            report = ledger.verify()
            committed = ledger.genesis.dataset_commitment
    except (ReceiptError, LedgerDamagedError, LedgerBehindError, MarkLostError) as error:
        _refuse(site.name, error.reason, str(error), as_json)
    with long_work() as progress:
        unchanged = data_unchanged(site, committed, progress)
    if unchanged is False:
        _refuse(site.name, "other_data", "the histories are not those that the ledger began with", as_json)
    facts = {
        "site": site.name,
        "verified": True,
        "entries": report.seq + 1,
        "head": report.head,
        "reserved": report.reserved,
        "released": report.released,
        "burnt": report.burnt,
        "open": report.open,
        "anchors": report.anchors,
        "share_spent": report.spent / report.cap,
        "withdrawn": report.closed,
        "data_unchanged": unchanged,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(
        f"Site {site.name}: {report.seq + 1} entries verify: {report.reserved} charges, {report.released} "
        f"released, {report.burnt} burnt, {report.open} open, {report.anchors} anchors."
    )
    print(f"Head: entry {report.seq}, {report.head}")
    if unchanged:
        print("The histories are those that the ledger began with.")


def _refuse(name: str, reason: str, explanation: str, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"site": name, "verified": False, "reason": reason, "explanation": explanation}))
    else:
        print(f"Site {name}: FAULT {reason}: {explanation}")
    raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The site's folder; else this one.")] = Path(
        "."
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes; else site-report.html.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the site's own page, over all its runs: promised, spent, released to whom, left, and what stays on disk.

    From the ledger alone, which is verified: exit code 1, naming the fault, when it does not hold. The page holds
    nothing about a user. With --json, the page is written only where --output says.
    """
    from client.ledger_errors import LedgerBehindError, LedgerDamagedError, MarkLostError
    from client.site_page import page
    from client.site_report import sentences, site_report
    from common.cli import UserError
    from common.privacy.faults import ReceiptError

    folder = folder.expanduser().resolve()
    try:
        found = site_report(folder)
    except (ReceiptError, LedgerDamagedError, LedgerBehindError, MarkLostError) as error:
        _refuse(folder.name, error.reason, str(error), as_json)
    file = output or (None if as_json else Path("site-report.html"))
    if file is not None:
        try:
            file.write_text(page(found), encoding="utf-8")
        except OSError as error:
            raise UserError(f"the page {file} cannot be written ({error.strerror}): give --output") from error
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    for name, said in sentences(found).items():
        print(f"{name.capitalize()}: {said}")
    print(f"The page is in {file}")


@app.command()
def withdraw(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    certificate: Annotated[
        Path | None, typer.Option(help="Where the certificate goes; else closing.json in the folder.")
    ] = None,
) -> None:
    """Withdraw for good: nothing more may ever be reserved or released from this data.

    What was released stays released. The certificate, signed by the site, says in words and figures what was spent
    in all; anyone verifies it with `fedtide audit certificate`.
    """
    from client.ledger import Ledger
    from client.making import CERTIFICATE
    from client.site_folder import Site
    from common.cli import UserError

    site = Site.load(folder)
    file = certificate or site.folder / CERTIFICATE
    with Ledger.open(site.ledger_folder) as ledger:
        if not yes and not typer.confirm(
            f"Withdraw site {site.name} for good? Its ledger closes, and no command opens it again"
        ):
            raise UserError("nothing was done: the site has not withdrawn")
        closing = ledger.withdraw()
    closing.verify()
    try:
        file.write_bytes(closing.to_bytes())
    except OSError as error:
        raise UserError(
            f"the site has withdrawn, but the certificate {file} cannot be written ({error.strerror}): "
            "run the command again with --certificate"
        ) from error
    print(f"Site {site.name} has withdrawn. Certificate: {file}")
    for sentence in closing.in_words():
        print(f"  {sentence}")
    print(f"Nothing was deleted. What is left on disk, and how to delete it: `fedtide site report {folder}`")
