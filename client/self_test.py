"""What a model must show on made-up users before a site charges a request: that its rows are users, each by itself.

Three things, at the very parameters that the request carries, and in the very shape that its steps have:

- a row's gradient is that user's own: Opacus' per-user gradients and plain autograd over each user alone agree, and a
  step's clipped sum is theirs (`check_rows_are_users`);
- all rows of a unit compute alike: a user's numbers are the same to the bit in every row, beside whomever
  (`rows_of_units`, `rows_of_scores`). Libraries choose kernels by shape, by threads, and at the edges of a product by
  place, so this is a property of the machine at hand; where a unit's rows are not alike, a smaller unit is taken, and
  in the end one user at a time;
- losses do not read the witness.

No user of any site is looked at. Made-up users come from the operating system's generator: no server foresees them.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.bookkeeping import ClippedSum, RowsAreNotUsersError, Seen, clipped_sums, nobody_sees
from client.opacus_gradients import (
    UnvouchedLayerError,
    check_layers,
    clipped_sum,
    opacus_sums,
    per_user_gradients,
)
from common.models.batches import HistoryBatch, even_events
from common.models.interface import InterestModel
from common.models.lora import is_adapter
from common.models.sequence import SequenceModel

_log = logging.getLogger("fedtide.site")

Engine = Literal["fast", "opacus"]
"""How a step's clipped sum is made: by `bookkeeping.clipped_sums` or by `opacus_gradients.opacus_sums`."""

ORDINARY = 0.5
"""Size of ordinary parameters, beside the root of a layer's inputs: where no zero layer hides what lies below it, and
no rounding is made large."""

_FEW = 24
"""Rows of the unit in which a model's structure is shown: Opacus holds a gradient for each of them."""

FIRST_SHUFFLES, SHUFFLES = 8, 2
"""Passes in which made-up users change their rows: for a kind of unit once, and at each request's parameters."""

FALLBACK = (48, 24, 1)
"""Rows of smaller units, for where a larger one's rows are not alike. 48 and 24 are multiples of the tiles that
products are made of, and of 1 to 4 threads; a unit of one row is alike by construction."""


@dataclass
class _Shown:
    """What a model has shown in this process.

    Attributes:
        structure: trainable names for which rows were shown to be users off the start.
        at: the parameters at which all was shown last, and what else it depends on -> rows of a unit.
        probes: units of made-up users as a language model read them, by (rows, events, threads); None: not alike.
        alike, unlike: kinds of units all of whose rows computed alike at ordinary parameters, and others.
    """

    structure: set[tuple[str, ...]] = field(default_factory=set)
    at: dict[str, tuple[str, int]] = field(default_factory=dict)
    probes: dict[tuple[int, int, int], HistoryBatch | None] = field(default_factory=dict)
    alike: set[Hashable] = field(default_factory=set)
    unlike: set[Hashable] = field(default_factory=set)


Sums = AbstractContextManager[ClippedSum]

_SHOWN: WeakKeyDictionary[InterestModel, _Shown] = WeakKeyDictionary()


def sums_by(engine: Engine, model: InterestModel, rows: int | None, seen: Seen = nobody_sees) -> Sums:
    """The clipped sums of a step, by the engine of that name."""
    return (opacus_sums if engine == "opacus" else clipped_sums)(model, rows, seen)


# --- rows are users


def check_rows_are_users(model: InterestModel) -> None:
    """Shows, at ordinary parameters, that a user's row is that user's own gradient, whoever else is in the batch.

    Per-user gradients of four users in one batch, as Opacus' hooks make them, are compared with plain autograd over
    each of them alone, and a step's clipped sum with theirs. The parameters come back unchanged, and what was shown for
    a model's structure once is not shown again: what hangs on the parameters is asked by `rows_of_units`. No loss may
    read the witness, which is shown, too.

    Args:
        model: its loss must be a function of its inputs: one that draws at random fails here.

    Raises:
        UnvouchedLayerError: names the first parameter whose rows are something else.
    """
    check_layers(model)
    shown = _SHOWN.setdefault(model, _Shown())
    names = tuple(model.trainable())
    if names in shown.structure:
        return
    with ordinary(model) as device:
        batch = model.prepare(made_up_histories(model, device))
        users = range(len(batch))
        _check_witness(model, batch)
        try:
            with per_user_gradients(model) as gradients:
                samples = [each[: len(users)] for each in gradients(batch.unit(_FEW))]
            alone = [_alone(model, batch, user, _FEW) for user in users]
            sums = {
                norm: (clipped_sum(samples, norm), _sum(model, batch, norm, _FEW))
                for norm in telling_clip_norms(samples)
            }
        except RowsAreNotUsersError as error:
            raise UnvouchedLayerError(f"the model's rows are not users: {error}") from error
    for user in users:
        _compare(model, [sample[user] for sample in samples], alone[user])
    if not all(float((one - other).norm()) <= _AGREES * norm for norm, (one, other) in sums.items()):
        raise UnvouchedLayerError(_BESIDE)
    shown.structure.add(names)


