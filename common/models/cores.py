"""Recurrent temporal cores: event vectors over time -> the user's state after each event.

Each weight is one Linear call on [users, events, .], so that every per-user-gradient engine sees one product
per weight, and never a call per time step (Opacus' DPLSTM costs 9 to 21 plain steps because it makes those).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.models.heads import unread
from common.models.own_weights import rows_times, weight_of


class _RecurrentCore(nn.Module):
    """The two maps that a gated recurrence is made of, each one Linear call for all events."""

    gates: ClassVar[int]

    def __init__(self, input_width: int, hidden_width: int) -> None:
        super().__init__()
        self.hidden_width = self.output_width = hidden_width
        self.input_map = nn.Linear(input_width, self.gates * hidden_width)
        self.state_map = nn.Linear(hidden_width, self.gates * hidden_width, bias=False)
        bound = hidden_width**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class _LstmThroughTime(torch.autograd.Function):
    """Both maps' outputs for all events -> hidden states; backward is BPTT without weights' gradients.

    The gradient with respect to the gates is all that `input_map` and `state_map` need: both are Linear calls
    outside this function, and autograd (or Opacus' hooks) does the rest.
    """

    @staticmethod
    def forward(
        ctx: Any,
        from_input: Tensor,
        from_state: Tensor,
        gates: Tensor,
        cells: Tensor,
        tanh_cells: Tensor,
        states: Tensor,
        state_weight: Tensor,
    ) -> Tensor:
        # from_input, from_state: [users, events, 4 hidden], whose sum went into `gates`, which are after activation;
        # cells, tanh_cells, states: [users, events, hidden] c_{t-1}, tanh(c_t), h_t
        ctx.save_for_backward(gates, cells, tanh_cells, state_weight)
        return states.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        (grad_hidden,) = grads
        gates, previous, tanh_c, state_weight = ctx.saved_tensors
        users, events, hidden = tanh_c.shape
        i, f, g, o = gates.chunk(4, dim=-1)
        to_o = tanh_c * o * (1 - o)
        to_c = o * (1 - tanh_c * tanh_c)
        to_ifg = torch.stack([g * i * (1 - i), previous * f * (1 - f), i * (1 - g * g)], dim=2)
        grad_gates = torch.empty_like(gates)
        grad_ifg = grad_gates.view(users, events, 4, hidden)[:, :, :3]
        grad_h, grad_c = grad_hidden[:, -1], torch.zeros_like(tanh_c[:, 0])
        for t in range(events - 1, -1, -1):
            grad_c.addcmul_(grad_h, to_c[:, t])
            torch.mul(grad_c.unsqueeze(1), to_ifg[:, t], out=grad_ifg[:, t])
            torch.mul(grad_h, to_o[:, t], out=grad_gates[:, t, 3 * hidden :])
            if t:
                grad_h = rows_times(grad_gates[:, t], state_weight, plus=grad_hidden[:, t - 1])
                grad_c.mul_(f[:, t])
        return grad_gates, grad_gates, None, None, None, None, None


class LstmCore(_RecurrentCore):
    """A one-layer LSTM, equal to `torch.nn.LSTM` (with its second bias zero) in value and gradient.

    Gate order i, f, g, o as in torch. One bias: torch's second one duplicates it, and would only add noise.

    Args:
        input_width: width of an event vector.
        hidden_width: width of the state.
    """

    gates = 4

    def forward(self, x: Tensor) -> Tensor:
        """x: [users, events, input_width] -> [users, events, hidden_width]."""
        from_input = self.input_map(x)  # [users, events, 4 hidden]
        weight = weight_of(self.state_map)
        users, events, hidden = *x.shape[:2], self.hidden_width
        with torch.no_grad():
            gates, tanh_c = torch.empty_like(from_input), from_input.new_empty(users, events, hidden)
            h, c = from_input.new_zeros(2, users, events + 1, hidden)  # h_{t-1} and c_{t-1} at t
            hs, cs = h.unbind(dim=1), c.unbind(dim=1)
            steps = zip(from_input.unbind(dim=1), gates.unbind(dim=1), tanh_c.unbind(dim=1), strict=True)
            for t, (inwards, step, tanh) in enumerate(steps):
                rows_times(hs[t], weight.mT, plus=inwards, out=step)
                i_and_f, i, f, g, o = step[:, : 2 * hidden], *step.chunk(4, dim=-1)
                i_and_f.sigmoid_()
                g.tanh_()
                o.sigmoid_()
                torch.mul(f, cs[t], out=cs[t + 1]).addcmul_(i, g)
                torch.tanh(cs[t + 1], out=tanh)
                torch.mul(o, tanh, out=hs[t + 1])
        from_state = self.state_map(unread(h[:, :-1]))
        states: Tensor = _LstmThroughTime.apply(  # type: ignore[no-untyped-call]
            from_input, from_state, gates, c[:, :-1], tanh_c, h[:, 1:], weight
        )
        return states


class _GruThroughTime(torch.autograd.Function):
    """Both maps' outputs for all events -> hidden states; backward is BPTT without weights' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        from_input: Tensor,
        from_state: Tensor,
        r_and_z: Tensor,
        new: Tensor,
        states: Tensor,
        state_weight: Tensor,
    ) -> Tensor:
        # from_input, from_state: [users, events, 3 hidden]; r_and_z: [users, events, 2 hidden], after activation;
        # new: [users, events, hidden] n_t; states: [users, events + 1, hidden], from h_0 on
        ctx.save_for_backward(from_state, r_and_z, new, states, state_weight)
        return states[:, 1:].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None, None]:
        (grad_states,) = grads
        from_state, r_and_z, n, states, state_weight = ctx.saved_tensors
        users, events, hidden = n.shape
        r, z = r_and_z.chunk(2, dim=-1)
        to_n = (1 - z) * (1 - n * n)
        to_r = to_n * from_state[:, :, 2 * hidden :] * r * (1 - r)
        to_z = (states[:, :-1] - n) * z * (1 - z)
        to_state = torch.stack(
            [to_r, to_z, to_n * r], dim=2
        )  # [users, events, 3, hidden]: what comes to `from_state`
        grad_state = torch.empty_like(from_state)
        grad_gates = grad_state.view(users, events, 3, hidden)
        grad_h, into_n = grad_states[:, -1], torch.empty_like(n)
        for t in range(events - 1, -1, -1):
            torch.mul(grad_h.unsqueeze(1), to_state[:, t], out=grad_gates[:, t])
            torch.mul(grad_h, to_n[:, t], out=into_n[:, t])
            if t:
                carried = torch.addcmul(grad_states[:, t - 1], grad_h, z[:, t])
                grad_h = rows_times(grad_state[:, t], state_weight, plus=carried)
        grad_input = torch.cat([grad_state[:, :, : 2 * hidden], into_n], dim=-1)
        return grad_input, grad_state, None, None, None, None


