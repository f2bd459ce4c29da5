"""Many simulated sites that answer in one go: each charges and releases on its own ledger, and all train in one batch.

For simulations, where one process holds many sites. Each site's exchange is what `site.answer` does, step by step;
only the training of those that were asked for the same round of the same model is shared (`training_together.py`).
Where a model does not allow that, its sites are trained one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import RecordDict
from torch import Tensor

from client import kept_ledgers
from client.generators import SECURE, Generators
from client.origin import heard
from client.site import Charged, charge, refusal_of, release_of, training_batch
from client.site_folder import Site
from client.training import StepSettings
from client.training_together import NotTogetherError, check_sites_apart, train_together
from common.models.batches import HistoryBatch, even_events
from common.models.interface import InterestModel
from common.phases import Phase
from common.wire import Refusal, Update, answer_to_records

_log = logging.getLogger("fedtide.site")

_MOST_NOTED = 16
"""Sites whose steps a console can show."""


@dataclass(frozen=True)
class Question:
    """A message for a site: where the site is, the content, and when it expires, in seconds since 1970."""

    folder: Path
    content: RecordDict
    until: float


def answered_together(questions: Sequence[Question], *, generators: Generators = SECURE) -> list[RecordDict]:
    """The answers, in order. Never raises, and tells no text. All sites' ledgers are open meanwhile.

    Args:
        generators: for audits and tests; each site gets its own of them.
    """
    return [answer_to_records(each) for each in _answered(questions, generators)]


def _answered(questions: Sequence[Question], generators: Generators) -> list[Update | Refusal]:
    charged: dict[int, Charged] = {}
    answers: dict[int, Update | Refusal] = {}
    try:
        for place, question in enumerate(questions):
            found = _charged(question)
            if isinstance(found, Charged):
                charged[place] = found
            else:
                answers[place] = found
        alike: dict[Hashable, list[int]] = {}
        for place, each in charged.items():
            alike.setdefault(_kind(each, place), []).append(place)
        for places in alike.values():
            answers |= _released({place: charged[place] for place in places}, generators)
    finally:
        for place, each in charged.items():
            if isinstance(answers.get(place), Update):
                kept_ledgers.leave(each.site.ledger_folder, each.ledger)
            else:
                each.ledger.disconnect()  # a reservation that is open still counts as abandoned
    return [answers[place] for place in range(len(questions))]


def _charged(question: Question) -> Charged | Update | Refusal:
    try:
        asked = heard(question.folder, question.content, question.until)
        return charge(Site.load(asked.folder), asked, opened=kept_ledgers.opened)
    except Exception as error:
        return refusal_of(error)


def _kind(charged: Charged, place: int) -> Hashable:
    """What sites must share to be trained together; a site that shares it with none stands alone."""
    request = charged.request
    if request.phase is not Phase.UPDATE:
        return place
    return request.plan, request.round, request.model_digest, id(charged.model), charged.site.performance


def _released(charged: dict[int, Charged], generators: Generators) -> dict[int, Update | Refusal]:
    first = next(iter(charged.values()))
    model = _model_of_all(first) if len(charged) > 1 and first.site.performance.engine == "fast" else None
    if model is not None:
        return _trained(charged, model, generators)
    return {place: _alone(each, generators) for place, each in charged.items()}


def _model_of_all(first: Charged) -> InterestModel | None:
    """The model that sites are trained in together; None where each is to be trained by itself.

    What keeps them apart is said of made-up users, before any history is looked at.
    """
    try:
        model = first.ready()
        if model is not None:
            check_sites_apart(model, _settings(first).micro_batch, even_events(first.plan.model.max_events))
        return model
    except Exception as error:
        said = error if isinstance(error, NotTogetherError) else type(error).__name__
        _log.info("sites are trained one after the other: %s", said)
        return None


def _alone(charged: Charged, generators: Generators) -> Update | Refusal:
    try:
        charged.ready()
        state = release_of(charged, generators=generators)
    except Exception as error:
        return _failed(charged, error)
    return _committed(charged, state)


def _trained(
    charged: dict[int, Charged], model: InterestModel, generators: Generators
) -> dict[int, Update | Refusal]:
    """One batch for all; a site whose histories cannot be read leaves it, and stays charged."""
    answers: dict[int, Update | Refusal] = {}
    batches: dict[int, HistoryBatch] = {}
    for place, each in charged.items():
        try:
            batches[place] = training_batch(each)
        except Exception as error:
            answers[place] = _failed(each, error)
    if not batches:
        return answers
    first = charged[next(iter(batches))]
    settings = _settings(first)

    def on_step(step: int) -> None:
        for place in batches if len(batches) <= _MOST_NOTED else ():
            charged[place].site.note_progress(first.request.round, step, settings.steps)

    try:
        states = train_together(
            model,
            list(batches.values()),
            settings,
            samplers=[generators.sampler() for _ in batches],
            noises=[generators.noise() for _ in batches],
            on_step=on_step,
        )
    except Exception as error:  # nothing of it has left a site
        return answers | {place: _failed(charged[place], error) for place in batches}
    return answers | {
        place: _committed(charged[place], state) for place, state in zip(batches, states, strict=True)
    }


def _settings(charged: Charged) -> StepSettings:
    """Of a round's steps; a batch holds rows of all sites, so it is as large as the sites allow."""
    performance = charged.site.performance
    return replace(StepSettings.of(charged.plan, performance), micro_batch=performance.micro_batch)


def _committed(charged: Charged, state: dict[str, Tensor]) -> Update | Refusal:
    try:
        return charged.released(state)
    except Exception as error:
        return refusal_of(error)


def _failed(charged: Charged, error: Exception) -> Refusal:
    """Where not even that can be written down, the next recovery of that ledger burns it; other sites go on."""
    try:
        return charged.failed(error)
    except Exception as unwritten:
        return refusal_of(unwritten)
