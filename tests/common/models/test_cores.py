"""Every temporal core against torch's own, against its own past, and against a loop over single users."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.models.cores import GruCore
from common.models.decay_core import DecayCore
from common.models.names import CORES, named
from common.models.time_features import time_features

USERS, EVENTS, WIDTH, HIDDEN = 5, 9, 6, 8


def events(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        USERS, EVENTS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)


@pytest.fixture(params=tuple(CORES))
def core(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(3)
    built: nn.Module = named(CORES, request.param)(WIDTH, HIDDEN)
    return built


def torch_gru(core: GruCore) -> nn.GRU:
    theirs = nn.GRU(WIDTH, HIDDEN, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(core.input_map.weight)
        theirs.bias_ih_l0.copy_(core.input_map.bias)
        theirs.weight_hh_l0.copy_(core.state_map.weight)
        theirs.bias_hh_l0.zero_()
    return theirs


def test_gru_equals_torch_in_value_and_gradient_to_1e12() -> None:
    torch.manual_seed(0)
    ours = GruCore(WIDTH, HIDDEN).double()
    theirs = torch_gru(ours)
    x_ours, x_theirs = events(torch.float64).requires_grad_(), events(torch.float64).requires_grad_()
    weighting = torch.randn(USERS, EVENTS, HIDDEN, dtype=torch.float64)
    states, (expected, _) = ours(x_ours), theirs(x_theirs)
    (states * weighting).sum().backward()
    (expected * weighting).sum().backward()
    pairs = [
        (states, expected),
        (x_ours.grad, x_theirs.grad),
        (ours.input_map.weight.grad, theirs.weight_ih_l0.grad),
        (ours.input_map.bias.grad, theirs.bias_ih_l0.grad),
        (ours.state_map.weight.grad, theirs.weight_hh_l0.grad),
    ]
    for mine, other in pairs:
        assert mine is not None
        assert other is not None
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_gru_comparison_would_see_another_gate_order() -> None:
    ours = GruCore(WIDTH, HIDDEN).double()
    theirs = torch_gru(ours)
    with torch.no_grad():
        swapped = theirs.weight_ih_l0.roll(HIDDEN, dims=0)
        theirs.weight_ih_l0.copy_(swapped)
    assert (ours(events(torch.float64)) - theirs(events(torch.float64))[0]).abs().max() > 1e-3


def test_state_has_the_promised_width_and_knows_nothing_of_later_events(core: nn.Module) -> None:
    x = events()
    changed = x.clone()
    changed[:, 5:] += 1.0
    with torch.no_grad():
        before, after = core(x), core(changed)
    assert before.shape == (USERS, EVENTS, core.output_width)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-4


def test_a_user_alone_has_the_same_states_as_among_others(core: nn.Module) -> None:
    x = events()
    with torch.no_grad():
        torch.testing.assert_close(core(x)[2:3], core(x[2:3]), rtol=1e-5, atol=1e-6)


def user_losses(core: nn.Module, x: Tensor) -> Tensor:
    weighting = torch.linspace(-1, 1, EVENTS).view(1, -1, 1)
    return (core(x) * weighting).tanh().pow(2).sum(dim=(1, 2))


def loop(core: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients one user at a time, by plain autograd."""
    rows = []
    for user in range(len(x)):
        core.zero_grad()
        user_losses(core, x[user : user + 1]).sum().backward()
        rows.append({n: p.grad.detach().clone() for n, p in core.named_parameters() if p.grad is not None})
    core.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_per_user_gradients_equal_a_loop(core: nn.Module, mode: str) -> None:
    from opacus.grad_sample import GradSampleHooks

    x = events()
    expected = loop(core, x)
    hooks = GradSampleHooks(core, loss_reduction="sum", force_functorch=mode == "functorch")
    try:
        user_losses(core, x).sum().backward()
        for name, parameter in core.named_parameters():
            sample = parameter.grad_sample  # type: ignore[attr-defined]
            assert sample.shape == (USERS, *parameter.shape)
            torch.testing.assert_close(sample, expected[name], rtol=1e-4, atol=1e-5)
    finally:
        hooks.remove_hooks()


def test_ghost_norms_equal_a_loop(core: nn.Module) -> None:
    from opacus.grad_sample import GradSampleHooksFastGradientClipping

    x = events()
    expected = loop(core, x)
    hooks = GradSampleHooksFastGradientClipping(core, loss_reduction="sum", max_grad_norm=1.0)
    try:
        user_losses(core, x).sum().backward()
        norms = hooks.get_norm_sample()
    finally:
        hooks.remove_hooks()
    wanted = torch.cat([g.reshape(USERS, -1) for g in expected.values()], dim=1).norm(dim=1)
    torch.testing.assert_close(norms, wanted, rtol=1e-3, atol=1e-5)


def test_decay_starts_with_half_lives_from_half_an_event_to_64() -> None:
    core = DecayCore(WIDTH, 8)
    decays = torch.sigmoid(core.decays.weight).flatten()
    half_lives = -(torch.log(torch.tensor(2.0)) / torch.log(decays))
    torch.testing.assert_close(half_lives, 2.0 ** torch.linspace(-1, 6, 8), rtol=1e-3, atol=1e-3)
    constant = torch.ones(1, 4, WIDTH)
    torch.testing.assert_close(core(constant), constant)  # a weighted mean of equal events is that event


def test_time_features_tell_gaps_ages_and_padding() -> None:
    times = torch.tensor([[100, 100, 4_000, 0], [50, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    features = time_features(times, mask)
    assert features.shape == (2, 4, 3)
    assert features[0, 1].tolist() == [0.0, 0.0, 1.0]  # the same instant
    assert 0 < features[0, 2, 0] < 1
    assert features[0, 2, 2] == 0
    assert features[0, 3].tolist() == [0.0, 0.0, 0.0]  # padding says nothing
    assert features[1, 1].tolist() == [0.0, 0.0, 0.0]