_AGREES = 2.0**-8
"""Of C: twice what rounding may take of a clip factor (`bookkeeping._single_rounding`), and far below a wrong layer."""
_BESIDE = (
    "a batch's clipped sum is not that of its users' gradients: a layer does something beside its product "
    "with its weight"
)


@contextmanager
def ordinary(model: InterestModel) -> Iterator[torch.device]:
    """The model at ordinary parameters, the same each time; its own come back afterwards."""
    trainable = model.trainable()
    start = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trainable.values():
                inputs = parameter.shape[1] if parameter.ndim > 1 else 1
                drawn = torch.randn(parameter.shape, generator=generator) * (ORDINARY / inputs**0.5)
                parameter.copy_(drawn.to(parameter.device))
        yield next(iter(trainable.values())).device
    finally:
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(start[name])


def _alone(model: InterestModel, batch: HistoryBatch, user: int, rows: int) -> list[Tensor]:
    """A user's gradients by plain autograd, from a batch of that user alone; zeros for the witness.

    Args:
        rows: of the unit that the user stands in, beside nobody.
    """
    trainable = model.trainable()
    learned = [p for p in trainable.values() if p is not model.witness]
    one = batch.rows(torch.tensor([user], device=batch.items.device))
    found = iter(torch.autograd.grad(model.per_user_loss(one.unit(rows))[0], learned))
    return [torch.zeros_like(p) if p is model.witness else next(found) for p in trainable.values()]


def _sum(
    model: InterestModel,
    batch: HistoryBatch,
    clip_norm: float,
    rows: int,
    engine: Engine = "fast",
) -> Tensor:
    with sums_by(engine, model, rows) as clipped:
        return clipped(batch, clip_norm)


def _compare(model: InterestModel, rows: list[Tensor], own: list[Tensor]) -> None:
    """Raises UnvouchedLayerError where a user's row of some parameter is not the gradient of that user alone."""
    whole = torch.cat([gradient.flatten() for gradient in own]).double().norm()
    for name, row, gradient in zip(model.trainable(), rows, own, strict=True):
        room = 1e-3 * torch.maximum(gradient.double().norm(), 1e-2 * whole)
        if not bool((row - gradient).double().norm() <= room):  # also where either is not finite
            raise UnvouchedLayerError(
                f"parameter {name} gives a user another gradient in a batch than alone: a user's loss may depend on "
                "that user, the catalog and the parameters only, and may not draw at random"
            )


def telling_clip_norms(rows: list[Tensor]) -> tuple[float, ...]:
    """A C that clips every user whose gradient is not zero, and one that clips none; nothing where all are zero.

    Args:
        rows: one [users, *shape] float32 a parameter.
    """
    norms = torch.cat([sample.flatten(1) for sample in rows], dim=1).double().norm(dim=1)
    norms = norms[(norms > 0) & norms.isfinite()]
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
    catalog = catalog_of(model, device)
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


# --- all rows of a unit compute alike


def rows_of_units(model: InterestModel, rows: int, events: int, engine: Engine = "fast") -> int:
    """The rows of a step's units, after the model has shown at its present parameters that they are users, each alone.

    Asked before a request is charged, and again by `train_round`; what was shown for the same parameters, threads and
    released priors is not shown twice.

    Args:
        rows: wanted. Where the rows of such a unit do not compute alike, a smaller one is taken, and that is logged.
        events: of a history: `max_events` of the plan.

    Raises:
        UnvouchedLayerError: the model's rows are not users, whatever the unit.
    """
    check_rows_are_users(model)
    events = even_events(events)  # as a unit has them
    shown, at = _SHOWN[model], digest_of(model)
    key = f"{rows} {events} {engine} {torch.get_num_threads()} {' '.join(model.trainable())}"
    if key not in shown.at or shown.at[key][0] != at:
        found = _alike_rows(shown, model, rows, events, engine, partial(_passes, model, engine))
        _check_sum(model, found, engine)
        shown.at[key] = (at, found)
    return shown.at[key][1]


