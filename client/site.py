"""A data site: how it answers one request.

The order is the contract's: see that it is the server who asks (`origin.py`), check the plan against the site's policy,
build the model and have it show that its rows are users, reserve the cost, look at the data, train or sum, commit
release and receipt together, answer. Whatever goes wrong after the reservation, it stays charged, and the server learns
one word.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from client.generators import SECURE, Generators
from client.kept import device_of, kept_batch, kept_catalog, kept_histories, site_model, take_threads
from client.ledger import Ledger
from client.ledger_errors import (
    BudgetRefusedError,
    LedgerBehindError,
    LedgerDiskError,
    LedgerError,
    MarkLostError,
)
from client.ledger_reading import Reservation
from client.lower_states import LOWER_STATES, prepare_kept
from client.origin import Asked, OriginError, say_seldom
from client.plan_check import check_memory, check_plan
from client.policy import Performance
from client.self_test import rows_of_scores, rows_of_units
from client.server_key import NoServerKeyError
from client.site_folder import Site
from client.statistics import release_metrics, release_statistics
from client.training import StepSettings, train_round
from common.config import Plan, PlanError, make_plan
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.events.labels import padded_labels
from common.models.batches import HistoryBatch
from common.models.interface import InterestModel
from common.models.priors import make_priors
from common.phases import Phase
from common.precision import check_finite, encoded
from common.privacy.anchors import Countersignature
from common.privacy.faults import AfterCloseError, ReceiptError, SecondReservationError
from common.privacy.mechanisms import Event
from common.privacy.noise import LARGEST_DIMENSION
from common.sums import POPULARITY, PairLayout
from common.wire import Reason, Refusal, Request, Update, WireError, state_to_bytes

_log = logging.getLogger("fedtide.site")


@dataclass(frozen=True)
class Charged:
    """A request whose cost is reserved: the round is charged from here on, whatever happens.

    Attributes:
        catalog, model: with what was broadcast loaded; no model where a sum needs none.
        ledger: open, in the thread that opened it.
        held: the newest entry that the server says it holds.
    """

    site: Site
    request: Request
    plan: Plan
    catalog: Catalog
    model: InterestModel | None
    ledger: Ledger
    reservation: Reservation
    held: int

    def ready(self) -> InterestModel | None:
        """The model with what was broadcast, loaded again: sites of one process share it."""
        return _ready_model(self.site, self.plan, self.request, self.catalog)

    def released(self, state: dict[str, torch.Tensor]) -> Update | Refusal:
        """Commits what leaves the site, with its receipt."""
        try:
            check_finite(state)
            data = state_to_bytes(
                encoded(state, self.plan.precision(self.request.phase))
            )  # the noise is in it
        except Exception as error:
            return self.failed(error)
        content = self.request.phase.content
        receipt = self.ledger.release(self.reservation, data, content=content, anchored_seq=self.held)
        self.say("answered with a release")
        return Update(data, receipt.to_bytes())

    def failed(self, error: Exception) -> Refusal:
        """Gives the reservation up. The text of an error may depend on the data, so only its type is logged."""
        self.ledger.burn(self.reservation)
        _log.error(
            "site %s failed in a round after its reservation: %s", self.site.name, type(error).__name__
        )
        self.say("answered without a release")
        return Refusal(Reason.FAILED)

    def say(self, what: str) -> None:
        """A line for the site's own log: which request, what came of it, what it cost, what is left."""
        body, cap = self.reservation.body, self.ledger.genesis.cap
        _log.info(
            "%s: %s; %s costs %.3f %% of the budget, and %.3f %% is left",
            named(self.request),
            what,
            body.event,
            100 * body.charge / cap,
            100 * (1 - body.spent / cap),
        )


def named(request: Request) -> str:
    """A request by its run, round and phase."""
    return f"run {request.run}, round {request.round}, {request.phase.value}"


def answer(site: Site, asked: Asked, *, generators: Generators = SECURE) -> Update | Refusal:
    """One exchange at a site: reserve, compute, commit, answer. Never raises for what a request or the data do.

    Args:
        asked: of this site.
        generators: for audits and tests; a site that answers a server leaves them out.
    """
    charged = charge(site, asked)
    if not isinstance(charged, Charged):
        return charged
    with charged.ledger:
        try:
            state = release_of(charged, generators=generators)
        except Exception as error:
            return charged.failed(error)
        return charged.released(state)


