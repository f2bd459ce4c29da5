"""A site's own page as HTML: what `site_report` found, in the look of the auditor's page; it fetches nothing."""

from __future__ import annotations

from client.burn_down import svg
from client.remains import deletion, elsewhere
from client.site_report import SiteReport, sentences
from common.pages import document, table, text
from common.privacy.enrolment import fingerprint
from common.privacy.odds import percent
from common.privacy.spending import MEANING, up_to
from common.privacy.words import not_protected, small

_FOOTER = (
    "Nothing on this page is about a user. A ledger shows what a site recorded and signed, not what ran."
)
_MOST = 200  # runs in the table; all are in the JSON


def page(report: SiteReport) -> str:
    """The page."""
    sections = (
        ("What was promised", _promise(report)),
        ("What was spent", _spent(report)),
        ("Released to whom", _released(report)),
        ("What is left on disk, and how to delete it", _on_disk(report)),
        ("To check it", _check(report)),
    )
    made = "".join(
        f'<section id="item-{number}"><h2><span class="number">{number}</span>{text(title)}</h2>\n{body}</section>\n'
        for number, (title, body) in enumerate(sections, start=1)
    )
    said = sentences(report)
    answers = "".join(
        f"<div><h2>{text(title)}</h2><p>{text(said[name])}</p></div>\n"
        for title, name in (
            ("What was promised", "promised"),
            ("What was spent", "spent"),
            ("What is left", "left"),
        )
    )
    contents = "".join(
        f'<li><a href="#item-{number}">{text(title)}</a></li>'
        for number, (title, _) in enumerate(sections, start=1)
    )
    body = f"""<header>
<p class="eyebrow">Fedtide site report · {report.made[:10]}</p>
<h1>{text(report.name)}</h1>
{_state(report)}
</header>
<main>
<div class="answers">
{answers}</div>
<div class="outside"><h2>Who is not protected</h2>
{_list(not_protected(report.status.genesis.epsilon))}</div>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
{made}</main>
<footer>Made {text(report.made)} by <code>fedtide site report</code>. {_FOOTER}</footer>"""
    return document(f"Privacy of the site {report.name}", body)


def _state(report: SiteReport) -> str:
    if report.closed is not None:
        look, mark, word = "open", "■", "The site has withdrawn"
        line = f"Since {report.closed} nothing more may be charged or released."
    else:
        look, mark = "held", "✓"
        word = f"{100 * report.spending.share:.1f} % of the filter's budget is spent"
        line = "The ledger verifies as a whole, and what was spent is within what was promised."
    return (
        f'<div class="verdict {look}" role="status"><div class="mark" aria-hidden="true">{mark}</div>'
        f'<div><p class="word">{text(word)}</p><p>{text(line)}</p></div></div>'
    )


