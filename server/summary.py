"""What a deployment's run leaves to read: plots and `summary.md` in its folder, of what the server knows.

That is what sites released and what it cost: a server has no user's events, so it measures no quality of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from common.config import Plan
from common.privacy.accountants import epsilon_pld
from common.privacy.mechanisms import Event, event_from_fields
from server import plots
from server.privacy_record import PrivacyRecord
from server.runs import RunFolder, write_whole

SUMMARY = "summary.md"
_MOST_SITES = 40


PROTECTION = (
    "Site-level DP: each user of an honest site has this (epsilon, delta), from this run, against everyone outside the "
    "site, a malicious server included; adding or removing one user with all events. Over all runs, the site's ledger "
    "bounds what is spent. One person at k sites composes over the k."
)


def write_summary(run: RunFolder, plan: Plan, record: PrivacyRecord) -> None:
    """Plots and summary of a run whose rounds are over.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    records = list(run.records())
    plots.epsilon_by_site(
        run.path / "epsilon-by-site.png", _epsilons(run, len(records)), plan.privacy.epsilon
    )
    plots.sites_by_round(
        run.path / "sites-by-round.png",
        [len(each.get("admitted", ())) for each in records],
        [len(each.get("left_out", ())) + each.get("missing", 0) for each in records],
    )
    write_whole(run.path / SUMMARY, summary(run, plan, record).encode())


def _epsilons(run: RunFolder, rounds: int) -> dict[str, list[float]]:
    """Site -> PLD epsilon of what it was seen to release until each round, from the start."""
    released: dict[str, dict[int, list[Event]]] = {}
    deltas: dict[str, float] = {}
    for number in range(1, rounds + 1):
        for line in run.receipts(number):
            site = str(line["site"])
            released.setdefault(site, {}).setdefault(number, []).append(event_from_fields(line["event"]))
            deltas[site] = float(line["delta"])
    known: dict[tuple[tuple[Event, ...], float], float] = {((), 0.0): 0.0}
    found: dict[str, list[float]] = {}
    for site in sorted(released):
        so_far: tuple[Event, ...] = ()
        found[site] = [0.0]
        for number in range(1, rounds + 1):
            so_far += tuple(released[site].get(number, ()))
            key = (so_far, deltas[site] if so_far else 0.0)
            if key not in known:
                known[key] = epsilon_pld(so_far, deltas[site])
            found[site].append(known[key])
    return found


def summary(run: RunFolder, plan: Plan, record: PrivacyRecord) -> str:
    """The run in Markdown."""
    records = list(run.records())
    admitted = {name for each in records for name in each.get("admitted", ())}
    aggregated = sum(bool(each.get("aggregated")) for each in records)
    parts = [
        f"# {run.name}",
        f"{len(admitted)} sites were admitted in a round or more; {aggregated} of {len(records)} rounds were "
        "aggregated. How many users a site has, and how good the model is for them, no site tells the server; it has "
        "no held-out events, so there are no test figures here.",
        "## Rounds",
        table(
            ("round", "phase", "admitted", "left out", "silent", "aggregated", "kB down", "kB up", "s"),
            [_round_row(each) for each in records],
        ),
        "![sites by round](sites-by-round.png)",
        *_released(run, plan),
        "## Privacy",
        PROTECTION,
        table(
            ("what", "value"),
            [
                ("epsilon of this run (PLD), at the site that spent most", f"{record.epsilon:.3f}"),
                ("promised by the plan", f"({plan.privacy.epsilon:g}, {plan.privacy.delta:g})"),
                *statistics_rows(plan),
                *training_rows(plan),
                ("size of the model's trainable part", f"{_parameters(run):,} numbers"),
            ],
        ),
        *_sites(record),
        "![epsilon by site](epsilon-by-site.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _round_row(record: dict[str, Any]) -> tuple[str, ...]:
    reasons = Counter(str(each["reason"]) for each in record.get("left_out", ()))
    return (
        str(record["round"]),
        str(record.get("phase", "")),
        str(len(record.get("admitted", ()))),
        ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "0",
        str(record.get("missing", 0)),
        "yes" if record.get("aggregated") else "no",
        f"{record.get('bytes_down', 0) / 1000:,.0f}",
        f"{record.get('bytes_up', 0) / 1000:,.0f}",
        f"{record.get('seconds', 0.0):.1f}",
    )


def _released(run: RunFolder, plan: Plan) -> list[str]:
    """The quality that sites released, where the plan asked for it."""
    lines = run.released_quality()
    if not lines:
        return []
    last = lines[-1]
    rows = [
        (str(name), f"{each['value']:.4f}", f"{each['low_95']:.4f} to {each['high_95']:.4f}")
        for name, each in last["metrics"].items()
    ]
    return [
        "## Quality, as sites released it",
        f"Of {last['sites']} sites, with noise of its own (multiplier {plan.metrics.noise_multiplier or 0.0:g}), which "
        "each site's budget was charged for.",
        table(("metric", "value", "95 % interval"), rows),
    ]


def _sites(record: PrivacyRecord) -> list[str]:
    shown = sorted(record.sites, key=lambda site: -site.published.epsilon)[:_MOST_SITES]
    rows = [
        (
            site.site,
            f"{site.published.epsilon:.3f}",
            f"{len(site.events)}, {sum(each.outcome == 'released' for each in site.events)}",
            site.over_all_runs.figures,
            f"({site.budget_epsilon:g}, {site.delta:g})",
            f"{site.budget_share:.1%}",
        )
        for site in shown
    ]
    header = ("site", "epsilon", "charged, released", "over all its runs", "its budget", "spent of it")
    left = len(record.sites) - len(shown)
    return [table(header, rows), *([f"And {left} more sites, each of which spent less."] if left else [])]


def _parameters(run: RunFolder) -> int:
    return sum(value.numel() for value in run.model_state().values())


def statistics_rows(plan: Plan) -> list[tuple[str, str]]:
    """The noise on a plan's sums: name and value."""
    statistics, rows = plan.statistics, []
    if statistics.popularity_share:
        rows.append(("noise on popularity", f"{statistics.popularity_noise_multiplier:g}"))
    if statistics.transition_share:
        rows.append(
            (
                "noise on transitions",
                f"{statistics.transition_noise_multiplier:g}, among {statistics.top_items} items",
            )
        )
    if plan.metrics.share:
        rows.append(("noise on metrics", f"{plan.metrics.noise_multiplier:g}"))
    return rows


def training_rows(plan: Plan) -> list[tuple[str, str]]:
    """How a plan's private fine-tuning is done: name and value."""
    if not plan.training.rounds:
        return [("private fine-tuning", "none")]
    return [
        ("noise multiplier", f"{plan.privacy.noise_multiplier:g}"),
        ("clip norm", f"{plan.privacy.clip_norm:g}"),
        ("sampling rate of users", f"{plan.privacy.sampling_rate:g}"),
        (
            "steps at each site",
            f"{plan.training.rounds} rounds x {plan.training.steps_per_round} = {plan.steps}",
        ),
    ]


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