def charge(
    site: Site, asked: Asked, *, opened: Callable[[Path], Ledger] | None = None
) -> Charged | Update | Refusal:
    """The first half of an exchange: everything up to the reservation. Looks at no user's data.

    Args:
        asked: of this site; where it expires meanwhile, nothing is spent for an answer that nobody awaits.
        opened: gives the ledger in a folder; None: opens it.

    Returns:
        The reservation, with the ledger open; or the answer, where there is one without it.
    """
    try:
        request = asked.request
        plan, event = _accepted_plan(site, request)
    except WireError as error:
        return refusal_of(error)
    except PlanError as error:
        _log.warning("site %s refuses a plan: %s", site.name, error)
        return Refusal(Reason.PLAN)
    if request.phase is Phase.METRICS and not site.metrics:
        _log.warning("site %s refuses: its policy releases no metrics", site.name)
        return Refusal(Reason.POLICY)
    ledger = (opened or Ledger.open)(site.ledger_folder)
    charged: Charged | Update | Refusal | None = None
    try:
        charged = _charge(site, request, plan, event, ledger, asked.until)
    finally:
        if not isinstance(charged, Charged):
            ledger.disconnect()
    return charged


def _charge(
    site: Site, request: Request, plan: Plan, event: Event, ledger: Ledger, until: float
) -> Charged | Update | Refusal:
    if request.site != ledger.key_id:  # the folder's ledger was replaced since the request was heard
        return refusal_of(OriginError("it is for another site"))
    kept = ledger.outbox(request.run, request.round, nonce=request.nonce)
    if kept is not None:  # a retry sends the same bytes
        _log.info("%s: answered with the bytes that it was answered with before", named(request))
        update, receipt = kept
        return Update(update, receipt.to_bytes())
    try:  # no user's data is looked at here, so the error's text may be logged
        catalog = kept_catalog(site.catalog)
        plan.check_catalog(catalog.digest())
        check_memory(
            plan, site.limits, site.performance, items=len(catalog), categories=catalog.category_count
        )
        model = _ready_model(site, plan, request, catalog)
    except PlanError as error:
        _log.warning("site %s refuses a plan: %s", site.name, error)
        return Refusal(Reason.PLAN)
    except Exception as error:
        _log.warning("site %s refuses a model: %s", site.name, error)
        return Refusal(Reason.MODEL)
    try:
        with ledger.at_once():  # the disk is waited for once
            held = _anchored(ledger, request)
            ledger.recover()  # not before: a copy from an old backup must write nothing
            reservation = _reserved(site, request, plan, event, ledger, until)
    except LedgerDiskError as error:
        _log.error("site %s refuses a request: %s", site.name, error)
        return Refusal(Reason.FAILED)
    except (ReceiptError, LedgerError) as error:
        _log.warning("site %s refuses a request: %s", site.name, error)
        return Refusal(Reason.POLICY)
    if isinstance(reservation, Refusal):
        return reservation
    charged = Charged(site, request, plan, catalog, model, ledger, reservation, held)
    charged.say("charged")
    return charged


def _anchored(ledger: Ledger, request: Request) -> int:
    """Keeps the server's countersignature; the newest entry that it holds.

    Without an anchor that may be the genesis alone: another server than before, say.
    """
    if request.anchor is not None:
        anchor = Countersignature.from_bytes(request.anchor)
        if anchor.site_key_id == ledger.key_id:  # else this node had another ledger before
            ledger.anchor(anchor)
            return anchor.seq
    return 0


