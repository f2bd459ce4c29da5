"""`fedtide sweep`: simulations at several epsilons and seeds, in one folder that can go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.sweep import Curve, Result, Sweep

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_NOT_OF_A_SWEEP = {
    "seed": "--seeds says how many there are",
    "name": "its runs are named by epsilon and seed",
    "folds": "each run is judged by all users",
    "sites": "each run has sites of its own, with ledgers of their own",
    "resume": "--resume goes on with the whole sweep",
    "epsilon": "--epsilon lists them all",
    "runs": "--runs says where the sweep goes",
    "as_json": "--json prints the whole sweep",
}
"""Options of `simulate` that are the sweep's own: why."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sweep(
    context: typer.Context,
    epsilon: Annotated[
        str | None, typer.Option(metavar="E,E,...", help="Promises to each user, such as 1,2,4,8.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each epsilon: seeds 0, 1, ...")] = 3,
    resume: Annotated[
        str | None,
        typer.Option(metavar="SWEEP", help="Go on with a sweep: its folder, or its name under --runs."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where the sweep's folder goes.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Simulate at several epsilons, each with several seeds: the privacy-utility curve.

    Takes a plan and the options of `fedtide simulate` too, for every run. A line is printed for each run that is
    done; table, curve and JSON go to a folder under --runs. A sweep that was interrupted goes on with --resume.
    """
    from rich.console import Console

    from common.cli import InterruptError, UserError
    from server.deployment import open_locked
    from server.runs import RunError
    from server.shell_lines import command_line
    from simulations.going_on import ended_as_interrupted
    from simulations.sweep import Sweep

    if resume is not None:
        if epsilon is not None or context.args:
            raise UserError(
                "--resume goes on with what the sweep was begun with: leave --epsilon and simulate's options out"
            )
        asked = Sweep.found(resume, runs)
    else:
        _check_arguments(context.args)
        asked = Sweep.begin(runs, _epsilons(epsilon), _seeds(seeds), context.args)
    line = command_line("sweep", "--resume", asked.folder)
    console = Console(stderr=as_json)
    results: list[Result] = []
    try:
        with open_locked(asked.folder / ".lock") as mine:
            if not mine:
                raise RunError(f"another command is at work on {asked.folder}: wait for its end, or stop it")
            with ended_as_interrupted():
                _all_rows(asked, console, results)
    except (InterruptError, KeyboardInterrupt):
        raise InterruptError(
            f"{len(results)} of {len(asked.rows)} runs are done, and stay so; to go on:\n{line}"
        ) from None
    except Exception as error:
        if (
            asked.run_of(asked.rows[0]) is None and resume is None
        ):  # nothing was begun: what was asked for is wrong
            shutil.rmtree(asked.folder, ignore_errors=True)
        elif isinstance(error, RunError):
            raise RunError(f"{error}; `{line}` goes on with the sweep") from error
        raise
    curve = write_curve(asked, results)
    if as_json:
        typer.echo(json.dumps(curve.as_json()))
        return
    _show(curve, console)


def _epsilons(text: str | None) -> list[float]:
    from common.cli import UserError

    try:
        found = [float(each) for each in (text or "").split(",")]
    except ValueError:
        found = []
    if (
        not found
        or not all(0 < each < float("inf") for each in found)
        or len({f"{each:g}" for each in found}) < len(found)
    ):
        raise UserError(f"--epsilon {text!r} must list different numbers above 0, such as 1,2,4,8")
    return found


def _seeds(count: int) -> int:
    from common.cli import UserError

    if count < 1:
        raise UserError(f"--seeds is {count}, but must be at least 1")
    return count


def _simulate() -> Any:
    from simulations.cli import simulate_app

    return typer.main.get_command(simulate_app)


def _check_arguments(arguments: list[str]) -> None:
    """Raises what `simulate` would of options that it does not know, and `UserError` for those of the sweep itself."""
    from click.core import ParameterSource

    from common.cli import UserError

    with _simulate().make_context("fedtide sweep", list(arguments)) as context:
        for name, why in _NOT_OF_A_SWEEP.items():
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UserError(f"--{name.replace('as_', '')} is no option of a sweep's runs: {why}")


def _all_rows(asked: Sweep, console: Console, results: list[Result]) -> None:
    """Runs what is not whole yet, and says a line for each row that is done."""
    import logging
    from contextlib import chdir

    from server.runs import RunError
    from simulations.console import QuietWatcher
    from simulations.going_on import Call
    from simulations.sweep import Result

    logging.getLogger("fedtide.server").propagate = False  # it stands in each run's server.log
    if not Path(asked.given_in).is_dir():
        raise RunError(
            f"the sweep was begun in {asked.given_in}, which is gone: make it again, with what lay there"
        )
    for number, row in enumerate(asked.rows, 1):
        run = asked.run_of(row)
        if run is None or not run.is_whole:
            watcher = QuietWatcher(console, f"epsilon {row.epsilon:g}, seed {row.seed}")
            call = Call(watcher=watcher, on_outcome=lambda outcome: None)
            with chdir(asked.given_in):
                command = _simulate()
                with command.make_context("fedtide simulate", asked.command_of(row), obj=call) as context:
                    command.invoke(context)
            run = asked.run_of(row)
        if run is None or not run.is_whole:
            raise RunError(f"the run of epsilon {row.epsilon:g} and seed {row.seed} did not come to its end")
        result = Result.of(row, run)
        results.append(result)
        own = result.figures["validation"]["Fedtide"][result.headline]
        console.print(
            f"{number} of {len(asked.rows)}: epsilon {row.epsilon:g} (spent {result.spent:.3f}), seed {row.seed}: "
            f"{result.headline} {own:.4f} on validation",
            highlight=False,
            soft_wrap=True,
        )


def write_curve(asked: Sweep, results: list[Result]) -> Curve:
    """Table, curve and JSON, in the sweep's folder."""
    from server.runs import write_whole
    from simulations import plots
    from simulations.sweep import Curve

    curve = Curve(asked, results)
    plots.sweep_curve(
        asked.folder / "privacy-utility.png",
        curve.headline,
        {part: list(curve.spreads(part, curve.headline)) for part in curve.parts},
        {name: each.mean for name, each in curve.baselines(curve.parts[-1], curve.headline).items()},
        curve.parts[-1],
    )
    write_whole(asked.folder / "results.json", json.dumps(curve.as_json(), indent=2).encode() + b"\n")
    write_whole(asked.folder / "summary.md", in_markdown(curve).encode())
    return curve


def _over(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"


def rows_of(curve: Curve, metrics: tuple[str, ...]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: epsilon and what was spent, then each metric of each part; baselines below."""
    header = ("", "spent", *(f"{name}, {part}" for name in metrics for part in curve.parts))
    found = {(part, name): dict(curve.spreads(part, name)) for name in metrics for part in curve.parts}
    rows = [
        (
            f"epsilon {epsilon:g}",
            f"{curve.spent(epsilon):.3f}",
            *(str(found[part, name].get(epsilon, "-")) for name in metrics for part in curve.parts),
        )
        for epsilon, _ in curve.spreads(curve.parts[0], curve.headline)
    ]
    for baseline in curve.baselines(curve.parts[0], curve.headline):
        cells = [
            str(curve.baselines(part, name).get(baseline, "-")) for name in metrics for part in curve.parts
        ]
        rows.append((baseline, "", *cells))
    return header, rows


def in_markdown(curve: Curve) -> str:
    """The sweep as a page."""
    from server.summary import table

    parts = [
        f"# {curve.asked.folder.name}",
        f"{_over(curve.asked.seeds).capitalize()}. A seed is of the partition into sites and of the order of events of "
        "one time; the noise is new in every run.",
        table(*rows_of(curve, curve.metrics)),
        "![quality against epsilon](privacy-utility.png)",
        curve.statement(),
        "Runs: `fedtide simulate "
        + " ".join(curve.asked.arguments)
        + "`, with each epsilon and seed. Without privacy "
        "it was trained once a seed.",
    ]
    return "\n\n".join(parts) + "\n"


def _show(curve: Curve, console: Console) -> None:
    from rich.table import Table

    header, rows = rows_of(curve, (curve.headline,))
    table = Table(title=_over(curve.asked.seeds))
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(curve.statement(), highlight=False, markup=False)
    console.print(
        f"[bold]Table, curve and JSON are in {curve.asked.folder}[/bold]", highlight=False, soft_wrap=True
    )
