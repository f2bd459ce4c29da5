"""A data site: its folder with logs, keys, ledger and policy, and how it answers one request.

The order is the contract's: check the plan against the site's policy, reserve the cost, look at the data,
train or sum, commit release and receipt together, answer. Whatever goes wrong after the reservation, it stays charged,
and the server learns one word.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.ledger import Ledger
from client.ledger_errors import BudgetRefusedError, LedgerError
from client.statistics import release_metrics, release_statistics
from client.training import StepSettings, train_round
from common.assets import home, language_model
from common.config import Plan, PlanError, make_plan
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.events.labels import padded_labels
from common.models.batches import HistoryBatch
from common.models.build import build_model, item_texts
from common.models.interface import InterestModel
from common.models.priors import make_priors
from common.phases import Phase
from common.privacy.anchors import Countersignature
from common.privacy.faults import AfterCloseError, ReceiptError, SecondReservationError
from common.privacy.mechanisms import Event
from common.privacy.noise import SecureGaussian, SecurePoissonSampler
from common.sums import POPULARITY
from common.wire import Reason, Refusal, Request, Update, state_from_bytes, state_to_bytes

_log = logging.getLogger("fedtide.site")


class SiteError(ValueError):
    """A site's folder is not in order; the message says what is wrong and what to do."""


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
    """

    folder: Path
    name: str
    catalog: Path
    users_at_least: int
    families: tuple[str, ...] = ("recommend",)
    offline: bool = True
    metrics: bool = False

    @classmethod
    def load(cls, folder: Path) -> Site:
        """The site whose folder this is.

        Raises:
            SiteError: it is not in order.
        """
        try:
            fields = json.loads((folder / "site.json").read_text(encoding="utf-8"))
            return cls(
                folder=folder,
                name=str(fields["name"]),
                catalog=Path(os.path.normpath(folder / str(fields["catalog"]))),
                users_at_least=int(fields["users_at_least"]),
                families=tuple(fields["families"]),
                offline=bool(fields["offline"]),
                metrics=fields.get("metrics", False) is True,
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SiteError(
                f"{folder} holds no site that can be read: make one with `fedtide site init`"
            ) from error

    def save(self) -> None:
        """Writes `site.json`. A catalog that stands beside the site moves with it."""
        beside = self.catalog.parent == self.folder.parent
        fields = {
            "name": self.name,
            "catalog": f"../{self.catalog.name}" if beside else str(self.catalog.absolute()),
            "users_at_least": self.users_at_least,
            "families": list(self.families),
            "offline": self.offline,
            "metrics": self.metrics,
        }
        (self.folder / "site.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

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


_MODELS: OrderedDict[tuple[str, str], InterestModel] = OrderedDict()
_MODELS_KEPT = 2


def site_model(plan: Plan, catalog: Catalog, *, offline: bool) -> InterestModel:
    """The plan's model over a catalog, built once for each process and plan."""
    key = (plan.model.model_dump_json(), catalog.digest())
    if key not in _MODELS:
        while len(_MODELS) >= _MODELS_KEPT:
            _MODELS.popitem(last=False)
        built = build_model(
            plan.model,
            item_texts(catalog.texts, catalog.categories),
            language_model(plan.model.encoder, offline=offline),
            cache=home() / "item-vectors",
            categories=catalog.categories,
        )
        _MODELS[key] = built.model.to(device_of(plan))
    _MODELS.move_to_end(key)
    return _MODELS[key]


def device_of(plan: Plan) -> torch.device:
    """CUDA where there is one, unless the plan says otherwise."""
    if plan.performance.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(plan.performance.device)


