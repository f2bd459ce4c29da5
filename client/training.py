"""User-level DP-SGD on one site: a plain function of (model, histories, settings, generators).

The sum of users' clipped gradients comes from one backward pass (`bookkeeping.py`); it gets noise from the
cryptographic generator on a fixed grid and is divided by a public constant. Before the first step a model shows on
made-up users that its rows are users, by Opacus' per-user gradients and by plain autograd over each user alone, and
that its clipped sum is theirs; every step asserts that each trainable parameter has exactly one row a user. There is
no switch that turns clipping or noise off. Budgets are not kept here: whoever calls has reserved the cost first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from client.bookkeeping import RowsAreNotUsersError, clipped_sums
from common.config import Plan
from common.memory import memory_kept
from common.models.batches import HistoryBatch, concatenate
from common.models.interface import InterestModel
from common.privacy.noise import LARGEST_DIMENSION, GaussianNoise, UserSampler, private_sum
from common.witness import WITNESS

VOUCHED_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear,)
"""Layers whose per-user gradients are tested against a loop over users. Others are refused at the start."""


class UnvouchedLayerError(ValueError):
    """The model has a trainable layer whose per-user gradients nobody here has checked."""


_SHOWN: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()
"""Models whose rows were shown to be users, with the names of the parameters that were trainable then."""


@dataclass(frozen=True)
class StepSettings:
    """Public constants of a round's steps.

    Attributes:
        sampling_rate: q.
        noise_multiplier: sigma.
        clip_norm: C.
        normaliser: divides each noised sum.
        steps: number of steps.
        learning_rate: of plain gradient descent.
        micro_batch: users at a time, for memory alone.
    """

    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    normaliser: float
    steps: int
    learning_rate: float
    micro_batch: int = 64

    @classmethod
    def of(cls, plan: Plan) -> StepSettings:
        """The settings of one round of a calibrated plan."""
        event = plan.round_event()
        return cls(
            sampling_rate=event.sampling_rate,
            noise_multiplier=event.noise_multiplier,
            clip_norm=plan.privacy.clip_norm,
            normaliser=plan.privacy.normaliser,
            steps=event.steps,
            learning_rate=plan.training.learning_rate,
            micro_batch=plan.performance.micro_batch,
        )


def check_layers(model: nn.Module) -> None:
    """Refuses a model with a trainable layer outside VOUCHED_LAYERS, one that mixes users, or too large a one.

    Raises:
        UnvouchedLayerError: names the layer and its type.
    """
    seen: dict[int, str] = {}
    witness = getattr(model, WITNESS, None)
    coordinates = 0 if witness is None else witness.numel()
    if witness is not None and witness.requires_grad:
        raise UnvouchedLayerError(
            "the witness would be trained, but holds noise alone: leave its requires_grad at False"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnvouchedLayerError(
                f"layer {name} is a {type(module).__name__}, which mixes users: remove it"
            )
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and type(module) not in VOUCHED_LAYERS:
            raise UnvouchedLayerError(
                f"trainable layer {name or 'model'} is a {type(module).__name__}; per-user gradients are vouched for "
                f"{', '.join(t.__name__ for t in VOUCHED_LAYERS)} only: freeze it, or build it from those"
            )
        for parameter in own:
            if parameter.dtype != torch.float32:
                raise UnvouchedLayerError(
                    f"trainable layer {name} is {parameter.dtype}; only float32 is clipped and noised"
                )
            if id(parameter) in seen:
                raise UnvouchedLayerError(
                    f"layers {seen[id(parameter)]} and {name} share a parameter; give each its own"
                )
            seen[id(parameter)] = name
            coordinates += parameter.numel()
    if not seen:
        raise UnvouchedLayerError("the model has no trainable parameter")
    if coordinates > LARGEST_DIMENSION:
        raise UnvouchedLayerError(
            f"the model has {coordinates} trainable coordinates, but the noise vouches for {LARGEST_DIMENSION}: "
            "lower width, hidden_width or lora_rank"
        )


@contextmanager
def per_user_gradients(model: InterestModel) -> Iterator[Callable[[HistoryBatch], list[Tensor]]]:
    """Gives a function from a batch to per-user gradients, one [users, *shape] a trainable parameter, in order.

    Opacus' hooks do the work on the model as it is (no wrapper), and are removed at the end.
    """
    from opacus.grad_sample import GradSampleHooks

    check_layers(model)
    model.train()
    parameters = list(model.trainable().values())
    hooks = GradSampleHooks(model, loss_reduction="sum")

    def gradients(batch: HistoryBatch) -> list[Tensor]:
        users = len(batch)
        if users == 0:  # transformers cannot run on no rows; no user contributes nothing
            return [p.new_zeros(0, *p.shape) for p in parameters]
        for parameter in parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        losses = model.per_user_loss(batch)
        if losses.shape != (users,):
            raise RowsAreNotUsersError(
                f"the loss has shape {tuple(losses.shape)}, but must be one number a user"
            )
        with warnings.catch_warnings():
            # Inputs of first layers need no gradient; the hooks do what they must all the same (tested).
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        rows: list[Tensor] = []
        for name, parameter in model.trainable().items():
            if parameter is model.witness:  # zero whatever the loss does: no user reaches it
                rows.append(parameter.new_zeros(users, *parameter.shape))
                continue
            sample = parameter.grad_sample  # type: ignore[attr-defined]
            if not isinstance(sample, Tensor) or sample.shape != (users, *parameter.shape):
                found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
                raise RowsAreNotUsersError(
                    f"parameter {name} has per-user gradients of shape {found}, but must have one row a user"
                )
            rows.append(sample)
        return rows

    try:
        yield gradients
    finally:
        hooks.remove_hooks()
        for parameter in parameters:
            parameter.grad = None
            for attribute in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)


def check_rows_are_users(model: InterestModel) -> None:
    """Shows on made-up histories that a user's row is that user's own gradient, whoever else is in the batch.

    Per-user gradients of four users in one batch are compared with plain autograd over each of them alone, at
    parameters moved off their start (where a zero layer would hide much). No real data is looked at, the
    parameters come back unchanged, and what was shown for a model once is not shown again. The witness, which
    no user may reach, is shown to play no part in any loss.

    Args:
        model: its loss must be a function of its inputs: one that draws at random fails here.

    Raises:
        UnvouchedLayerError: names the first parameter whose rows are something else.
    """
    check_layers(model)
    trainable = model.trainable()
    if _SHOWN.get(model) == tuple(trainable):
        return
    learned = {name: parameter for name, parameter in trainable.items() if parameter is not model.witness}
    device = next(iter(trainable.values())).device
    start = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trainable.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(device))
        batch = model.prepare(made_up_histories(model, device))
        _check_witness(model, batch)
        with per_user_gradients(model) as gradients:
            rows = gradients(batch)
        together = [sample for name, sample in zip(trainable, rows, strict=True) if name in learned]
        apart = _apart(model, batch, rows)
        alone: list[tuple[Tensor, ...]] = []
        for user in range(len(batch)):
            loss = model.per_user_loss(batch.rows(torch.tensor([user], device=device)))
            alone.append(torch.autograd.grad(loss.sum(), list(learned.values())))
    except RowsAreNotUsersError as error:
        raise UnvouchedLayerError(f"the model's rows are not users: {error}") from error
    finally:
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(start[name])
    for user, own in enumerate(alone):
        whole = torch.cat([gradient.flatten() for gradient in own]).norm()
        for name, row, gradient in zip(learned, (sample[user] for sample in together), own, strict=True):
            room = 1e-3 * torch.maximum(gradient.norm(), 1e-2 * whole)
            if not bool((row - gradient).norm() <= room):  # also where either is not finite
                raise UnvouchedLayerError(
                    f"parameter {name} gives a user another gradient in a batch than alone: a user's loss may "
                    "depend on that user, the catalog and the parameters only, and may not draw at random"
                )
    if not apart <= 1e-3:  # also where it is not finite
        raise UnvouchedLayerError(
            "a batch's clipped sum is not that of its users' gradients: a layer does something beside its product "
            "with its weight"
        )
    _SHOWN[model] = tuple(trainable)


def _apart(model: InterestModel, batch: HistoryBatch, rows: list[Tensor]) -> float:
    """How far a step's clipped sum lies from that of Opacus' rows, in C: with every user clipped, or with none."""
    with clipped_sums(model) as clipped:
        return max(
            (
                float((clipped(batch, clip_norm) - clipped_sum(rows, clip_norm)).norm()) / clip_norm
                for clip_norm in telling_clip_norms(rows)
            ),
            default=0.0,
        )


def telling_clip_norms(rows: list[Tensor]) -> tuple[float, ...]:
    """A C that clips every user whose gradient is not zero, and one that clips none; nothing where all are zero.

    Args:
        rows: one [users, *shape] float32 a parameter.
    """
    norms = torch.cat([sample.flatten(1) for sample in rows], dim=1).double().norm(dim=1)
    norms = norms[norms > 0]
    return (0.5 * float(norms.min()), 2.0 * float(norms.max())) if len(norms) else ()


def _check_witness(model: InterestModel, batch: HistoryBatch) -> None:
    """Shows that losses do not read the witness: it gets no gradient, and what is no number spoils none of them.

    The caller puts the witness back.

    Raises:
        UnvouchedLayerError: a loss does.
    """
    if model.witness is None:
        return
    with torch.no_grad():
        model.witness.fill_(math.nan)
    try:
        model.witness.requires_grad_(True)
        losses = model.per_user_loss(batch)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            losses.sum(), [model.witness], allow_unused=True
        )
    finally:
        model.witness.requires_grad_(False)
        with torch.no_grad():
            model.witness.zero_()
    if found[0] is not None or not bool(losses.isfinite().all()):
        raise UnvouchedLayerError(
            "a user's loss reads the witness, which must hold noise alone: take model.witness out of the loss"
        )


def made_up_histories(model: InterestModel, device: torch.device) -> HistoryBatch:
    """Four users with five, four, two and one events, liked and not, over the first items of the catalog.

    No user of any site: for what a model must show before it sees one.
    """
    vectors = getattr(model, "vectors", None)
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    catalog = len(vectors) if isinstance(vectors, Tensor) else model.scores(HistoryBatch(one, one)).shape[1]
    event = torch.arange(5, device=device)
    user = torch.arange(4, device=device).unsqueeze(1)
    present = event < torch.tensor([5, 4, 2, 1], device=device).unsqueeze(1)  # [users, events]
    items = (3 * user + 2 * event) % catalog
    times = 1_000_000_000 + 86_400 * (1 + user) * event * event
    return HistoryBatch(
        items=torch.where(present, items, -1),
        times=torch.where(present, times, 0),
        labels=torch.where(present, ((user + event) % 2).float(), float("nan")),
    )


def clipped_sum(rows: list[Tensor], clip_norm: float) -> Tensor:
    """Sum over users of each user's whole gradient, scaled to norm at most `clip_norm`.

    A user whose gradient is not finite contributes nothing: a contribution like any other, and no failure that
    an outsider could observe.

    Args:
        rows: one [users, *shape] float32 a parameter.

    Returns:
        [coordinates] float64, the parameters flattened one after the other.
    """
    flat = torch.cat([sample.flatten(1) for sample in rows], dim=1)  # [users, coordinates]
    # In float64: a float32 norm of many coordinates can be off by more than what the noise's inflation covers.
    norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    factors = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    finite = norms.isfinite()
    if not bool(finite.all()):
        flat = torch.where(finite.unsqueeze(1), flat, 0.0)
        factors = torch.where(finite, factors, 0.0)
    # Summed in float64: rounding in a long float32 sum could exceed what the noise's inflation covers.
    total: Tensor = factors @ flat.double()
    return total


@memory_kept()
def train_round(
    model: InterestModel,
    histories: HistoryBatch,
    settings: StepSettings,
    *,
    sampler: UserSampler,
    noise: GaussianNoise,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """One round of user-level DP-SGD from the model's present parameters.

    The released value is a function of `settings.steps` Gaussian sums over Poisson samples of users, each with
    sensitivity C to adding or removing one user; everything after the sums is post-processing.

    Args:
        model: with the round's broadcast parameters loaded; its parameters are moved.
        histories: every user of the site, one row each; prepared before (`prepare_histories`) or not.
        on_step: called after each step with the number of steps done; it learns nothing of the data.

    Returns:
        The update: parameters after minus before, by name, float32 on the CPU.

    Raises:
        UnvouchedLayerError: the model's rows are not users; said before any history is looked at.
        RowsAreNotUsersError: a step's rows were not users.
    """
    check_rows_are_users(model)
    before = model.trainable_state()
    parameters = list(model.trainable().values())
    device = parameters[0].device
    prepared = histories
    if histories.token_states is None:
        prepared = prepare_histories(model, histories, settings.micro_batch)
    with clipped_sums(model, settings.micro_batch) as clipped:
        for step in range(settings.steps):
            taken = torch.as_tensor(np.flatnonzero(sampler.sample(len(histories), settings.sampling_rate)))
            total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=device)
            for chunk in taken.to(device).split(settings.micro_batch):
                if len(chunk):
                    total += clipped(prepared.rows(chunk), settings.clip_norm)
            noised = private_sum(
                total, clip_norm=settings.clip_norm, noise_multiplier=settings.noise_multiplier, noise=noise
            )
            _descend(parameters, noised / settings.normaliser, settings.learning_rate)
            if on_step is not None:
                on_step(step + 1)
    after = model.trainable_state()
    return {name: after[name] - before[name] for name in before}


def prepare_histories(model: InterestModel, histories: HistoryBatch, micro_batch: int) -> HistoryBatch:
    """The histories with what frozen parts compute for each of them once; good for every later round."""
    if len(histories) == 0:
        return model.prepare(histories)
    index = torch.arange(len(histories), device=histories.items.device)
    prepared = [
        model.prepare(histories.rows(chunk).evened(micro_batch)).first(len(chunk))
        for chunk in index.split(micro_batch)
    ]
    return concatenate(prepared)


@torch.no_grad()
def _descend(parameters: list[nn.Parameter], direction: Tensor, learning_rate: float) -> None:
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.sub_(learning_rate * direction[start:stop].view_as(parameter))
        start = stop
