"""Private rounds of many simulated sites at once: the rows of all sites in one batch, each site with its own weights.

What `training.train_round` releases for one site, this releases for each of many that begin from the same broadcast
parameters: a Poisson sample of that site's users, clipped sums of its own users alone, its own noise. Only the
arithmetic is shared. After the first step each site has parameters of its own, so a site's sampled users stand in units
of UNIT rows, the last one filled up with nobody; every Linear layer multiplies [units, rows, in] by the weights
of each unit's site; a user's part of the sum goes to that site. Each user's gradient is made in float32, clipped by
its norm in float64 and rounded to the noise's grid (`grid_sums.py`): sums are exact. All batches have one shape,
and a model shows at each request's parameters that all rows of it compute alike, so whoever else was sampled, at
whichever site, changes no user's numbers, even by rounding (`bookkeeping.py` says why that counts).

It shows, too, on made-up users, that its sites do not touch each other; one that reads histories with a language model
is trained one site after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from client.bookkeeping import RowsAreNotUsersError, Seen, nobody_sees, recorded
from client.grid_sums import GridSums, own_place
from client.opacus_gradients import clipped_sum, per_user_gradients
from client.self_test import (
    catalog_of,
    check_rows_are_users,
    digest_of,
    made_up_histories,
    ordinary,
    random_histories,
    same_bits,
    telling_clip_norms,
)
from client.training import StepSettings
from common.memory import memory_kept
from common.models.batches import HistoryBatch, concatenate, even_events
from common.models.interface import InterestModel
from common.models.own_weights import OWN_WEIGHTS
from common.privacy.noise import GaussianNoise, UserSampler, private_sum

Floats = npt.NDArray[np.float32]

UNIT = 2
"""Rows of a unit, where the machine's kernels give both the same numbers; else one. All batches have one shape."""

_OFF = 0.1
"""How far another site's parameters are off, where sites are shown to be apart."""

_SHUFFLES = 5
"""Passes in which made-up users and sites change places, at each request's parameters."""

_ALLOWED = 1e-3
"""Of C: what float32 may make of another order of additions, and the noise's grid of a sum."""

_APART: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()
"""Models that showed that their sites get the sums that they get alone, with their trainable parameters then."""
_SHOWN: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], tuple[str, int]]] = WeakKeyDictionary()
"""What models have shown: rows, events and threads -> the parameters at which it was shown last, and rows of a unit."""


class NotTogetherError(ValueError):
    """A model's sites cannot be trained in one batch: train them one after the other."""