def answer(site: Site, request: Request) -> Update | Refusal:
    """One exchange at a site: reserve, compute, commit, answer. Never raises for what a request or the data do."""
    try:
        plan, event = _accepted_plan(site, request)
    except PlanError as error:
        _log.warning("site %s refuses a plan: %s", site.name, error)
        return Refusal(Reason.PLAN)
    if request.phase is Phase.METRICS and not site.metrics:
        _log.warning("site %s refuses: its policy releases no metrics", site.name)
        return Refusal(Reason.POLICY)
    with Ledger.open(site.ledger_folder) as ledger:
        kept = ledger.outbox(request.run, request.round, nonce=request.nonce)
        if kept is not None:  # a retry sends the same bytes
            update, receipt = kept
            return Update(state=state_from_bytes(update), receipt=receipt.to_bytes())
        stated = plan.stated(request.phase)
        try:
            # Without an anchor the server may hold the genesis alone: another server than before, say.
            held = 0
            if request.anchor is not None:
                anchor = Countersignature.from_bytes(request.anchor)
                if anchor.site_key_id == ledger.key_id:  # else this node had another ledger before
                    ledger.anchor(anchor)
                    held = anchor.seq
            ledger.recover()  # not before: a copy from an old backup must write nothing
            reservation = ledger.reserve(
                run=request.run,
                round=request.round,
                attempt=request.attempt,
                event=event,
                plan_hash=plan.digest(),
                model_hash=request.model_digest,
                nonce=request.nonce,
                clip_norm=stated.clip_norm,
                normaliser=stated.normaliser,
                learning_rate=stated.learning_rate,
            )
        except BudgetRefusedError as error:
            _log.warning("site %s refuses: %s", site.name, error)
            return Refusal(Reason.BUDGET)
        except AfterCloseError:
            return Refusal(Reason.CLOSED)
        except (SecondReservationError, ReceiptError, LedgerError) as error:
            _log.warning("site %s refuses a request: %s", site.name, error)
            return Refusal(Reason.POLICY)
        # From here on the round is charged, whatever happens: a failure is one word to the server.
        try:
            state = _release(site, plan, request)
        except Exception as error:
            ledger.burn(reservation)
            # The text of an error may depend on the data, so only its type is logged.
            _log.error("site %s failed in a round after its reservation: %s", site.name, type(error).__name__)
            return Refusal(Reason.FAILED)
        receipt_bytes = ledger.release(
            reservation, state_to_bytes(state), content=request.phase.content, anchored_seq=held
        ).to_bytes()
    return Update(state=state, receipt=receipt_bytes)


def _accepted_plan(site: Site, request: Request) -> tuple[Plan, Event]:
    """The plan, and what its round costs; looks at no data."""
    try:
        values: Any = json.loads(request.plan)
    except (ValueError, RecursionError) as error:
        raise PlanError("the plan is no JSON") from error
    if not isinstance(values, dict):
        raise PlanError("the plan is no table")
    plan = make_plan(values)
    event = plan.exchange(request.round, request.phase).event
    if plan.model.family not in site.families:
        raise PlanError(f"family {plan.model.family} is not on the site's list")
    if plan.privacy.users_per_site > site.users_at_least:
        raise PlanError(
            f"the plan counts on {plan.privacy.users_per_site} users, but the site agreed to {site.users_at_least}"
        )
    if request.phase is Phase.TRANSITIONS and POPULARITY not in request.released:
        raise PlanError("transitions are asked for before popularity was released")
    return plan, event


def _release(site: Site, plan: Plan, request: Request) -> dict[str, torch.Tensor]:
    """What leaves the site for a request whose cost is reserved: the first look at the data is here."""
    if plan.performance.threads is not None:
        torch.set_num_threads(plan.performance.threads)
    catalog = Catalog.load(site.catalog)
    histories, held_out = Histories.load(site.histories_folder), None
    if plan.metrics.share:  # each user's last event is for the metrics, and for nothing else
        histories, last = histories.without_last(1)
        held_out = last[:, 0].astype(np.int64)
    noise = SecureGaussian()
    if request.phase in (Phase.POPULARITY, Phase.TRANSITIONS):
        return release_statistics(histories, len(catalog), plan.statistics, request, noise)
    model = site_model(plan, catalog, offline=site.offline)
    model.load_trainable({name: tensor.to(device_of(plan)) for name, tensor in request.state.items()})
    model.set_released(make_priors(request.released, plan.statistics, len(catalog)))
    if held_out is not None and request.phase is Phase.METRICS:
        return release_metrics(model, histories, held_out, plan, noise)
    everyone, longest = range(len(histories)), plan.model.max_events
    items, times = histories.padded(everyone, longest)
    labels = padded_labels(histories, everyone, longest, plan.model.label_rule)
    settings = StepSettings.of(plan)

    def on_step(step: int) -> None:
        site.note_progress(request.round, step, settings.steps)

    return train_round(
        model,
        HistoryBatch.of(items, times, device_of(plan), labels=labels),
        settings,
        sampler=SecurePoissonSampler(),
        noise=noise,
        on_step=on_step,
    )
