"""`fedtide`: a table from command to module, each imported when it is called.

Nothing heavy is imported here, so that `fedtide --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core
from click import UsageError
from typer.core import TyperGroup

typer.core.HAS_RICH = False  # or plain help has marks of rich's in it, as in "\[default: 10]" (typer 0.20)

COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("common.planning_cli:app", "Turn public numbers into a plan, and say what to expect of it."),
    "simulate": ("simulations.cli:simulate_app", "Train one model across simulated sites on this machine."),
    "compare": ("simulations.compare_cli:app", "Hold finished simulations against one another."),
    "sweep": (
        "simulations.sweep_cli:app",
        "Simulate at several epsilons and seeds: the privacy-utility curve.",
    ),
    "site": ("client.cli:app", "A data site: make it, see its budget, verify its ledger, withdraw."),
    "server": ("server.cli:app", "The coordinator: make it, run it, enrol sites, run plans."),
    "audit": ("simulations.audit.cli:app", "Check what a run says about privacy, receipt by receipt."),
    "recommend": ("server.recommend_cli:app", "Recommend items for a history, with a run's model."),
    "predict": ("server.recommend_cli:predict_app", "Say how likely some items are, with a run's model."),
    "segments": ("client.interests_cli:segments_app", "Group a site's users by interest, at the site."),
    "drift": ("client.interests_cli:drift_app", "Plot one user's interest over time, at the site."),
    "feedback": ("client.interests_cli:feedback_app", "Adapt a site's own copy of a model to feedback."),
    "data": ("simulations.data_cli:app", "Fetch public data sets and language models, verified."),
}
"""Command -> (module:attribute of its typer app, help line)."""


class _Table(TyperGroup):
    """Commands by name; a module is imported when its command is called, or its own help asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        asked = args[0]
        if asked not in COMMANDS and not asked.startswith(
            "-"
        ):  # click's own words know commands that are imported
            from difflib import get_close_matches

            near = get_close_matches(asked, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UsageError(f"No such command {asked!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        target, help_line = COMMANDS[cmd_name]
        if ctx.resilient_parsing or ctx.params.get("_listing"):
            return None
        module, _, attribute = target.partition(":")
        command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
        command.name = cmd_name
        command.help = command.help or help_line
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


app = typer.Typer(
    cls=_Table,
    no_args_is_help=True,
    suggest_commands=False,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Federated, user-level differentially private models of how users' interests move.",
)


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"fedtide {version('fedtide')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version, and end."),
    ] = False,
) -> None:
    """Federated, user-level differentially private models of how users' interests move."""


class UserError(Exception):
    """Ends a command with a one-line message and exit code 2."""


class InterruptError(Exception):
    """Ends a command that was interrupted: what is done, then on a line of its own how to go on."""


def known_errors() -> tuple[type[BaseException], ...]:
    """Errors whose message is written for the person at the keyboard, of the modules imported by now."""
    names = {
        "common.assets": ("AssetError",),
        "common.backup": ("BackupError",),
        "common.bundle": ("BundleError",),
        "common.config": ("PlanError",),
        "common.finished": ("FinishedError",),
        "common.events.schema": ("LogError",),
        "common.events.histories": ("HistoriesError",),
        "common.events.deidentify": ("SecretError",),
        "common.models.model_folder": ("LanguageModelError",),
        "common.privacy.accountants": ("ContradictionError",),
        "common.privacy.faults": ("ReceiptError",),
        "client.ledger_errors": ("LedgerError",),
        "client.agent": ("AgentError",),
        "client.connection": ("ConnectionSetupError",),
        "client.feedback": ("FeedbackError",),
        "client.interests": ("InterestsError",),
        "client.policy": ("PolicyError",),
        "client.private_files": ("LoosePermissionsError",),
        "client.server_key": ("NoServerKeyError",),
        "client.site_folder": ("SiteError",),
        "server.deployment": ("DeploymentError",),
        "server.launch": ("LaunchError",),
        "server.registry": ("RegistryError",),
        "server.recommending": ("HistoryError",),
        "server.runs": ("RunError",),
        "simulations.audit.canary_plan": ("CanaryError",),
        "simulations.audit.recovery": ("AttackError",),
        "simulations.audit.page": ("PageError",),
    }
    found: list[type[BaseException]] = [UserError]
    for module, classes in names.items():
        loaded = sys.modules.get(module)
        found += [getattr(loaded, name) for name in classes if loaded is not None and hasattr(loaded, name)]
    return tuple(found)


_INTERRUPTED = 130


def _say_interrupted() -> None:
    print("interrupted: what was begun is not finished, and is marked so", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `fedtide` command."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(_INTERRUPTED)
    except SystemExit as end:  # typer turns an interrupt into this
        if end.code == _INTERRUPTED:
            _say_interrupted()
        raise
    except InterruptError as end:
        print(f"interrupted: {end}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except BaseException as error:
        if not isinstance(error, known_errors()):
            raise
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    from common.cli import main as main_of_module  # whose errors are those that commands raise

    main_of_module()
