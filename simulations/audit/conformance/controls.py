"""Positive controls: code broken on purpose, which the same checks must refuse. One that passes shows a blind check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from client.site_folder import Site
from client.training import StepSettings
from common.config import Plan
from common.events.histories import Histories
from common.models.batches import HistoryBatch, concatenate
from common.models.interface import InterestModel
from common.phases import Phase, StatisticsPlan
from common.privacy.noise import GaussianNoise, SecureGaussian
from common.wire import Request, Update, answer_from_records, answer_to_records
from common.witness import WITNESS
from simulations.audit.conformance.checking import ANSWER, attempted
from simulations.audit.conformance.code import Code, Everyone, SameAgain
from simulations.audit.conformance.noise import forked_noise, noise_checks
from simulations.audit.conformance.reply import reply_checks
from simulations.audit.conformance.sampling import RATE, STEPS, USERS, forked_sampling, judge, sampling
from simulations.audit.conformance.sensitivity import rows_are_users, sensitivity
from simulations.audit.conformance.subjects import Subject, a_subject
from simulations.audit.conformance.sums import sum_checks
from simulations.audit.evidence import Check
from simulations.audit.trainers import ChangedNoise, Normals, Silence, Trainer, changed_trainer

if TYPE_CHECKING:
    from flwr.app import RecordDict

Masks = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


class InMemory:
    """A generator with a state of its own in memory, as numpy's; and a sampler that draws from it."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng()

    def normal(self, size: int) -> Normals:
        """Normals that a copy of the process repeats."""
        return self._generator.standard_normal(size)

    def sample(self, users: int, rate: float) -> Masks:
        """Users whom a copy of the process draws too."""
        return self._generator.random(users) < rate


class FixedSize:
    """Batches of one size."""

    def sample(self, users: int, rate: float) -> Masks:
        """As many as are expected, never more or fewer."""
        return np.random.default_rng().permutation(users) < round(rate * users)


def _coins(normals: Normals) -> Normals:
    """As wide as normals are, but heads or tails."""
    return np.where(normals > 0, 1.0, -1.0)


def _without_first(normals: Normals) -> Normals:
    """No noise at the first place."""
    return np.where(np.arange(normals.size) == 0, 0.0, normals)


def _in_the_witness(update: dict[str, Tensor]) -> dict[str, Tensor]:
    size = sum(float(change.norm()) for change in update.values())
    return {**update, WITNESS: update[WITNESS] + size}


def controls(code: Code, folder: Path) -> list[Check]:
    """One check for each fault: whether it was refused by the check that is meant to refuse it."""
    small = a_subject(folder, "recommend", "vectors", "cpu")
    separable = a_subject(folder, "recommend", "vectors", "cpu", items=3 * USERS, off_start=0.0)
    asked = [
        *_of_training(small, code),
        *_of_noise(small, code),
        *_of_sampling(separable, code),
        *_of_sums(small, code, folder),
    ]
    return [refused(*each) for each in asked]


Control = tuple[str, str, Callable[[], Sequence[Check]]]


def refused(name: str, fault: str, ask: Callable[[], Sequence[Check]]) -> Check:
    """Whether a fault was refused by the check of that name."""
    found = [check for check in attempted(name, "control", ask) if check.name == name]
    # Code that breaks off was not measured, so nothing is shown of the check.
    caught = next((check for check in found if not check.holds and check.bound != ANSWER), None)
    said = f"Broken on purpose ({fault}) and {'refused' if caught else 'NOT refused: this check is blind'}."
    measured = caught.measured if caught else None
    return Check(name, f"control: {fault}", measured, "refused", caught is not None, said, control=True)


def _of_training(subject: Subject, code: Code) -> Iterator[Control]:
    def clipped_late(settings: StepSettings, _: int) -> StepSettings:
        return replace(settings, clip_norm=1e3 * settings.clip_norm)

    def counted(settings: StepSettings, users: int) -> StepSettings:
        return replace(settings, normaliser=float(max(users, 1)))

    changed = partial(changed_trainer, code.trainer)

    def seen(trainer: Trainer) -> Callable[[], Sequence[Check]]:
        return lambda: sensitivity(subject, replace(code, trainer=trainer))

    def with_loss(update: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**update, "loss": torch.zeros(1)}

    yield "sensitivity", "nobody clipped", seen(changed(settings_of=clipped_late))
    yield (
        "sensitivity",
        "each user in two rows",
        seen(changed(rows_of=lambda rows: concatenate([rows, rows]))),
    )
    yield "own row", "divided by the number of users", seen(changed(settings_of=counted))
    yield "absent user", "everyone in every step", seen(changed(sampler_of=lambda *_: Everyone()))
    yield "witness", "the size of the update in the witness", seen(changed(update_of=_in_the_witness))
    yield "update fields", "a loss beside the update", seen(changed(update_of=with_loss))
    yield "rows are users", "a loss that mixes users", lambda: _mixed(subject)


