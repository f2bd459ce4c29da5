"""Sets up simulated sites: each gets its users' part of the log, cleans it, and opens a ledger of its own.

What a real site's administrator does with `fedtide site init`, done here for all sites of one machine. Sites
in a folder of their own outlive a run, and so do their budgets.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from client.ledger import Ledger
from client.policy import ANY_PLAN, Performance
from client.private_files import sync_folder
from client.server_key import NoServerKeyError, trust, trusted_key
from client.site_folder import Site, SiteError
from common.config import Plan
from common.events.cleaning import CleaningPolicy, CleaningReport, clean
from common.events.deidentify import pseudonym
from common.events.histories import Histories
from common.events.schema import DEFAULT_KIND
from common.models.names import FAMILIES
from common.planning import smallest_budget
from server.registry import Registry
from server.runs import write_whole
from simulations.datasets import Dataset
from simulations.partition import log_of_site
from simulations.splits import LeaveOneOut, Split

SPLIT_FILE = "split.txt"
"""Names, beside sites that outlive a run, the split that they were made under."""

_BEING_MADE = "being-made"
"""Beside sites that are not all made yet, so that nobody asked them for anything: which ones, as a digest."""


@dataclass(frozen=True)
class SimulatedSite:
    """What the researcher knows of a simulated site; a deployment's server knows none of the counts."""

    name: str
    folder: Path
    users: int
    events: int


def site_name(number: int) -> str:
    """What the simulated site of a partition is called."""
    return f"site-{number}"


def registry_folder(sites: Path) -> Path:
    """Where the registry of simulated sites lies: beside their folder, not among what is private to them.

    Args:
        sites: the folder of all sites. That of a run has the run's registry; one that is kept over several runs has
            its own, so that the anchors of its sites go on.
    """
    if (sites / "registry").is_dir():  # sites that were kept by an older version keep theirs
        return sites / "registry"
    of_a_run = (sites.parent / "plan.json").is_file() and (sites.parent / "rounds").is_dir()
    return sites.with_name("registry" if of_a_run else f"{sites.name}-registry")


def simulated_secret(seed: int) -> bytes:
    """The secret under which simulated sites de-identify public data, the same for every run of a seed.

    It decides the order of events at equal times, so evaluation depends on the seed alone and not on how users
    fall to sites. A real site's secret is random (`common.events.deidentify.new_secret`).
    """
    return hashlib.sha256(f"fedtide simulation {seed}".encode()).digest()


def whole_histories(dataset: Dataset, policy: CleaningPolicy, seed: int) -> tuple[Histories, CleaningReport]:
    """All users' histories, held-out events included, on the researcher's side."""
    return clean(dataset.log, dataset.catalog, policy, simulated_secret(seed))


def histories_of_sites(
    dataset: Dataset, sites: npt.NDArray[np.int64], policy: CleaningPolicy, seed: int
) -> Iterator[Histories]:
    """The histories of site 0, 1, ...: what cleaning each one's part of the log alone gives.

    The log is cleaned once, whole: every rule looks at one user's own events, and simulated sites share a secret.

    Args:
        sites: [users of dataset.users] from `partition.divide`.

    Raises:
        LogError: nothing is left of a site's log, or the log cannot be read to its end.
    """
    secret = simulated_secret(seed)
    whole, _ = whole_histories(dataset, policy, seed)
    users = dataset.users["user"].to_list()
    pseudonyms = np.array([pseudonym(user, secret) for user in users], dtype=whole.users.dtype)
    order = np.argsort(pseudonyms)
    places = np.minimum(np.searchsorted(pseudonyms[order], whole.users), len(order) - 1)
    listed = pseudonyms[order][places] == whole.users  # a log may hold users that no site is given
    site_of_row = np.where(listed, sites[order][places], -1)  # [rows of whole]
    by_site = np.argsort(site_of_row, kind="stable")  # within a site, the order of the pseudonyms stays
    count = int(sites.max()) + 1
    bounds = np.searchsorted(site_of_row[by_site], np.arange(count + 1))
    kinds = _kinds_of_sites(dataset, sites)
    for site in range(count):
        rows = by_site[bounds[site] : bounds[site + 1]]
        if not len(rows):
            clean(log_of_site(dataset, sites, site), dataset.catalog, policy, secret)  # says why
        chosen, names = whole.select(rows), tuple(sorted(kinds[site]))
        places = np.searchsorted(names, whole.kind_names).astype(np.int16)
        yield replace(chosen, kinds=places[chosen.kinds], kind_names=names)


def _kinds_of_sites(dataset: Dataset, sites: npt.NDArray[np.int64]) -> dict[int, list[str]]:
    """The kinds of event that each site's part of the log names, those of dropped events too."""
    placed = dataset.users.lazy().select("user", site=pl.Series(sites))
    found = (
        dataset.log.select("user", pl.col("kind").fill_null(DEFAULT_KIND))
        .join(placed, on="user", how="inner")
        .select("site", "kind")
        .unique()
        .group_by("site")
        .agg("kind")
        .collect(engine="streaming")
    )
    return dict(found.iter_rows())


