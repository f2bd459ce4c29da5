"""What a finished simulation leaves to read: plots and `summary.md` in the run's folder, and the plain words."""

from __future__ import annotations

import math

from common.metrics import paired_difference
from common.privacy.odds import percent
from server.privacy_record import PrivacyRecord
from server.runs import write_whole
from server.summary import PROTECTION, statistics_rows, table, training_rows
from simulations import plots
from simulations.outcome import FEDTIDE, OPEN, Outcome

SIGNIFICANT_Z = 1.96


def write_report(outcome: Outcome) -> None:
    """Plots and summary."""
    folder = outcome.run.path
    plots.quality_by_round(folder / "quality-by-round.png", outcome.validation, outcome.baselines_validation)
    plots.epsilon_by_round(
        folder / "epsilon-by-round.png",
        outcome.epsilons,
        outcome.plan.privacy.epsilon,
        outcome.privacy.budget_epsilon,
    )
    plots.privacy_utility(
        folder / "privacy-utility.png", outcome.epsilons, outcome.validation, outcome.baselines_validation
    )
    write_whole(folder / "summary.md", summary(outcome).encode())


def quality_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """Rows of the table of results: name, then each metric with its standard error."""
    rows = []
    for name, quality in outcome.results.items():
        cells = []
        for metric in quality.metrics.values():
            error = metric.standard_error
            cells.append(f"{metric.value:.4f}" + (f" ±{error:.3f}" if math.isfinite(error) else ""))
        rows.append((name, *cells))
    return rows


def quality_header(outcome: Outcome) -> tuple[str, ...]:
    """Names of the columns of `quality_rows`."""
    return ("model", *next(iter(outcome.results.values())).metrics)


def verdicts(outcome: Outcome) -> list[str]:
    """Plain sentences: the private model against each baseline, paired over users."""
    own = outcome.results[FEDTIDE].per_user
    said = []
    for name, quality in outcome.results.items():
        if name == FEDTIDE:
            continue
        paired = paired_difference(own, quality.per_user)
        direction = "better" if paired.mean > 0 else "worse"
        verdict = direction if abs(paired.z) >= SIGNIFICANT_Z else "no significant difference"
        said.append(
            f"Fedtide against {name}: {quality.per_user_name} {paired.mean:+.4f} ± {paired.standard_error:.4f} "
            f"(paired over {len(own)} users, z = {paired.z:.1f}): {verdict}."
        )
    return said


def cost_rows(outcome: Outcome) -> list[tuple[str, str]]:
    """What the run cost: name and value."""
    plan, privacy = outcome.plan, outcome.privacy
    first = privacy.sites[0] if privacy.sites else None
    released = sum(each.outcome == "released" for site in privacy.sites for each in site.events)
    charged = sum(len(site.events) for site in privacy.sites)
    rows = [
        ("epsilon of this run (PLD)", f"{privacy.epsilon:.3f}"),
        ("delta", f"{plan.privacy.delta:g}"),
        (
            "cross-checks: RDP, PRV",
            f"{first.published.rdp:.3f}, {first.published.prv:.3f}"
            if first and first.published.prv is not None
            else "-",
        ),
        (
            "guarantee of a site's ledger, whatever happens next",
            f"({privacy.budget_epsilon:g}, {plan.privacy.delta:g})",
        ),
        *_lifetime_rows(privacy),
        *statistics_rows(plan),
        *training_rows(plan),
        ("releases (charged, released)", f"{charged}, {released}"),
        ("bytes to sites, from sites", f"{outcome.bytes_down:,}, {outcome.bytes_up:,}"),
        ("wall time", f"{outcome.seconds:.0f} s"),
    ]
    return rows


def _lifetime_rows(privacy: PrivacyRecord) -> list[tuple[str, str]]:
    """What the site that spent most has spent over all its runs, this one included."""
    if not privacy.sites:
        return []
    worst = max(
        privacy.sites, key=lambda site: (site.over_all_runs.by_filter, site.over_all_runs.epsilon or 0.0)
    ).over_all_runs
    runs = "this run alone" if worst.runs == 1 else f"{worst.runs} runs"
    return [
        (f"epsilon over all runs of a site's ledger ({runs})", worst.figures),
        (
            "from all of them, the best guess whether one user is there",
            f"right at most {percent(worst.right)}",
        ),
    ]


_LOOKED_AT = {
    "test": "test split, looked at once",
    "validation": "validation; nobody looked at the test split",
}


def researcher_side(outcome: Outcome) -> str:
    """How quality is measured, in words; of one's own log, also what its figures tell."""
    how = f"({outcome.split}; full catalog, seen items masked, ties at mid-rank)"
    if outcome.public:
        return (
            f"Quality is measured on the researcher's side, on held-out events of public data {how}. In a deployment "
            "nobody outside a site has these events."
        )
    return (
        f"Quality is measured on held-out events of the log that was given {how}. **These figures are exact, so they "
        "are private**: they are computed from its users' events without noise, and no epsilon covers them. Whoever "
        "sees several of them, of runs that differ by a user, can learn of that user: keep them where the log is. To "
        "publish quality, have sites release it under their budgets (`metrics.share` in the plan)."
    )


def open_form(outcome: Outcome) -> str:
    """What the row without privacy is, in words; empty where there is none."""
    if OPEN not in outcome.results:
        return ""
    statistics = (
        f"its statistics exact, with the best of {outcome.open_settings} weights, "
        if outcome.open_settings
        else ""
    )
    return (
        f"No privacy: the same recipe over all users' pooled events, {statistics}then trained without noise; weights "
        "and epoch chosen on validation. The private one is the mean over its last rounds, chosen by nothing."
    )


def results_title(outcome: Outcome) -> str:
    """What the table of results is of."""
    return f"results ({_LOOKED_AT[outcome.part]})"


def summary(outcome: Outcome) -> str:
    """The run in Markdown."""
    users = [site.users for site in outcome.sites]
    parts = [
        f"# {outcome.run.name}",
        f"{len(users)} sites, {sum(users)} users ({min(users)} to {max(users)} a site). {researcher_side(outcome)}",
        f"## Quality: {results_title(outcome)}",
        table(quality_header(outcome), quality_rows(outcome)),
        "\n".join(f"- {line}" for line in verdicts(outcome)),
        *filter(None, [open_form(outcome)]),
        "![quality by round](quality-by-round.png)",
        "## Privacy",
        PROTECTION,
        table(("what", "value"), cost_rows(outcome)),
        "![epsilon by round](epsilon-by-round.png)",
        "![quality against privacy cost](privacy-utility.png)",
        "Settings were fixed before the run; choosing them by looking at results on private data would cost privacy "
        "that is not counted here.",
    ]
    if outcome.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in outcome.notes))
    return "\n\n".join(parts) + "\n"