def _reserved(
    site: Site, request: Request, plan: Plan, event: Event, ledger: Ledger, until: float
) -> Reservation | Refusal:
    if not time.time() <= until:
        _log.warning(
            "site %s refuses: the request of round %d has expired, and nothing is spent for it; this machine "
            "was too slow for the plan's round_deadline, or stood still, or its clock is ahead",
            site.name,
            request.round,
        )
        return Refusal(Reason.EXPIRED)
    stated = plan.stated(request.phase)
    try:
        return ledger.reserve(
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
        _log.warning(
            "site %s refuses: it has withdrawn, and answers nothing more; end its `site up`", site.name
        )
        return Refusal(Reason.CLOSED)
    except LedgerDiskError:
        raise
    except (SecondReservationError, ReceiptError, LedgerError) as error:
        _log.warning("site %s refuses a request: %s", site.name, error)
        return Refusal(Reason.POLICY)


def refusal_of(error: Exception) -> Refusal:
    """What a server learns of an exception: one word. Flower would send its text, and texts may depend on the data."""
    if isinstance(error, OriginError | NoServerKeyError):
        say_seldom(error)
        return Refusal(error.reason if isinstance(error, OriginError) else Reason.ORIGIN)
    if isinstance(error, WireError):
        return Refusal(Reason.POLICY)
    if isinstance(error, LedgerDiskError | LedgerBehindError | MarkLostError):
        # its text tells nothing of the data, and nothing of it is sent
        _log.error("%s", error)
    else:
        _log.error("the site failed before or after its work: %s", type(error).__name__)
    return Refusal(Reason.FAILED)


def _accepted_plan(site: Site, request: Request) -> tuple[Plan, Event]:
    """The plan, and what its round costs; looks at no data."""
    plan = _plan(request.plan)
    event = plan.exchange(request.round, request.phase).event
    check_plan(plan, site.limits, site.families, site.users_at_least, site.performance)
    if request.phase is Phase.TRANSITIONS and POPULARITY not in request.released:
        raise PlanError("transitions are asked for before popularity was released")
    return plan, event


@lru_cache(maxsize=8)
def _plan(text: str) -> Plan:
    """Of one run every request carries the same."""
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError("the plan is no JSON") from error
    if not isinstance(values, dict):
        raise PlanError("the plan is no table")
    return make_plan(values)


_LOADED: WeakKeyDictionary[InterestModel, Hashable] = WeakKeyDictionary()
"""Models that hold what a request broadcast, untrained since: the sites of one process share a model."""


def _ready_model(site: Site, plan: Plan, request: Request, catalog: Catalog) -> InterestModel | None:
    """The model with what was broadcast, having shown that its rows are users; None where a sum needs no model.

    Looks at no user's data. All that can be refused is refused here, before anything is reserved.

    Raises:
        Exception: of whatever kind; the message says what does not fit.
    """
    check_finite(request.state)
    check_finite(request.released)
    take_threads(site.performance)
    if request.phase in (Phase.POPULARITY, Phase.TRANSITIONS):
        make_priors(request.released, plan.statistics, len(catalog))
        statistics = plan.statistics
        pairs = PairLayout(statistics.most_items(len(catalog)), statistics.symmetric)
        places = len(catalog) if request.phase is Phase.POPULARITY else pairs.places
        places += plan.privacy.witness_places
        if places > LARGEST_DIMENSION:
            raise ValueError(
                f"a sum of {places} places is asked for, but the noise vouches for {LARGEST_DIMENSION}"
            )
        return None
    model = site_model(
        plan, catalog, site.performance, offline=site.offline, language_models=site.limits.language_models
    )
    loaded = (request.plan, request.round, request.phase, request.model_digest, site.performance)
    if _LOADED.get(model) == loaded:
        return model
    priors = make_priors(request.released, plan.statistics, len(catalog)) if request.released else None
    model.hold_adapters(False)  # one model serves all rounds of a warm site
    model.load_trainable(
        {name: tensor.to(device_of(site.performance)) for name, tensor in request.state.items()}
    )
    model.set_released(priors)
    if request.phase is Phase.UPDATE:
        model.hold_adapters(plan.holds_adapters(request.round))
        unit_rows_of(model, plan, site.performance)
    if request.phase is Phase.METRICS:
        rows_of_scores(model, site.performance.micro_batch, plan.model.max_events)
    _LOADED[model] = loaded
    return model


def release_of(charged: Charged, *, generators: Generators = SECURE) -> dict[str, torch.Tensor]:
    """What leaves the site for a request whose cost is reserved: the first look at the data is here."""
    site, plan, request, model = charged.site, charged.plan, charged.request, charged.model
    if model is not None:
        _LOADED.pop(model, None)
    whole = kept_histories(site.histories_folder)
    histories, held_out = whole, None
    if plan.metrics.share:  # each user's last event is for the metrics, and for nothing else
        histories, last = whole.without_last(1)
        held_out = last[:, 0].astype(np.int64)
    noise = generators.noise()
    if model is None:
        places = plan.privacy.witness_places
        return release_statistics(histories, len(charged.catalog), plan.statistics, request, noise, places)
    if held_out is not None and request.phase is Phase.METRICS:
        at_once = site.performance.micro_batch
        return release_metrics(model, histories, held_out, plan, noise, unit_rows=at_once)
    settings = StepSettings.of(plan, site.performance)
    rows = unit_rows_of(model, plan, site.performance)
    device = device_of(site.performance)

    def on_step(step: int) -> None:
        site.note_progress(request.round, step, settings.steps)

    def prepared() -> HistoryBatch:
        batch = _batch(histories, plan, device)
        return prepare_kept(model, batch, rows, site.folder / LOWER_STATES)

    return train_round(
        model,
        kept_batch(model, whole, (plan.model, bool(plan.metrics.share), device), prepared),
        settings,
        sampler=generators.sampler(),
        noise=noise,
        on_step=on_step,
    )


def unit_rows_of(model: InterestModel, plan: Plan, performance: Performance) -> int:
    """The rows of a step's units, as the model shows at its present parameters (`self_test.rows_of_units`)."""
    settings = StepSettings.of(plan, performance)
    return rows_of_units(model, settings.micro_batch, plan.model.max_events, settings.engine)


def _batch(histories: Histories, plan: Plan, device: torch.device) -> HistoryBatch:
    """Every user, as the model reads them."""
    everyone, longest = range(len(histories)), plan.model.max_events
    items, times = histories.padded(everyone, longest)
    labels = padded_labels(histories, everyone, longest, plan.model.label_rule)
    return HistoryBatch.of(items, times, device, labels=labels)


def training_batch(charged: Charged) -> HistoryBatch:
    """What a round of private fine-tuning reads of the site's data, anew: for sites that are trained together."""
    histories = Histories.load(charged.site.histories_folder)
    if charged.plan.metrics.share:
        histories, _ = histories.without_last(1)
    return _batch(histories, charged.plan, device_of(charged.site.performance))