@dataclass
class _Layer:
    """A trainable Linear layer: where its parameters stand in a site's flat ones, and its calls of this pass."""

    name: str
    module: nn.Linear
    weight_at: slice
    bias_at: slice | None
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor | None = None
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self, parameters: Tensor) -> None:
        """Uses the parameters [units, coordinates] from now on."""
        self.weight = parameters[:, self.weight_at].reshape(-1, *self.module.weight.shape)
        self.bias = None if self.bias_at is None else parameters[:, self.bias_at]
        setattr(self.module, OWN_WEIGHTS, self.weight)
        self.calls.clear()

    def forward(self, tap: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: recorded(x, self.weight, self.bias, tap, self.calls)

    def taken(self, rows: int) -> tuple[Floats, Floats]:
        """a [rows, places, inputs] and g [rows, places, outputs].

        Raises:
            RowsAreNotUsersError: the layer was not called, or a call's rows are not users.
        """
        if not self.calls or any(x.ndim < 2 or x.shape[0] != rows for x, _ in self.calls):
            raise RowsAreNotUsersError(f"layer {self.name} has not one row a user")
        a, g = (
            np.concatenate(
                [call[side].reshape(rows, -1, call[side].shape[-1]).cpu().numpy() for call in self.calls],
                axis=1,
            )
            for side in (0, 1)
        )
        self.calls.clear()
        return a, g


AddSums = Callable[[Tensor, HistoryBatch, Sequence[int], GridSums, float], None]
"""(parameters [units, coordinates], rows unit after unit, into which sum each row's clipped gradient goes, or -1 for
none, the sums, C)."""


@contextmanager
def clipped_sums_of_units(model: InterestModel, seen: Seen = nobody_sees) -> Iterator[AddSums]:
    """Gives a function that adds users' gradients, each clipped to C as a whole, to sums.

    Args:
        seen: told what was computed for each row: losses, and (a, g) of each layer.

    Raises:
        NotTogetherError: something other than Linear layers is trainable.
        RowsAreNotUsersError: from the function: rows are not users.
    """
    layers, coordinates = _layers(model)
    row = own_place(coordinates)  # what no layer holds (the witness) stays zero
    tap = torch.zeros((), requires_grad=True, device=next(iter(model.trainable().values())).device)

    def add(
        parameters: Tensor, batch: HistoryBatch, into: Sequence[int], sums: GridSums, clip_norm: float
    ) -> None:
        for layer in layers:
            layer.take(parameters)
        losses = model.per_user_loss(batch)
        if losses.shape != (len(batch),):
            raise RowsAreNotUsersError(
                f"the loss has shape {tuple(losses.shape)}, but must be one number a user"
            )
        losses.sum().backward()
        taken = {layer.name: layer.taken(len(into)) for layer in layers}
        parts = {
            f"{name}.{side}": torch.from_numpy(part)
            for name, of in taken.items()
            for side, part in enumerate(of)
        }
        seen({"losses": losses.detach(), **parts})
        _add_clipped(
            [_Made.of(layer, row, *taken[layer.name]) for layer in layers], row, into, sums, clip_norm
        )

    model.train()
    for layer in layers:
        layer.module.forward = layer.forward(tap)  # type: ignore[method-assign, assignment]
    try:
        yield add
    finally:
        for layer in layers:
            del layer.module.forward
            if hasattr(layer.module, OWN_WEIGHTS):
                delattr(layer.module, OWN_WEIGHTS)
            layer.calls.clear()


def _layers(model: InterestModel) -> tuple[list[_Layer], int]:
    """The trainable Linear layers, and the number of coordinates, the witness' included."""
    places, start = {}, 0
    for name, parameter in model.trainable().items():
        places[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    layers, covered = (
        [],
        {name for name, parameter in model.trainable().items() if parameter is model.witness},
    )
    for name, module in model.named_modules():
        if type(module) is nn.Linear and f"{name}.weight" in places:
            bias = f"{name}.bias"
            layers.append(_Layer(name, module, places[f"{name}.weight"], places.get(bias)))
            covered |= {f"{name}.weight", bias}
    if set(places) - covered:
        raise NotTogetherError(f"{min(set(places) - covered)} is no part of a Linear layer")
    return layers, start


def _add_clipped(
    parts: list[_Made], row: Floats, into: Sequence[int], sums: GridSums, clip_norm: float
) -> None:
    """Adds each row's gradient, made in float32 and clipped, to its sum.

    Args:
        parts: of each layer.
        row: [coordinates], where every row's gradient is made: nothing can depend on where a row stands.
    """
    scaled, double = own_place(len(row)), np.empty(len(row))
    with np.errstate(all="ignore"):  # or a warning would tell of a user whose numbers are none
        for place, which in enumerate(into):
            if which < 0:
                continue
            for part in parts:
                part.make(place)
            np.copyto(double, row)
            norm = math.sqrt(double @ double)
            if math.isfinite(norm):  # who is no number contributes nothing: a contribution like any other
                np.multiply(row, np.float32(min(1.0, clip_norm / max(norm, 1e-12)) / sums.step), out=scaled)
                sums.add(which, scaled)


@dataclass
class _Made:
    """Makes the gradient of a layer for one row after the other, always at the same place in memory."""

    a: Floats
    g: Floats
    own_a: Floats
    own_g: Floats
    weight: Floats
    bias: Floats | None

    @classmethod
    def of(cls, layer: _Layer, row: Floats, a: Floats, g: Floats) -> Self:
        """Args: row: [coordinates], of which a part is the layer's."""
        return cls(
            a,
            g,
            own_place(*a.shape[1:]),
            own_place(*g.shape[1:]),
            row[layer.weight_at].reshape(g.shape[2], a.shape[2]),
            None if layer.bias_at is None else row[layer.bias_at],
        )

    def make(self, place: int) -> None:
        """Writes the gradient of the row at a place of the batch."""
        np.copyto(self.own_a, self.a[place])
        np.copyto(self.own_g, self.g[place])
        np.matmul(self.own_g.T, self.own_a, out=self.weight)
        if self.bias is not None:
            np.sum(self.own_g, axis=0, out=self.bias)


def check_sites_apart(model: InterestModel, rows: int = 4 * UNIT, events: int = 5) -> int:
    """Shows on made-up users that sites in one batch are as apart as in processes of their own.

    Two sites with other parameters each get the sum that they get alone, by Opacus' rows, at ordinary parameters, once;
    and at the present ones all rows of a batch compute alike: a user's numbers are the same to the bit in every row,
    beside whomever. What was shown at the same parameters is not shown again. The parameters come back unchanged.

    Args:
        rows: of a batch.
        events: of a history.

    Returns:
        The rows of a unit: UNIT, or 1 where two rows of a unit do not compute alike.

    Raises:
        NotTogetherError: they are not, or the model reads histories with a language model.
        UnvouchedLayerError: the model's rows are not users.
    """
    check_rows_are_users(model)
    at, key = digest_of(model), (rows, events, torch.get_num_threads())
    shown = _SHOWN.setdefault(model, {})
    if key not in shown or shown[key][0] != at:
        if model.prepare(made_up_histories(model, _device(model))).token_states is not None:
            raise NotTogetherError("the model reads histories with a language model")
        try:
            if tuple(model.trainable()) not in _APART.setdefault(model, set()):
                with ordinary(model):
                    _check_sums_apart(model)
                _APART[model].add(tuple(model.trainable()))
            unit = next((unit for unit in (UNIT, 1) if _alike(model, unit, rows, events)), None)
        except RowsAreNotUsersError as error:
            raise NotTogetherError(f"the model's rows are not users of sites: {error}") from error
        if unit is None:
            raise NotTogetherError("this machine's kernels do not give all rows of a batch the same numbers")
        shown[key] = (at, unit)
    return shown[key][1]


def _check_sums_apart(model: InterestModel) -> None:
    """Each of two made-up sites, with other parameters, gets the sum that Opacus' rows of its users make alone.

    Raises:
        NotTogetherError: it does not.
    """
    trainable = model.trainable()
    made_up = made_up_histories(model, _device(model))
    histories = _joined([made_up])[0]
    start = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    generator = torch.Generator().manual_seed(1)
    everyone = [torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0])]
    moved, rows = list[Tensor](), list[list[Tensor]]()
    try:
        for by in (0.0, _OFF):
            with torch.no_grad():
                for name, parameter in trainable.items():
                    drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                    parameter.copy_(start[name] + by * drawn)
            moved.append(_flat(trainable))
            with per_user_gradients(model) as gradients:
                rows.append(gradients(made_up))
        clip_norms = telling_clip_norms([torch.cat(both) for both in zip(*rows, strict=True)])
        alone = [
            {clip_norm: clipped_sum([row[own] for row in of_site], clip_norm) for clip_norm in clip_norms}
            for own, of_site in zip(everyone, rows, strict=True)
        ]
        with clipped_sums_of_units(model) as add:
            parameters = torch.stack(moved)
            together = {
                clip_norm: _sums(add, parameters, histories, everyone, clip_norm, 2 * UNIT, UNIT)
                for clip_norm in clip_norms
            }
    finally:
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(start[name])
                parameter.grad = None
    for site, own_sums in enumerate(alone):
        for clip_norm, own_sum in own_sums.items():
            if not bool((own_sum - together[clip_norm][site]).norm() <= _ALLOWED * clip_norm):
                raise NotTogetherError("a site's sum beside another site's is not its sum alone")