def _check_sum(model: InterestModel, rows: int, engine: Engine) -> None:
    """Holds a step's clipped sum of two made-up users, at the present parameters, against autograd over each alone.

    Raises:
        UnvouchedLayerError: it is another.
    """
    some = made_up_histories(model, next(iter(model.trainable().values())).device).first(min(2, rows))
    batch = model.prepare(some.unit(rows)).first(len(some))
    try:
        own = [_alone(model, batch, user, rows) for user in range(len(batch))]
        samples = [torch.stack(of_all) for of_all in zip(*own, strict=True)]
        sums = {
            norm: (clipped_sum(samples, norm), _sum(model, batch, norm, rows, engine))
            for norm in telling_clip_norms(samples)
        }
    except RowsAreNotUsersError as error:
        raise UnvouchedLayerError(f"the model's rows are not users: {error}") from error
    if not all(float((one - other).norm()) <= _AGREES * norm for norm, (one, other) in sums.items()):
        raise UnvouchedLayerError(_BESIDE)


def rows_of_scores(model: InterestModel, rows: int, events: int) -> int:
    """The rows of units in which users are ranked for a release of metrics, as `rows_of_units` for training."""

    def scored(batch: HistoryBatch) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"scores": model.scores(batch)}

    events = even_events(events)
    key = f"{rows} {events} scores {torch.get_num_threads()}"
    shown, at = _SHOWN.setdefault(model, _Shown()), digest_of(model)
    if key not in shown.at or shown.at[key][0] != at:
        model.eval()
        shown.at[key] = (at, _alike_rows(shown, model, rows, events, "scores", lambda rows: scored))
    return shown.at[key][1]


Pass = Callable[[HistoryBatch], Mapping[str, Tensor]]
"""A prepared unit -> what is computed for each of its rows, by name: [rows, ...]."""


def digest_of(model: InterestModel) -> str:
    """sha256 of all that a request may set: trainable parameters, adapters that are held, and released priors."""
    found = hashlib.sha256()
    released = () if model.released is None else vars(model.released).items()
    held = ((name, p) for name, p in model.named_parameters() if is_adapter(name) and not p.requires_grad)
    for name, tensor in itertools.chain(model.trainable().items(), held, released):
        found.update(name.encode())
        if isinstance(tensor, Tensor):
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(tensor).encode())
    return found.hexdigest()


def _alike_rows(
    shown: _Shown, model: InterestModel, rows: int, events: int, what: str, passes: Callable[[int], Pass]
) -> int:
    """The largest unit whose rows compute alike: in many shuffles at ordinary parameters, some at the present ones."""
    for found in (rows, *(smaller for smaller in FALLBACK if smaller < rows)):
        kind = (found, events, what, torch.get_num_threads(), *model.trainable())
        if kind in shown.unlike:
            continue
        one_pass = passes(found)
        if kind not in shown.alike:
            with ordinary(model):
                everyone = _prepared(shown, model, found, events)
                if everyone is not None and alike_shuffled(one_pass, everyone, FIRST_SHUFFLES):
                    shown.alike.add(kind)
        if kind in shown.alike:
            everyone = _prepared(shown, model, found, events)
            if everyone is not None and alike_shuffled(one_pass, everyone, SHUFFLES):
                return found
        shown.unlike.add(kind)
        _log.warning(
            "this machine's kernels do not give all %d rows of a unit the same numbers with %d threads: smaller units "
            "are taken, and rounds take longer; another [performance] micro_batch (a multiple of 48) or threads may do",
            found,
            torch.get_num_threads(),
        )
    raise UnvouchedLayerError(
        "a user alone in a unit gets other numbers each time, so this machine's kernels cannot be vouched for: set "
        'threads = 1 and device = "cpu" under [performance] in the site\'s policy'
    )