def _mixed(subject: Subject) -> list[Check]:
    with _mixing_users(subject.model):
        return rows_are_users(subject)


@contextmanager
def _mixing_users(model: InterestModel) -> Iterator[None]:
    """Each user's loss is weighed by the others'."""
    real: Callable[[HistoryBatch], Tensor] = model.per_user_loss

    def mixed(batch: HistoryBatch) -> Tensor:
        losses = real(batch)
        return losses * torch.softmax(losses.detach(), dim=0)

    model.per_user_loss = mixed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.per_user_loss


def _of_noise(subject: Subject, code: Code) -> Iterator[Control]:
    again, memory = SameAgain(), InMemory()

    def with_noise(make: Callable[[], Any]) -> Callable[[], Sequence[Check]]:
        return lambda: noise_checks(subject, replace(code, noise=make), 4)

    def changed(change: Callable[[Normals], Normals]) -> Callable[[], Sequence[Check]]:
        return with_noise(lambda: ChangedNoise(SecureGaussian(), change))

    yield "noise level", "half the noise", changed(lambda normals: 0.5 * normals)
    yield "noise with users", "half the noise", changed(lambda normals: 0.5 * normals)
    yield "every coordinate", "one coordinate without noise", changed(_without_first)
    yield "normal", "heads or tails for noise", changed(_coins)
    yield "new noise", "one stream for every round", with_noise(again.rewind)
    yield (
        "forked noise",
        "a generator in memory",
        lambda: forked_noise(subject, replace(code, noise=lambda: memory)),
    )


def _of_sampling(subject: Subject, code: Code) -> Iterator[Control]:
    memory = InMemory()
    drawn = np.random.default_rng().random((STEPS, USERS)) < RATE
    twins, sticky = drawn.copy(), drawn.copy()
    twins[:, 1] = twins[:, 0]
    sticky[1::2] = sticky[0::2]
    yield "sampling", "batches of one size", lambda: sampling(subject, replace(code, sampler=FixedSize))
    yield (
        "sampling",
        "another rate",
        lambda: judge(drawn & (np.random.default_rng().random(drawn.shape) < 0.6), ""),
    )
    yield "independent users", "two users always together", lambda: judge(twins, "")
    yield "independent steps", "each batch used twice", lambda: judge(sticky, "")
    yield (
        "forked sampling",
        "a generator in memory",
        lambda: forked_sampling(subject, replace(code, sampler=lambda: memory)),
    )


def _of_sums(subject: Subject, code: Code, folder: Path) -> Iterator[Control]:
    def doubled(
        histories: Histories,
        catalog: int,
        plan: StatisticsPlan,
        request: Request,
        noise: GaussianNoise,
        witness: int,
    ) -> dict[str, Tensor]:
        released = code.statistics(histories, catalog, plan, request, noise, witness)
        again = code.statistics(histories, catalog, plan, request, Silence(), witness)
        return {name: released[name] + again[name] for name in released}

    def leaking(
        model: InterestModel, histories: Histories, held_out: Rows, plan: Plan, noise: GaussianNoise
    ) -> dict[str, Tensor]:
        return code.metrics(model, histories, held_out, plan, ChangedNoise(SecureGaussian(), _without_first))

    def counting(
        model: InterestModel, histories: Histories, held_out: Rows, plan: Plan, noise: GaussianNoise
    ) -> dict[str, Tensor]:
        released = code.metrics(model, histories, held_out, plan, noise)
        return {**released, "users": torch.tensor([float(len(histories))])}

    def with_count(site: Site, request: Request) -> RecordDict:
        from flwr.app import ConfigRecord, RecordDict

        users = len(Histories.load(site.histories_folder))
        return RecordDict({**code.reply(site, request), "metrics": ConfigRecord({"num-examples": users})})

    def with_hidden_count(site: Site, request: Request) -> RecordDict:
        sent = answer_from_records(code.reply(site, request))
        assert isinstance(sent, Update)
        users = f"{len(Histories.load(site.histories_folder)):08}"
        data = save_tensors(dict(sent.state), metadata={"n": users})
        return answer_to_records(Update(data, sent.receipt))

    def sums(name: str, **broken: Any) -> Callable[[], Sequence[Check]]:
        return lambda: sum_checks(subject, replace(code, **broken), only=(name,))

    yield "sum sensitivity", "each user counted twice", sums("popularity", statistics=doubled)
    yield "sum noise", "users without noise beside noisy hits", sums("metrics", metrics=leaking)
    yield "sum fields", "a count beside the metrics", sums("metrics", metrics=counting)
    counted = replace(code, reply=with_count)
    yield (
        "nothing else leaves",
        "a count in the reply",
        lambda: reply_checks(counted, folder, only=(Phase.POPULARITY,)),
    )
    hidden = replace(code, reply=with_hidden_count)
    yield (
        "nothing else leaves",
        "a count in the header of the tensors",
        lambda: reply_checks(hidden, folder, only=(Phase.POPULARITY,)),
    )
