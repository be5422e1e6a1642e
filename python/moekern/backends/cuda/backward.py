"""The backward pass of the experts on Hopper: which kernels run, in which order, and what they leave out.

Order: dH (with the recomputed activation and dS), the down projection's weight gradient, whose operand A' is then
freed, the input gradient by rows, its sum over a token's rows, the up projection's weight gradient. Buffers beyond the
gradients are dH and the larger of A' and the rows of the input gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.activations import ACTIVATIONS, split
from moekern.backends.cuda import backward_kernels as own
from moekern.backends.cuda import kernels
from moekern.backends.cuda.configuration import Configuration


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
        if wanted[0]:
            grad_rows = x.new_empty((slots, hidden))
            kernels.grouped_mm(
                grad_pre, w_gate_up, None, grad_rows, tables, not transposed, chosen.stages, chosen.store_rows
            )  # fmt: skip
            kernels.combine(grad_rows, None, inverse, offsets, dx, top_k)
        if wanted[2]:
            own.wgrad(x, grad_pre, rows.token, offsets, tables, dw_gate_up, p_innermost=not transposed)
        if wanted[4]:
            own.bias_gradient(grad_pre, None, None, offsets, db_gate_up)
    return dx, dscores, dw_gate_up, dw_down, db_gate_up, db_down