def _list(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"


def _facts(pairs: list[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in pairs)}</dl>"


def _promise(report: SiteReport) -> str:
    genesis = report.status.genesis
    size = "the natural logarithm of how many times more, or less, likely one person's being there can make any outcome"
    return _facts(
        [
            ("epsilon", f"at most {genesis.epsilon:g}: {size}: 0 is not at all, 0.7 is twice"),
            (
                "delta",
                f"{small(genesis.delta)}: the probability that epsilon's limit leaves out; far below 1 / users",
            ),
            ("whom it protects", "a user: one id in the site's log, with all events under it"),
            (
                "against whom",
                "everyone outside the site: servers, even malicious ones, other sites, models' readers",
            ),
            ("compared", "the log with that user against the log without (add or remove one user)"),
            ("for how long", f"since {genesis.day} and for good, over all runs, models and servers"),
            ("who adds the noise", {"site": "the site itself, alone"}.get(genesis.mode, genesis.mode)),
            (
                "how it is kept",
                "each request is charged before the log is looked at, and what does not fit is refused, by a filter at "
                f"Renyi order {genesis.order}; the budget is never refilled",
            ),
        ]
    )


def _spent(report: SiteReport) -> str:
    spent, status = report.spending, report.status
    by_name = {"PLD": spent.epsilon, "PRV": spent.prv, "RDP": spent.rdp}
    shown = {name: "–" if value is None else up_to(value) for name, value in by_name.items()}
    odds = spent.odds
    found = "–" if odds is None else f"at most {percent(odds.found['0.01'])} of them"
    facts = [
        ("epsilon by the PLD", f"{shown['PLD']} (cross-checks: PRV {shown['PRV']}, RDP {shown['RDP']})"),
        ("epsilon by the filter", f"{up_to(spent.by_filter)}, of {spent.cap:g} promised"),
        (
            "share of the filter's budget",
            f"{100 * spent.share:.1f} % (of Renyi divergence: no share of epsilon)",
        ),
        ("best guess, in or out at even odds", f"right at most {percent(spent.right)} of the time"),
        ("who was there, recognised at 1 % false alarms", found),
        (
            "charges",
            f"{len(status.charges)}: {status.burnt} of them burnt (nothing was released), {status.open} open",
        ),
    ]
    notes = [
        MEANING
        + " The filter's conversion at one order has a price of its own, so its figure is far above the "
        "PLD's where little was spent; it reaches the cap, which is the promise, when the budget is spent.",
        "Who is a user of several sites adds up the figures of all of them.",
        *([f"Note: {spent.note}."] if spent.note else []),
    ]
    drawn = f'<div class="figures">{_burn_down(report)}</div>' if status.charges else ""
    return _facts(facts) + "".join(f"<p>{text(note)}</p>" for note in notes) + drawn


def _burn_down(report: SiteReport) -> str:
    caption = (
        "Each step is a charge, made before the log was looked at; a cross is one that released nothing."
    )
    return (
        '<figure id="figure-burn-down"><figcaption><strong>What was left of the budget, charge by charge</strong>'
        f"{text(caption)}</figcaption>{svg(report.status)}</figure>"
    )


def _released(report: SiteReport) -> str:
    if not report.status.charges:
        return "<p>Nothing was released to anyone.</p>"
    names = {server.key: f"server {place}" for place, server in enumerate(report.servers, start=1)}
    rows = [
        (
            run.run,
            run.first_day if run.first_day == run.last_day else f"{run.first_day} to {run.last_day}",
            run.updates, run.statistics, run.metrics, run.burnt, run.open, f"{100 * run.share:.1f} %",
            f"{100 * run.left:.1f} %", ", ".join(names[key] for key in run.servers) or "not countersigned yet",
        )
        for run in report.runs[-_MOST:]
    ]  # fmt: skip
    head = ("run", "days (UTC)", "updates", "statistics", "metrics", "burnt", "open", "took", "left", "to")
    first = "" if len(report.runs) <= _MOST else f"<p>The last {_MOST} of {len(report.runs)} runs.</p>"
    servers = (
        table(
            "Servers",
            ("server", "its public key", "countersigned", "holds at least up to entry", "runs"),
            [
                (
                    names[each.key],
                    fingerprint(each.key),
                    each.countersigned,
                    each.until,
                    ", ".join(each.runs) or "–",
                )
                for each in report.servers
            ],
            (2, 3),
        )
        if report.servers
        else "<p>No server's countersignature is in the ledger yet.</p>"
    )
    return (
        first
        + table("Runs", head, rows, range(2, 9))
        + "<p>A ledger names a server by the key with which it countersigned what it got; whose key that is, the "
        "site's administrator knows. A server gets with each release all entries since the last that it holds: it "
        "knows names, days and charges of other servers' runs, too. What it does with a release, such as handing a "
        "model on, is covered by the promise.</p>" + servers
    )


def _on_disk(report: SiteReport) -> str:
    rows = [
        (each.name, each.what, "yes" if each.users else "no", each.after, "yes" if each.there else "no")
        for each in report.remains
    ]
    withdraw = f"<code>{text(f'fedtide site withdraw {report.folder}')}</code>"
    first = (
        f"<p>First withdraw: {withdraw}. It closes the ledger for good, gives a signed certificate, and deletes "
        "nothing. Without it, deleting the histories leaves a site that can train no more, and an open ledger.</p>"
    )
    return (
        ("" if report.closed is not None else first)
        + table(
            "On disk", ("in the folder", "what it is", "users' data", "after a withdrawal", "there now"), rows
        )
        + "<p>To delete what holds users' data, once the site is down and has withdrawn: "
        f"<code>{text(deletion(report.folder))}</code></p>"
        "<p>The ledger should stay: it is the proof of what was spent, for as long as someone may ask. That command "
        "does not reach:</p>" + _list(elsewhere())
    )


def _check(report: SiteReport) -> str:
    status = report.status
    return (
        _facts(
            [
                ("ledger's key", fingerprint(status.key_id)),
                ("entries", f"{status.seq + 1}"),
                ("head", status.head),
                ("begun", status.genesis.day),
            ]
        )
        + "<p>The whole ledger was verified as this page was made: signatures, order, charges, sums and "
        f"countersignatures. <code>{text(f'fedtide site verify {report.folder}')}</code> does it again, and compares "
        "the histories with those that the ledger began with. Whoever ran a server can compare the head with what it "
        "countersigned.</p>"
    )
