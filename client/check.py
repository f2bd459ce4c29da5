"""`fedtide site check`: tests all that a site needs, spends nothing, and says the way out of each thing that fails.

Counts of users and events are in what it says: for the site's own eyes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.connection import Connection
    from client.site_folder import Site
    from common.events.cleaning import Progress

_CLOCK_AHEAD, _CLOCK_BEHIND = 5, 300
_LEAST_DISK, _LEAST_MEMORY = 10**9, 2 * 10**9
_STEPS = 2


@dataclass(frozen=True)
class Finding:
    """What one test found.

    Attributes:
        name: of the test.
        holds: None where it could not be tested.
        said: what was found.
        way_out: what to do, where something is to be done.
    """

    name: str
    holds: bool | None
    said: str
    way_out: str = ""


class _NotInOrderError(Exception):
    """A test failed: what was found, and the way out."""

    def __init__(self, said: str, way_out: str) -> None:
        super().__init__(said)
        self.way_out = way_out


def check_site(folder: Path, progress: Progress | None = None) -> Iterator[Finding]:
    """Every finding, one after the other; the first that others rest on ends what rests on it.

    Args:
        progress: told how far large histories are compared with the ledger's word.
    """
    from client.authority import authority_end, authority_warning
    from client.connection import Connection, invitation_of
    from client.site_folder import Site
    from common.privacy.enrolment import fingerprint

    sites: list[Site] = []
    connections: list[Connection] = []

    def load() -> str:
        site = Site.load(folder)
        sites.append(site)
        return f"{site.name}; families {', '.join(site.families) or 'none'}"

    def keys() -> str:
        _private_files(folder)
        connections.append(Connection.load(folder))
        connections[0].private_key()
        digest = invitation_of(connections[0]).digest
        return f"private; server {connections[0].address}, whose invitation reads {fingerprint(digest)}"

    yield _tested("policy", load)

    def authority() -> str:
        end, warning = authority_end(connections[0].authority), authority_warning(folder)
        if warning:
            said, _, way_out = warning.partition(": ")
            raise _NotInOrderError(said, way_out)
        return f"ca.crt is valid until {end:%Y-%m-%d}"

    yield _tested("keys", keys)
    if connections:
        yield _tested("authority", authority)
        yield from _server(connections[0])
    if sites:
        yield from _data(sites[0], progress)
        yield from _machine(sites[0])


def _tested(name: str, test: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, test())
    except _NotInOrderError as error:
        return Finding(name, False, str(error), error.way_out)
    except Exception as error:  # whatever is wrong, the other tests go on
        from common.cli import known_errors

        if not isinstance(error, (*known_errors(), ValueError, RuntimeError)):
            return Finding(name, False, f"{type(error).__name__}: {error}")
        said, _, way_out = str(error).partition(": ")
        return Finding(name, False, said, way_out)


def _private_files(folder: Path) -> None:
    from client.agent import SECRET as EXECUTOR_SECRET
    from client.private_files import check_private
    from client.site_folder import SECRET
    from common.events.deidentify import load_secret

    check_private(folder)
    load_secret(folder / SECRET)
    if (folder / EXECUTOR_SECRET).exists():
        check_private(folder / EXECUTOR_SECRET)


def _server(connection: Connection) -> Iterator[Finding]:
    from client.authority import SOON
    from client.probe import Heard, certificate, clock_ahead, fleet, reach

    reached = _tested("server reached", lambda: f"{connection.address} is {reach(connection)}")
    yield reached
    untested = [(name, None, "not tested, as the line before failed") for name in ("clock", "key enrolled")]
    if not reached.holds:
        yield Finding("certificate", None, "not tested, as the line before failed")
        yield from (Finding(*each) for each in untested)
        return

    def verified() -> str:
        until = certificate(connection)
        said = f"verifies against ca.crt; valid until {until:%Y-%m-%d}"
        if until - datetime.now(UTC) < SOON:
            raise _NotInOrderError(said, "the server's owner runs `fedtide server renew` soon")
        return said

    shown = _tested("certificate", verified)
    yield shown
    if not shown.holds and "valid until" not in shown.said:
        yield from (Finding(*each) for each in untested)
        return
    heard: list[Heard] = []

    def clock() -> str:
        ask = fleet(connection)
        heard.append(ask(timedelta()))
        ahead = clock_ahead(ask, heard[0])
        way_out = "set both clocks by NTP: the server takes no more than 5 s ahead and 300 s behind"
        if ahead is None:
            raise _NotInOrderError("more than two hours from the server's", way_out)
        said = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
        # Half of what breaks the connection is reason enough.
        if heard[0] is Heard.WRONG_TIME or not -_CLOCK_BEHIND / 2 < ahead < _CLOCK_AHEAD / 2:
            raise _NotInOrderError(said, way_out)
        return said

    yield _tested("clock", clock)
    if not heard or heard[0] is Heard.WRONG_TIME:
        yield Finding("key enrolled", None, "not tested, as the line before failed")
        return
    yield (
        Finding("key enrolled", True, "the server knows this node's key")
        if heard[0] is Heard.KNOWN
        else Finding(
            "key enrolled",
            False,
            "the server does not know this node's key",
            "hand enrolment.json to the server's owner: `fedtide server enroll`",
        )
    )


def _data(site: Site, progress: Progress | None) -> Iterator[Finding]:
    def logs() -> str:
        from client.ledger import Ledger
        from client.making import data_unchanged
        from common.events.histories import Histories

        histories = Histories.load(site.histories_folder)
        with Ledger.open(site.ledger_folder) as ledger:
            committed = ledger.genesis.dataset_commitment
        if data_unchanged(site, committed, progress) is False:
            raise _NotInOrderError(
                "the histories are not those that the ledger began with",
                "restore them from the site's backup",
            )
        if len(histories) < site.users_at_least:
            raise _NotInOrderError(
                f"{len(histories)} users, but the policy promises {site.users_at_least}",
                "lower users_at_least in policy.toml",
            )
        return f"clean: {len(histories)} users, {histories.events} events (for the site's eyes only)"

    def ledger() -> str:
        from client.ledger import Ledger

        with Ledger.open(site.ledger_folder) as opened:
            report = opened.verify()
        if report.closed:
            raise _NotInOrderError("the site has withdrawn", "nothing more may be released from this data")
        left = 1 - report.spent / report.cap
        if left <= 0:
            raise _NotInOrderError(
                "verifies; no budget is left", "nothing more may be released from this data"
            )
        return f"verifies; {left:.1%} of the budget is left"

    def catalog() -> str:
        from common.events.catalog import Catalog

        found = Catalog.load(site.catalog)
        return f"{len(found)} items, digest {found.digest()}; a plan for another one is refused"

    yield _tested("catalog", catalog)
    yield _tested("logs", logs)
    yield _tested("ledger", ledger)


def _machine(site: Site) -> Iterator[Finding]:
    yield _tested("language models", lambda: _language_models(site))
    yield _tested("memory", lambda: _memory(site))
    yield _tested("GPU", lambda: _gpu(site))
    yield _tested("disk", lambda: _disk(site.folder))
    yield _tested("dry step", lambda: dry_step(site))


def _language_models(site: Site) -> str:
    from common.assets import AssetError, language_model

    named = site.limits.language_models
    if named is None:
        return "any that is on this machine"
    if not named:
        raise _NotInOrderError("the policy allows none", "name one under language_models in policy.toml")
    missing = []
    for name, folder in named.items():
        try:
            language_model(folder or name, offline=site.offline)
        except AssetError as error:
            missing.append(f"{name}: {error}")
    if len(missing) == len(named):
        raise _NotInOrderError("; ".join(missing), "fetch it with `fedtide data`, or correct policy.toml")
    absent = f"; absent: {', '.join(each.partition(':')[0] for each in missing)}" if missing else ""
    return f"{len(named) - len(missing)} of {len(named)} are here{absent}"


def _memory(site: Site) -> str:
    from client.policy import POLICY

    page = os.sysconf("SC_PAGE_SIZE")
    free, whole = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # another system: free pages are all that is known
    said = f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"
    if whole < site.limits.memory * 2**30:
        raise _NotInOrderError(
            said, f"the policy lets a step take {site.limits.memory:g} GiB: lower memory in {POLICY}"
        )
    if free < _LEAST_MEMORY:
        raise _NotInOrderError(said, f"training asks for {_LEAST_MEMORY / 1e9:.0f} GB: end other programs")
    return said


def _gpu(site: Site) -> str:
    import torch

    if not torch.cuda.is_available():
        if site.performance.device == "cuda":
            raise _NotInOrderError(
                "none that torch can use, but device is cuda", 'set device = "auto", or "cpu", in policy.toml'
            )
        return "none: the CPU is used"
    return ", ".join(torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count()))


def _disk(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB are free"
    if free < _LEAST_DISK:
        raise _NotInOrderError(said, f"free {_LEAST_DISK / 1e9:.0f} GB: a ledger that cannot grow refuses")
    return said


def dry_step(site: Site) -> str:
    """Trains on made-up users, with the site's catalog and a model that its policy allows. Reserves nothing.

    Raises:
        Exception: of whatever kind: training does not work here.
    """
    import numpy as np

    from client.kept import device_of, site_model, take_threads
    from client.training import StepSettings, train_round
    from common.assets import DEFAULT_LANGUAGE_MODEL, AssetError, language_model
    from common.config import make_plan
    from common.events.catalog import Catalog
    from common.models.batches import HistoryBatch
    from common.privacy.noise import SecureGaussian, SecurePoissonSampler

    families = [each for each in site.families if each != "ensemble"]
    if not families:
        raise _NotInOrderError("the policy allows no family", "name one under families in policy.toml")
    names = dict(site.limits.language_models or {DEFAULT_LANGUAGE_MODEL.name: ""})
    encoder = DEFAULT_LANGUAGE_MODEL.name
    for name, folder in names.items():
        try:
            language_model(folder or name, offline=site.offline)
            encoder = name
        except AssetError:
            continue
    plan = make_plan(
        {
            "model": {"family": families[0], "encoder": encoder, "width": 16, "max_events": 10},
            "privacy": {"noise_multiplier": 1.0},
            "training": {"rounds": 1, "steps_per_round": _STEPS},
        }
    )
    catalog = Catalog.load(site.catalog)
    how = site.performance
    take_threads(how)
    model = site_model(plan, catalog, how, offline=site.offline, language_models=site.limits.language_models)
    chance = np.random.default_rng(0)
    items = chance.integers(0, len(catalog), size=(32, 10))
    times = np.cumsum(chance.integers(1, 86_400, size=(32, 10)), axis=1)
    began = time.monotonic()
    train_round(
        model,
        HistoryBatch.of(items, times, device_of(how)),
        StepSettings.of(plan, how),
        sampler=SecurePoissonSampler(),
        noise=SecureGaussian(),
    )
    took = (time.monotonic() - began) / _STEPS
    return f"{families[0]} on {encoder}: {took:.2f} s a step of 16 made-up users"
