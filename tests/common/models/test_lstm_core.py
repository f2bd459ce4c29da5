"""The LSTM core is torch's LSTM: in value, in every gradient, and by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.models.cores import LstmCore

USERS, EVENTS, WIDTH, HIDDEN = 3, 7, 5, 4


def theirs_of(core: LstmCore) -> nn.LSTM:
    """torch's LSTM with the core's weights; its second bias is zero."""
    theirs = nn.LSTM(WIDTH, HIDDEN, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(core.input_map.weight)
        theirs.bias_ih_l0.copy_(core.input_map.bias)
        theirs.weight_hh_l0.copy_(core.state_map.weight)
        theirs.bias_hh_l0.zero_()
    return theirs


def of(
    core: nn.Module, x: Tensor, weighting: Tensor, parameters: list[nn.Parameter]
) -> tuple[Tensor, list[Tensor]]:
    """States, and gradients with respect to the input and the parameters."""
    x = x.clone().requires_grad_()
    out = core(x)
    states = out[0] if isinstance(out, tuple) else out
    return states, list(torch.autograd.grad((states * weighting).sum(), [x, *parameters]))


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("events", [1, EVENTS])
def test_values_and_gradients_equal_torch_to_1e12(scale: float, events: int) -> None:
    torch.manual_seed(0)
    core = LstmCore(WIDTH, HIDDEN).double()
    theirs = theirs_of(core)
    x = scale * torch.randn(USERS, events, WIDTH, dtype=torch.float64)
    weighting = torch.randn(USERS, events, HIDDEN, dtype=torch.float64)
    mine = of(core, x, weighting, [core.input_map.weight, core.input_map.bias, core.state_map.weight])
    other = of(theirs, x, weighting, [theirs.weight_ih_l0, theirs.bias_ih_l0, theirs.weight_hh_l0])
    torch.testing.assert_close(mine[0], other[0], rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(mine[1], other[1], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_finite_differences_agree() -> None:
    torch.manual_seed(1)
    core = LstmCore(2, 3).double()
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    weights = [core.input_map.weight, core.input_map.bias, core.state_map.weight]

    def states(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        named = {"input_map.weight": w, "input_map.bias": b, "state_map.weight": s}
        result: Tensor = torch.func.functional_call(core, named, (x,))
        return result

    # A gradient through the state's weight inside BPTT is left to `state_map`'s Linear call, so this is the proof.
    assert torch.autograd.gradcheck(states, (x, *weights))


def test_each_weight_is_one_linear_call() -> None:
    core, calls = LstmCore(WIDTH, HIDDEN), list[str]()
    for name, module in core.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    core(torch.randn(USERS, EVENTS, WIDTH))
    assert sorted(calls) == ["input_map", "state_map"]
    assert {name for name, _ in core.named_parameters()} == {
        "input_map.weight",
        "input_map.bias",
        "state_map.weight",
    }
