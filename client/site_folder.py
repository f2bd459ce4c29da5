"""A site's folder: what it is called, where what lies in it, and what its policy allows. How it answers: `site.py`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from client.ledger_errors import RESTORE
from client.policy import POLICY, Limits, Performance, Policy, policy_text, read_policy

SECRET = "secret"
"""Under which users were de-identified, in a site's folder."""


class SiteError(ValueError):
    """A site's folder is not in order; the message says what is wrong and what to do."""


def _no_site(folder: Path) -> str:
    """Why there is no site to read; where one was, a new one is no way out."""
    if not folder.exists():
        return f"{folder} is not there: give the folder of a site"
    if not folder.is_dir():
        return f"{folder} is a file: give the folder of a site"
    if not any(folder.iterdir()):
        return f"{folder} holds nothing: give the folder of a site"
    if (folder / "site.json").exists():
        return f"{folder / 'site.json'} is damaged: {RESTORE}"
    if (folder / "ledger").exists():
        return f"{folder / 'site.json'} is lost: {RESTORE}"
    return f"{folder} is no site's folder: give one that `fedtide site init` made"


def _catalog_of(folder: Path, said: str) -> Path:
    """Where a site's catalog lies: the folder's own copy where another place was said, and is there no more.

    Earlier versions named their own copy by where the folder stood then.
    """
    path = Path(os.path.normpath(folder / said))
    own = folder / path.name
    return own if not path.exists() and own.is_file() else path


@dataclass(frozen=True)
class Site:
    """Where a site keeps what.

    Attributes:
        folder: of the site, mode 0700.
        name: for its own logs.
        catalog: the public catalog's file.
        users_at_least: the public lower bound of users that the site has agreed to.
        families: names of the model families that may be trained here.
        offline: whether a language model may be fetched.
        metrics: whether metrics may be released from here, when a plan asks for them and the budget allows.
        limits: what else its policy bounds.
        performance: how it computes.
    """

    folder: Path
    name: str
    catalog: Path
    users_at_least: int
    families: tuple[str, ...] = ("recommend",)
    offline: bool = True
    metrics: bool = False
    limits: Limits = field(default_factory=Limits)
    performance: Performance = field(default_factory=Performance)

    @classmethod
    def load(cls, folder: Path) -> Site:
        """The site whose folder this is; `policy.toml` in it says what is allowed.

        Raises:
            SiteError: it is not in order.
            PolicyError: the policy is not.
        """
        try:
            fields = json.loads((folder / "site.json").read_text(encoding="utf-8"))
            name, catalog = str(fields["name"]), _catalog_of(folder, str(fields["catalog"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SiteError(_no_site(folder)) from error
        policy = read_policy(folder / POLICY)
        return cls(
            folder=folder,
            name=name,
            catalog=catalog,
            users_at_least=policy.users_at_least,
            families=policy.families,
            offline=policy.offline,
            metrics=policy.metrics,
            limits=policy.limits,
            performance=policy.performance,
        )

    def save(self) -> None:
        """Writes `site.json` and `policy.toml`. A catalog in the site's folder, or beside it, moves with it."""
        places = {self.folder: self.catalog.name, self.folder.parent: f"../{self.catalog.name}"}
        fields = {
            "name": self.name,
            "catalog": places.get(self.catalog.parent, str(self.catalog.absolute())),
        }
        (self.folder / "site.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        policy = Policy(
            users_at_least=self.users_at_least,
            families=self.families,
            metrics=self.metrics,
            offline=self.offline,
            performance=self.performance,
            **dict(self.limits),
        )
        (self.folder / POLICY).write_text(policy_text(policy), encoding="utf-8")

    @property
    def histories_folder(self) -> Path:
        """Cleaned histories, mode 0600."""
        return self.folder / "histories"

    @property
    def ledger_folder(self) -> Path:
        """The privacy ledger."""
        return self.folder / "ledger"

    def note_progress(self, request_round: int, step: int, steps: int) -> None:
        """Leaves a line for this site's own console: round, step, steps. Nothing of it is sent."""
        (self.folder / "progress").write_text(f"{request_round} {step} {steps}", encoding="ascii")