class GruCore(_RecurrentCore):
    """A one-layer GRU, equal to `torch.nn.GRU` with `bias_hh` zero, in value and gradient.

    Gate order r, z, n as in torch. Two thirds of torch's second bias duplicate the first and would only add
    noise; the last third, b_hn in r * (W_hn h + b_hn), is no duplicate, but is left out too: its coordinates cost
    noise, and the state's own weights can express a constant.

    Args:
        input_width: width of an event vector.
        hidden_width: width of the state.
    """

    gates = 3

    def forward(self, x: Tensor) -> Tensor:
        """x: [users, events, input_width] -> [users, events, hidden_width]."""
        from_input = self.input_map(x)  # [users, events, 3 hidden]
        weight = weight_of(self.state_map)
        users, events, hidden = *x.shape[:2], self.hidden_width
        with torch.no_grad():
            r_and_z, n = from_input.new_empty(users, events, 2 * hidden), x.new_empty(users, events, hidden)
            h = x.new_zeros(users, events + 1, hidden)  # h_{t-1} at t
            hs = h.unbind(dim=1)
            steps = zip(from_input.unbind(dim=1), r_and_z.unbind(dim=1), n.unbind(dim=1), strict=True)
            for t, (inwards, gates, new) in enumerate(steps):
                of_state = rows_times(hs[t], weight.mT)
                torch.add(inwards[:, : 2 * hidden], of_state[:, : 2 * hidden], out=gates).sigmoid_()
                r, z = gates.chunk(2, dim=-1)
                torch.addcmul(inwards[:, 2 * hidden :], r, of_state[:, 2 * hidden :], out=new).tanh_()
                torch.lerp(new, hs[t], z, out=hs[t + 1])
        from_state = self.state_map(h[:, :-1])
        result: Tensor = _GruThroughTime.apply(  # type: ignore[no-untyped-call]
            from_input, from_state, r_and_z, n, h, weight
        )
        return result