def make_site(
    folder: Path,
    name: str,
    training: Histories,
    plan: Plan,
    catalog_file: Path,
    budget: float,
    performance: Performance | None = None,
) -> None:
    """One new site, whole or not at all: its histories, a policy that allows every plan, and a ledger whose cap is
    `budget` (epsilon)."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True, mode=0o700)
    site = Site(
        folder=aside,
        name=name,
        catalog=catalog_file,
        users_at_least=plan.privacy.users_per_site,
        families=tuple(FAMILIES),
        metrics=plan.metrics.share > 0,
        limits=ANY_PLAN,
        performance=performance or Performance(),
    )
    site.save()
    training.save(site.histories_folder)
    Ledger.create(
        site.ledger_folder, epsilon=budget, delta=plan.privacy.delta, typical_plan=plan.events()
    ).disconnect()
    aside.rename(folder)
    sync_folder(folder.parent)


def enroll_site(folder: Path, name: str, registry: Registry) -> None:
    """Hands a site's genesis to the server, where it does not hold it yet, and the server's key to the site."""
    trust_once(folder, registry.server_key)
    with Ledger.open(Site.load(folder).ledger_folder) as ledger:
        if registry.site(ledger.key_id) is None:
            registry.enroll(name, ledger.entries(0)[0])


def trust_once(folder: Path, server_key: str) -> None:
    """The site in a folder believes this server, and no other, from now on."""
    with contextlib.suppress(NoServerKeyError):
        if trusted_key(folder) == server_key:
            return
    trust(folder, server_key)


def place_sites(registry: Registry, nodes: Mapping[int, str]) -> None:
    """Tells the server which enrolled site answers from which node: node -> name. A real one knows it by node keys."""
    enrolled = {site.name: site.key_id for site in registry.sites()}
    registry.place({node: enrolled[name] for node, name in nodes.items()})


def make_sites(
    dataset: Dataset,
    sites: npt.NDArray[np.int64],
    plan: Plan,
    policy: CleaningPolicy,
    root: Path,
    registry: Registry,
    catalog_file: Path,
    split: Split,
    *,
    budget: float | None,
    seed: int,
    performance: Performance | None = None,
) -> list[SimulatedSite]:
    """Makes, or finds in `root`, one site for each number in `sites`, enrolled in the registry.

    Args:
        sites: [users of dataset.users] from `partition.divide`.
        plan: calibrated.
        split: what of each user's events a site may hold.
        budget: epsilon cap of each new site's ledger; None for the smallest that admits the plan.
        performance: how every site computes; None: new ones as by default, others as before.

    Raises:
        SiteError: a site has fewer users than the plan counts on, or the folder holds other sites, or sites that
            may hold what this split keeps back.
    """
    count = int(sites.max()) + 1
    found = sorted(path for path in root.glob("[0-9]*") if path.is_dir())
    marker, which = root / _BEING_MADE, _which_sites(dataset, sites, split, seed)
    making = marker.is_file() or not found
    if making and found and marker.read_text(encoding="utf-8") != which:
        raise SiteError(
            f"{root} holds a part of other sites, whose making was interrupted: delete it, as nobody has asked them "
            "for anything yet, or choose another folder"
        )
    if not making and len(found) != count:
        raise SiteError(f"{root} holds {len(found)} sites, but {count} are asked for: choose another folder")
    remembered = root / SPLIT_FILE
    if making:
        root.mkdir(parents=True, exist_ok=True)
        write_whole(remembered, split.name.encode() + b"\n")
        write_whole(marker, which.encode())
    else:
        made_under = (
            remembered.read_text(encoding="utf-8").strip() if remembered.is_file() else LeaveOneOut().name
        )
        if made_under != split.name:
            raise SiteError(
                f"the sites in {root} were made under the split {made_under}, and may hold events that the split "
                f"{split.name} keeps back: choose another folder"
            )
    if making and budget is None:
        budget, _ = smallest_budget(plan.events(), plan.privacy.delta)
    cleaned = histories_of_sites(dataset, sites, policy, seed)
    made = []
    for number in range(count):
        folder = root / f"{number:05d}"
        name = site_name(number)
        training = split.training(next(cleaned)) if making else None
        if budget is not None and training is not None and not folder.is_dir():
            if len(training) < plan.privacy.users_per_site:
                raise SiteError(
                    f"{name} has {len(training)} users, but the plan's sampling counts on at least "
                    f"{plan.privacy.users_per_site}: use fewer sites, or lower privacy.users_per_site"
                )
            make_site(folder, name, training, plan, catalog_file, budget, performance)
        elif performance is not None:
            replace(Site.load(folder), performance=performance).save()
        with registry.kept_open():
            enroll_site(folder, name, registry)
        training = Histories.load(Site.load(folder).histories_folder)
        made.append(SimulatedSite(name=name, folder=folder, users=len(training), events=training.events))
    marker.unlink(missing_ok=True)
    return made


def _which_sites(dataset: Dataset, sites: npt.NDArray[np.int64], split: Split, seed: int) -> str:
    """A digest of who falls to which site, and of what is held out."""
    digest = hashlib.sha256(f"{seed} {split.name}\n".encode() + sites.tobytes())
    digest.update("\n".join(dataset.users["user"].to_list()).encode())
    return digest.hexdigest()
