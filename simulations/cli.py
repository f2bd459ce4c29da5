"""`fedtide simulate`: one federation on this machine, from a plan or from options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common import columns as reading

if TYPE_CHECKING:
    from common.config import Plan
    from simulations.follower import Watcher
    from simulations.outcome import Outcome

simulate_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _put(values: dict[str, Any], place: str, value: Any) -> None:
    if value is not None:
        *sections, name = place.split(".")
        for section in sections:
            values = values.setdefault(section, {})
        values[name] = value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _leave_noise_out(values: dict[str, Any]) -> None:
    """Takes out of a plan the noise that was calibrated for another promise, or for other steps."""
    for section, table in values.items():
        for name in (
            table if isinstance(table, dict) and section in ("privacy", "statistics", "metrics") else ()
        ):
            if name.endswith("noise_multiplier"):
                table[name] = None


def _fill_in_statistics(values: dict[str, Any]) -> None:
    """Statistics first, unless the person says something of them, or asks for a task that has no use for them."""
    from common.planning import DEFAULT_SECTIONS

    if "statistics" in values or values.get("model", {}).get("task", "next-item") != "next-item":
        return
    for section, fields in DEFAULT_SECTIONS.items():
        values[section] = {**fields, **values.get(section, {})}


@simulate_app.command()
def simulate(
    context: typer.Context,
    plan_file: Annotated[Path | None, typer.Argument(metavar="[PLAN]", help="A plan, TOML or JSON.")] = None,
    dataset: Annotated[str, typer.Option(help="movielens-100k or online-retail.")] = "movielens-100k",
    data_path: Annotated[Path | None, typer.Option(help="Where the data set lies, read in place.")] = None,
    log: Annotated[Path | None, typer.Option(help="Your own behaviour log, in place of --dataset.")] = None,
    catalog: Annotated[Path | None, typer.Option(help="The public catalog of your log's items.")] = None,
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
    engine: Annotated[str, typer.Option(help="flower (Ray), or inline: one process.")] = "flower",
    name: Annotated[str | None, typer.Option(help="Of the run.")] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Promise for the whole run, to each user; a plan's noise is calibrated anew."),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Below 1/users of a site.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Exchanges between server and sites.")] = None,
    steps: Annotated[int | None, typer.Option(help="DP-SGD steps of a site in a round.")] = None,
    sampling_rate: Annotated[float | None, typer.Option(help="Each user's chance to be in a step.")] = None,
    users_per_site: Annotated[int | None, typer.Option(help="Public lower bound of a site's users.")] = None,
    family: Annotated[
        str | None, typer.Option(help="recommend, dual, lstm-vae, classifier, ensemble or lstm-lm.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="vectors (frozen item vectors) or lora.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Language model: known name, folder or hub id.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Of the sites: cpu, which is the default; cuda; or auto.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of each site's arithmetic.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Users that a site computes at once.")] = None,
    dp_engine: Annotated[
        str | None, typer.Option(help="Of sites' steps: fast, or opacus: Opacus' own hooks.")
    ] = None,
    frozen_precision: Annotated[
        str | None, typer.Option(help="Of frozen weights in mode lora: float32 or bfloat16.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any value: section.name=value")] = None,
    sites_by: Annotated[str | None, typer.Option(help="zip, hash or dirichlet (by taste).")] = None,
    n_sites: Annotated[int, typer.Option(help="How many sites.")] = 10,
    alpha: Annotated[float, typer.Option(help="Of dirichlet: small is skewed.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the partition and the order of tied events.")] = 0,
    sites: Annotated[Path | None, typer.Option(help="Keep sites, and their budgets, in this folder.")] = None,
    site_budget: Annotated[float | None, typer.Option(help="Epsilon cap of new sites' ledgers.")] = None,
    baseline_epochs: Annotated[
        int, typer.Option(help="Of the same recipe without privacy; 0: leave it out.")
    ] = 15,
    split: Annotated[
        str, typer.Option(help="leave-one-out, or temporal: train before a moment, foretell after it.")
    ] = "leave-one-out",
    folds: Annotated[
        int | None,
        typer.Option(help="Validate over this many folds of users, each judged by users at no site."),
    ] = None,
    test: Annotated[
        bool,
        typer.Option("--test/--no-test", help="Look at the test split at the end; else validation only."),
    ] = True,
    cpus: Annotated[int | None, typer.Option(help="For Flower's engine.")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    offline: Annotated[bool, typer.Option(help="Fetch nothing; use what is on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Go on with an interrupted run: its folder, or its name under --runs."
        ),
    ] = None,
) -> None:
    """Train one interest model across simulated sites, each under its own user-level differential privacy.

    Without a log this is MovieLens-100K over ten regions. Results, plots and the model go to a folder under
    --runs. A run that was interrupted goes on with --resume: training that is done stays done.
    """
    given = {option: value for option, value in locals().items() if option != "context"}
    from client.policy import performance_of
    from common.cli import UserError
    from server.runs import RunError, RunFolder
    from simulations.going_on import call_of, ended_as_interrupted, go_on, interrupted, to_keep, with_way_out

    if resume is not None:
        if (done := go_on(context, given, simulate)) is not None:
            _say_finished(done.path, as_json=as_json)
        return
    call = call_of(context)
    in_plan = {
        "name": name,
        "privacy.epsilon": epsilon,
        "privacy.delta": delta,
        "privacy.sampling_rate": sampling_rate,
        "privacy.users_per_site": users_per_site,
        "training.rounds": rounds,
        "training.steps_per_round": steps,
        "model.family": family,
        "model.mode": mode,
        "model.encoder": encoder,
    }
    mapping = reading.column_mapping(columns, "--columns")
    source = reading.catalog_file(
        catalog, catalog_format, catalog_columns, catalog_separator, catalog_quotes, catalog_encoding
    )
    if engine not in ("flower", "inline"):
        raise UserError(
            f"--engine {engine!r} is unknown: choose flower or inline; what sites take their steps by is --dp-engine"
        )
    if n_sites < 1 or baseline_epochs < 0 or (site_budget is not None and site_budget <= 0):
        raise UserError("--n-sites must be at least 1, --baseline-epochs at least 0, --site-budget above 0")
    if dataset not in ("movielens-100k", "online-retail"):
        raise UserError(f"data set {dataset!r} is unknown: choose movielens-100k or online-retail")
    if split not in ("leave-one-out", "temporal"):
        raise UserError(f"split {split!r} is unknown: choose leave-one-out or temporal")
    if folds is not None and (folds < 2 or split != "leave-one-out" or sites is not None):
        raise UserError(
            f"--folds {folds} must be at least 2, and folds go with leave-one-out and sites of their own: leave "
            "--split and --sites out"
        )
    plan = call.unfinished.plan() if call.unfinished else _plan_of(plan_file, in_plan, set_ or ())
    performance = None
    if any(each is not None for each in (device, threads, micro_batch, dp_engine, frozen_precision)):
        performance = performance_of(
            engine_option="--dp-engine",
            engine=dp_engine,
            micro_batch=micro_batch,
            threads=threads,
            device=device,
            frozen_precision=frozen_precision,
        )
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from rich.console import Console

    from simulations.begun import Begun
    from simulations.console import SHOWN_COLUMNS, ConsoleWatcher, print_outcome
    from simulations.datasets import load_movielens_100k, load_own
    from simulations.federation import SimulationOptions
    from simulations.federation import simulate as run_simulation
    from simulations.folds import folds_table, simulate_folds, spread
    from simulations.online_retail import load_online_retail

    console = Console(stderr=as_json, quiet=call.on_outcome is not None)
    if log is not None:
        layout = reading.text_layout(separator, quotes, encoding)
        data = load_own(
            log, None, format, mapping, layout=layout, catalog=source, time_format=time_format, sure=yes
        )
    else:
        load = load_movielens_100k if dataset == "movielens-100k" else load_online_retail
        data = load(data_path, offline=offline, say=lambda text: console.print(text, highlight=False))
    console.print(f"[bold]{data.name}[/bold]: {data.licence}", highlight=False)
    options = SimulationOptions(
        engine="flower" if engine == "flower" else "inline",
        runs=runs,
        sites_by=sites_by or ("zip" if data.name == "movielens-100k" and n_sites == 10 else "hash"),
        n_sites=n_sites,
        alpha=alpha,
        seed=seed,
        sites=sites,
        site_budget=site_budget,
        performance=performance,
        baseline_epochs=baseline_epochs,
        split="temporal" if split == "temporal" else "leave-one-out",
        test=test and folds is None,
        cpus=cpus or os.cpu_count() or 1,
        offline=offline,
    )
    outcomes: list[Outcome] = []
    watcher = ConsoleWatcher(console, plan.rounds) if call.watcher is None else call.watcher
    kept: dict[str, Any] = {"given": to_keep(given)}
    begun: list[RunFolder] = []
    watcher.on_run = begun.append

    def next_watcher(number: int) -> Watcher:
        console.rule(f"fold {number} of {folds}")
        return watcher

    try:
        with ended_as_interrupted(), watcher.showing():
            if call.unfinished is not None:
                fold = Begun.load(call.unfinished).fold
                options = replace(options, fold=fold)
                outcomes = [run_simulation(data, plan, options, watcher, unfinished=call.unfinished, **kept)]
            elif folds is None:
                outcomes = [run_simulation(data, plan, options, watcher, **kept)]
            else:
                outcomes = simulate_folds(data, plan, options, folds, next_watcher, **kept)
    except KeyboardInterrupt:
        raise interrupted(begun[-1] if begun else call.unfinished) from None
    except RunError as error:
        raise with_way_out(error, begun[-1] if begun else None) from error
    except ValueError as error:
        if type(error) is ValueError:  # a checked argument of a plain function: its message is for the person
            raise UserError(str(error)) from error
        raise
    if call.on_outcome is not None:
        for outcome in outcomes:
            call.on_outcome(outcome)
        return
    for outcome in outcomes:
        print_outcome(console, outcome)
    whole = folds is not None and call.unfinished is None
    if whole:
        console.print(folds_table(outcomes, SHOWN_COLUMNS - 1))
    if as_json:
        found = [_as_json(outcome) for outcome in outcomes]
        typer.echo(json.dumps({"folds": found, "validation": spread(outcomes)} if whole else found[0]))


def _plan_of(plan_file: Path | None, in_plan: Mapping[str, Any], set_: Sequence[str]) -> Plan:
    """The plan of a file, or the one by default, with what the options say of it: place -> value."""
    from common.cli import UserError
    from common.config import make_plan, read_plan

    values: dict[str, Any] = read_plan(plan_file).model_dump() if plan_file else {}
    if plan_file and any(in_plan[each] is not None for each in _CALIBRATED_ANEW):
        _leave_noise_out(values)
    for place, value in in_plan.items():
        _put(values, place, value)
    for each in set_:
        place, equals, text = each.partition("=")
        if not equals:
            raise UserError(
                f"--set {each!r} must read section.name=value, such as --set privacy.clip_norm=0.5"
            )
        _put(values, place, _parsed(text))
    if plan_file is None:
        _fill_in_statistics(values)
    return make_plan(values)


_CALIBRATED_ANEW = (
    "privacy.epsilon",
    "privacy.delta",
    "training.rounds",
    "training.steps_per_round",
    "privacy.sampling_rate",
)


def _say_finished(run: Path, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"run": str(run), "finished": True}))
    else:
        print(f"{run.name} is finished, and nothing is left to do: {run / 'summary.md'} says what came out.")


def _as_json(outcome: Outcome) -> dict[str, Any]:
    from simulations.report import verdicts

    return {
        "run": str(outcome.run.path),
        "epsilon": outcome.privacy.epsilon,
        "delta": outcome.plan.privacy.delta,
        "noise_multiplier": outcome.plan.privacy.noise_multiplier,
        "steps": outcome.plan.steps,
        "sites": [{"site": s.name, "users": s.users, "events": s.events} for s in outcome.sites],
        "split": outcome.split,
        outcome.part: {name: quality.as_json() for name, quality in outcome.results.items()},
        "verdicts": verdicts(outcome),
        "bytes_down": outcome.bytes_down,
        "bytes_up": outcome.bytes_up,
        "seconds": outcome.seconds,
    }