def _alike(model: InterestModel, unit: int, rows: int, events: int) -> bool:
    """Whether users get the same numbers, to the bit, whichever rows they stand in and whatever other sites have.

    Users change rows from pass to pass (`self_test.alike_shuffled`), and so do units of sites with other parameters.
    """
    own, device, chance = _flat(model.trainable()), _device(model), np.random.default_rng()
    units = max(1, rows // unit)
    users = units * unit
    histories = _joined([random_histories(catalog_of(model, device), users, events).to(device)])[0]
    seen: dict[str, Tensor] = {}
    first: tuple[dict[str, Tensor], npt.NDArray[np.bool_]] | None = None
    with clipped_sums_of_units(model, seen.update) as add:
        for _ in range(_SHUFFLES):
            order = chance.permutation(users)
            back = np.argsort(order)
            of_others = chance.random(units) < 0.5
            others = torch.from_numpy(of_others).to(device).unsqueeze(1)
            parameters = torch.where(others, own + _OFF * torch.randn(units, len(own), device=device), own)
            sums = GridSums(torch.empty(1, len(own), dtype=torch.float64), 1.0)
            add(parameters, histories.rows(torch.from_numpy(order).to(device)), [-1] * users, sums, 1.0)
            by_user = {name: part.cpu()[torch.from_numpy(back)] for name, part in seen.items()}
            counts = ~of_others[back // unit]  # users whose unit had the broadcast parameters
            if first is not None:
                both = torch.from_numpy(np.flatnonzero(counts & first[1]))
                if not all(same_bits(part[both], first[0][name][both]) for name, part in by_user.items()):
                    return False
            else:
                first = by_user, counts
    return True


@memory_kept()
def train_together(
    model: InterestModel,
    sites: Sequence[HistoryBatch],
    settings: StepSettings,
    *,
    samplers: Sequence[UserSampler],
    noises: Sequence[GaussianNoise],
    on_step: Callable[[int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """One round of user-level DP-SGD at each of many sites, from the model's present parameters.

    Args:
        model: with the round's broadcast parameters loaded; it is left as it is.
        sites: every user of each site, one row each.
        settings: public, the same for all.
        samplers, noises: one for each site, as `train_round` takes one.
        on_step: called after each step with the number of steps done; it learns nothing of the data.

    Returns:
        Each site's update, as `train_round` returns it.

    Raises:
        NotTogetherError, UnvouchedLayerError: said before any history is looked at.
        RowsAreNotUsersError: a step's rows were not users.
    """
    joined, offsets = _joined(sites)
    unit = check_sites_apart(model, settings.micro_batch, joined.items.shape[1])
    trainable = model.trainable()
    start = _flat(trainable)  # [coordinates]
    parameters = start.expand(len(sites), -1).clone()
    with clipped_sums_of_units(model) as add:
        for step in range(settings.steps):
            taken = [
                torch.as_tensor(np.flatnonzero(sampler.sample(len(site), settings.sampling_rate))) + offset
                for site, sampler, offset in zip(sites, samplers, offsets, strict=True)
            ]
            total = _sums(add, parameters, joined, taken, settings.clip_norm, settings.micro_batch, unit)
            for site, noise in enumerate(noises):
                noised = private_sum(
                    total[site],
                    clip_norm=settings.clip_norm,
                    noise_multiplier=settings.noise_multiplier,
                    noise=noise,
                )
                parameters[site] -= (settings.learning_rate / settings.normaliser * noised).to(start.device)
            if on_step is not None:
                on_step(step + 1)
    change = (parameters - start).cpu()
    return [_named(change[site], trainable) for site in range(len(sites))]


def _sums(
    add: AddSums,
    parameters: Tensor,
    histories: HistoryBatch,
    taken: Sequence[Tensor],
    clip_norm: float,
    rows: int,
    unit: int,
) -> Tensor:
    """[sites, coordinates] float64, on the CPU: the clipped sum of each site's users.

    Args:
        parameters: [sites, coordinates].
        histories: of all sites, and nobody's behind them (`_joined`).
        taken: of each site the rows of its users.
        rows: of one batch; every batch has as many, whoever was taken, and there is one at least.
        unit: rows of a unit.
    """
    sums = GridSums(torch.empty(parameters.shape, dtype=torch.float64), clip_norm)
    units = [
        (site, own_unit) for site, own in enumerate(taken) for own_unit in own.split(unit) if len(own_unit)
    ]
    at_once = max(1, rows // unit)
    nobody = len(histories) - 1
    for first in range(0, max(1, len(units)), at_once):
        batch = units[first : first + at_once]
        lacking = at_once - len(batch)
        sites = torch.tensor([site for site, _ in batch] + [0] * lacking, device=parameters.device)
        index = torch.full((at_once, unit), nobody)
        for place, (_, own_unit) in enumerate(batch):
            index[place, : len(own_unit)] = own_unit
        into = [site if row < len(own_unit) else -1 for site, own_unit in batch for row in range(unit)]
        rows_of_batch = histories.rows(index.flatten().to(parameters.device))
        add(parameters[sites], rows_of_batch, into + [-1] * (unit * lacking), sums, clip_norm)
    return sums.finish()


def _device(model: InterestModel) -> torch.device:
    return next(iter(model.trainable().values())).device


def _flat(trainable: dict[str, nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainable.values()])


def _named(flat: Tensor, like: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    parts = flat.split([parameter.numel() for parameter in like.values()])
    return {name: part.view(like[name].shape).clone() for name, part in zip(like, parts, strict=True)}


def _joined(sites: Sequence[HistoryBatch]) -> tuple[HistoryBatch, list[int]]:
    """All sites' rows as wide as the widest, evened, nobody's row behind them, and where each site begins."""
    widest = max(1, *(site.items.shape[1] for site in sites))
    widest = even_events(widest)
    wide = []
    for site in sites:
        room = (0, widest - site.items.shape[1])
        labels = None if site.labels is None else pad(site.labels, room, value=float("nan"))
        wide.append(HistoryBatch(pad(site.items, room, value=-1), pad(site.times, room), labels))
    offsets = np.cumsum([0, *(len(site) for site in sites)]).tolist()
    return concatenate([*wide, wide[0].without_events(1)]), offsets[:-1]
