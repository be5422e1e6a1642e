"""The backward pass of the experts on Hopper: which kernels run, in which order, and what they leave out.

Order: dH (with the recomputed activation and dS), the down projection's weight gradient, whose operand A' is then
freed, the input gradient by rows, its sum over a token's rows, the up projection's weight gradient. Buffers beyond the
gradients are dH and the larger of A' and the rows of the input gradient.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from moekern.activations import ACTIVATIONS, split
from moekern.backends.cuda import backward_kernels as own
from moekern.backends.cuda import kernels
from moekern.backends.cuda.configuration import Configuration

# Bytes of a combine under which the events of a second stream cost more than they hide.
LEAST_BESIDE = 32 << 20


def combines_beside(slots: int, hidden: int, top_k: int) -> bool:
    """Whether the sum over a token's rows runs on a second stream, beside the weight gradient of the up projection."""
    fits = hidden <= 16 * own.BESIDE_FEATURES  # blocks that share a token; more would leave too many without one
    return fits and top_k in own.BESIDE_TOP_K and 2 * slots * hidden >= LEAST_BESIDE


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Beside:
    """A second stream that begins after what the current one holds at entry, and that the current one awaits at exit.

    Memory of the current stream may be used on it: whatever the current stream does next comes after.
    """

    def __init__(self, device: int):
        self.main, self.side = torch.cuda.current_stream(device), _side_stream(device)

    def __enter__(self) -> torch.cuda.Stream:
        self.side.wait_stream(self.main)
        return self.side

    def __exit__(self, *_: object) -> None:
        self.main.wait_stream(self.side)


def _scaled_activation(pre: Tensor, score: Tensor, activation: str, interleaved: bool) -> Tensor:
    """``s_r act(pre_r)`` alone, for the rare case that only the down projection is trained."""
    act = ACTIVATIONS[activation]
    return (act.forward(*split(pre.float(), act, interleaved)) * score.unsqueeze(1)).to(pre.dtype)


def experts_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    scores: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    top_k: int,
    activation: str,
    transposed: bool,
    interleaved: bool,
    needs: list[bool],
    chosen: Configuration,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scores, w_gate_up, w_down, b_gate_up, b_down; empty where ``needs`` says no.

    Arguments are those of :func:`moekern.backends.reference.experts_backward`, and the configuration. The tensors are
    not empty and their device is current.
    """
    slots, hidden = order.shape[0], x.shape[1]
    inter = w_down.shape[1 if transposed else 2]
    empty = x.new_empty(0)
    inputs = (x, scores, w_gate_up, w_down, b_gate_up, b_down)
    wanted = [t is not None and need for t, need in zip(inputs, needs, strict=True)]
    dx, dscores, dw_gate_up, dw_down, db_gate_up, db_down = (
        torch.empty_like(t) if want and t is not None else empty for t, want in zip(inputs, wanted, strict=True)
    )
    tables = kernels.Tables(offsets, slots)
    rows = own.Rows(x, order, scores, top_k)
    grad_pre = scaled = None
    if wanted[0] or wanted[1] or wanted[2] or wanted[4]:
        grad_pre = torch.empty_like(pre)
        scaled = x.new_empty((slots, inter)) if wanted[3] else None
        columns = -(-inter // own.DH_FEATURES)
        partials = torch.empty((slots, columns), dtype=torch.float32, device=x.device) if wanted[1] else None
        own.dh(
            dout, w_down, pre, rows, tables, activation, transposed, interleaved, grad_pre, scaled, partials
        )  # fmt: skip
        if partials is not None:
            own.score_gradient(partials, inverse, offsets, dout, b_down, top_k, dscores)
    elif wanted[3]:
        scaled = _scaled_activation(pre, rows.score, activation, interleaved)
    if scaled is not None:
        own.wgrad(dout, scaled, rows.token, offsets, tables, dw_down, p_innermost=transposed)
        scaled = None
    if wanted[5]:
        own.bias_gradient(dout, rows.token, rows.score, offsets, db_down)
    if grad_pre is not None:
        beside = wanted[0] and wanted[2] and combines_beside(slots, hidden, top_k)
        if wanted[0]:
            grad_rows = x.new_empty((slots, hidden))
            kernels.grouped_mm(
                grad_pre, w_gate_up, None, grad_rows, tables, not transposed, chosen.stages, chosen.store_rows
            )  # fmt: skip
            if not beside:
                kernels.combine(grad_rows, None, inverse, offsets, dx, top_k)
        if wanted[2]:
            with _Beside(x.get_device()) if beside else nullcontext() as side:
                own.wgrad(
                    x, grad_pre, rows.token, offsets, tables, dw_gate_up, not transposed, 160 if beside else 168
                )  # fmt: skip
                if side is not None:
                    with torch.cuda.stream(side):
                        own.combine_beside(grad_rows, inverse, offsets, dx, top_k)
        if wanted[4]:
            own.bias_gradient(grad_pre, None, None, offsets, db_gate_up)
    return dx, dscores, dw_gate_up, dw_down, db_gate_up, db_down