def _prepared(shown: _Shown, model: InterestModel, rows: int, events: int) -> HistoryBatch | None:
    """As many made-up users as a unit has rows, prepared: new ones each time, but where a language model reads them.

    Returns:
        None where the language model's frozen layers do not give each user the same states in every row.
    """
    key = (rows, events, torch.get_num_threads())
    if key in shown.probes:
        return shown.probes[key]
    tensor = next(itertools.chain(model.buffers(), model.parameters()))
    everyone = random_histories(catalog_of(model, tensor.device), rows, events).to(tensor.device).unit(rows)
    found: HistoryBatch | None = model.prepare(everyone)
    if found is not None and found.token_states is not None:

        def states(batch: HistoryBatch) -> Mapping[str, Tensor]:
            said = model.prepare(batch).token_states
            assert said is not None
            return {"states": said}

        found = found if alike_shuffled(states, everyone, SHUFFLES + 1) else None
        shown.probes[key] = found
    return found


def alike_shuffled(one_pass: Pass, everyone: HistoryBatch, shuffles: int) -> bool:
    """Whether every user of a unit gets the same numbers, to the bit, in whichever row and beside whomever.

    A kernel that adds up otherwise at some rows need not show in one user's numbers; so all rows hold other users, and
    all users change rows from pass to pass. A quarter of the rows are given to somebody else's double, anew each time.

    Args:
        everyone: as many users as the unit has rows.
        shuffles: passes, at least two.
    """
    chance, rows, device = np.random.default_rng(), len(everyone), everyone.items.device
    first: tuple[dict[str, Tensor], npt.NDArray[np.bool_]] | None = None
    for _ in range(shuffles):
        order = chance.permutation(rows)
        doubles = (chance.random(rows) < 0.25) & (rows > 1)
        standing = np.where(doubles, chance.integers(0, rows, rows), order)
        back = np.argsort(order)
        computed = one_pass(everyone.rows(torch.from_numpy(standing).to(device)))
        by_user = {name: part.cpu()[torch.from_numpy(back)] for name, part in computed.items()}
        there = ~doubles[back]
        if first is None:
            first = by_user, there
            continue
        both = torch.from_numpy(np.flatnonzero(there & first[1]))
        if not all(same_bits(part[both], first[0][name][both]) for name, part in by_user.items()):
            return False
    return True


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of floating-point numbers are the same, bit for bit; one NaN is as good as another."""
    bits = torch.int64 if one.dtype == torch.float64 else torch.int32

    def spelt(x: Tensor) -> Tensor:
        return torch.where(x.isnan(), math.nan, x).contiguous().view(bits)

    return torch.equal(spelt(one), spelt(other))


def _passes(model: InterestModel, engine: Engine, rows: int) -> Pass:
    """What a step computes for each row of a unit."""

    def passed(batch: HistoryBatch) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        with sums_by(engine, model, rows, found.update) as clipped:
            clipped(batch, 1.0)
        return {**found, **_frozen_parts(model, batch)}

    return passed


@torch.no_grad()
def _frozen_parts(model: InterestModel, batch: HistoryBatch) -> dict[str, Tensor]:
    """What a model makes of histories without training: seen here, while a loss may hide it."""
    if not isinstance(model, SequenceModel):
        return {}
    base = model.task.base(batch)
    return {"content": model.task.content(batch), **({} if base is None else {"base": base})}


def catalog_of(model: InterestModel, device: torch.device) -> int:
    """How many items a model's catalog has."""
    vectors = getattr(model, "vectors", None)
    if isinstance(vectors, Tensor):
        return len(vectors)
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return model.scores(HistoryBatch(one, one)).shape[1]


def random_histories(catalog: int, users: int, events: int) -> HistoryBatch:
    """Made-up users with up to so many events of a catalog, liked, not and unknown; no generator's state is kept."""
    chance = np.random.default_rng()
    lengths = chance.integers(1, events + 1, size=users)
    lengths[chance.random(users) < 0.75] = events
    items = np.where(np.arange(events) < lengths[:, None], chance.integers(0, catalog, (users, events)), -1)
    times = 1_000_000_000 + np.cumsum(chance.integers(0, 86_400, (users, events)), axis=1)
    labels = np.where(
        items >= 0, chance.choice([0.0, 1.0, np.nan], (users, events), p=[0.4, 0.4, 0.2]), np.nan
    )
    return HistoryBatch.of(items, np.where(items >= 0, times, 0), labels=labels.astype(np.float32))
