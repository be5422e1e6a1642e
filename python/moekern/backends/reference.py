"""The specification: every verb in plain torch, in any floating dtype, on any device.

Words: slot = flat index ``t * top_k + k`` of ``topk_ids[T, K]``; row = position of a slot after sorting by expert.
Nothing here is fast; every other backend is tested against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS, join, split
from moekern.backends.call import Form, PlanTensors, Weights
from moekern.backends.observers import is_exporting


def plan(topk_ids: Tensor, num_experts: int) -> PlanTensors:
    """Sort the slots by expert, keeping slot order within an expert.

    Args:
        topk_ids: ``[T, K]`` integer. Ids outside ``0 .. num_experts - 1`` are sentinels and sort last.
        num_experts: E.

    Returns:
        ``order`` int32 ``[S]`` (row -> slot), ``inverse`` int32 ``[S]`` (slot -> row), ``offsets`` int32 ``[E + 1]``.
    """
    ids = topk_ids.reshape(-1).to(torch.int64)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = torch.argsort(ids, stable=True)
    rows = torch.arange(ids.numel(), device=ids.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(
        0, ids, torch.ones_like(ids)
    )
    offsets = torch.cat((counts.new_zeros(1), counts[:num_experts].cumsum(0)))
    return PlanTensors(order.to(torch.int32), inverse.to(torch.int32), offsets.to(torch.int32))


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, kind: str) -> Tensor:
    """Multiply each expert's rows by its matrix.

    Args:
        a: ``[R, k]``.
        b: ``[E, n, k]`` for ``kind="nt"``, ``[E, k, n]`` for ``"nn"``, ``[R, n]`` for ``"tn"``.
        offsets: int32 ``[E + 1]``; rows of expert e are ``offsets[e]:offsets[e + 1]``.
        kind: ``"nt"`` and ``"nn"`` give ``[R, n]`` with zeros past ``offsets[E]``; ``"tn"`` gives ``a_e^T b_e``,
            ``[E, k, n]``.
    """
    bounds = offsets.tolist()
    spans = list(itertools.pairwise(bounds))
    if kind == "tn":
        return torch.stack([a[i:j].mT @ b[i:j] for i, j in spans])
    parts = [a[i:j] @ (b[e].mT if kind == "nt" else b[e]) for e, (i, j) in enumerate(spans)]
    past_the_end = a.new_zeros(a.shape[0] - bounds[-1], b.shape[1] if kind == "nt" else b.shape[2])
    return torch.cat((*parts, past_the_end))


GroupedMM = Callable[[Tensor, Tensor, Tensor, str], Tensor]  # how a backend multiplies, with grouped_mm's arguments


def take_rows(t: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[n, m]``. As a lookup its gradient adds in a fixed order on every device, and has a rule for vmap.

    It adds in float32: sums in bfloat16 stop growing at 256 equal addends.
    """
    if not is_exporting() and index.numel() == 0:  # a lookup of nothing has no second derivative
        return t[index.long()]
    wide = t.to(_accumulator(t.dtype)) if t.requires_grad and torch.is_grad_enabled() else t
    return torch.nn.functional.embedding(index.long(), wide).to(t.dtype)


def bias_rows(bias: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """The bias of each row's expert, ``[rows, n]``, zero past the last expert."""
    row = torch.arange(rows, device=offsets.device)
    expert = torch.searchsorted(offsets[1:].to(row.dtype), row, right=True)
    return take_rows(torch.cat((bias, torch.zeros_like(bias[:1]))), expert)


def _linear(
    a: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool, multiply: GroupedMM
) -> Tensor:
    out = multiply(a, w, offsets, "nn" if transposed else "nt")
    return out if bias is None else out + bias_rows(bias, offsets, a.shape[0])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slot_scores(scores: Tensor | None, inverse: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    """The router weight of every slot in the accumulation dtype, exactly zero for sentinels."""
    if scores is None:
        scores = torch.ones(inverse.shape, dtype=_accumulator(like.dtype), device=like.device)
    is_real = inverse.reshape(-1) < offsets[-1]
    return torch.where(is_real, scores.reshape(-1).to(_accumulator(like.dtype)), 0)


def _forward(
    x: Tensor, scores: Tensor | None, plan: PlanTensors, weights: Weights, form: Form, multiply: GroupedMM
) -> tuple[Tensor, Tensor]:
    act = ACTIVATIONS[form.activation]
    order, inverse, offsets = plan
    w_gate_up, w_down, b_gate_up, b_down = weights
    rows = take_rows(x, order // form.top_k)
    pre = _linear(rows, w_gate_up, b_gate_up, offsets, form.transposed, multiply)
    activated = act.forward(*split(pre, act, form.interleaved))
    y = _linear(activated, w_down, b_down, offsets, form.transposed, multiply)
    slot_scores = _slot_scores(scores, inverse, offsets, x).reshape(x.shape[0], form.top_k, 1)
    by_slot = take_rows(y, inverse).reshape(x.shape[0], form.top_k, y.shape[-1])
    return (by_slot.to(slot_scores.dtype) * slot_scores).sum(1).to(x.dtype), pre


def experts(
    x: Tensor, scores: Tensor | None, plan: PlanTensors, weights: Weights, form: Form, multiply: GroupedMM
) -> Tensor:
    """The output of :func:`experts_forward` as one differentiable torch expression."""
    return _forward(x, scores, plan, weights, form, multiply)[0]


def experts_forward(
    x: Tensor,
    scores: Tensor | None,
    plan: PlanTensors,
    weights: Weights,
    form: Form,
    save: bool,
    multiply: GroupedMM = grouped_mm,
) -> tuple[Tensor, Tensor]:
    """Run every token through its experts.

    Args:
        x: ``[T, H]``.
        scores: ``[T, K]`` router weights in float32 (float64 for float64 ``x``), or None for ones.
        plan, weights, form: See :mod:`moekern.backends.call`.
        save: Whether the pre-activation is wanted.

    Returns:
        Output ``[T, H]`` and the pre-activation ``[S, 2I]`` (empty without ``save``).
    """
    out, pre = _forward(x, scores, plan, weights, form, multiply)
    return out, pre if save else pre.new_empty(0)


def experts_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    scores: Tensor | None,
    plan: PlanTensors,
    weights: Weights,
    form: Form,
    needs: list[bool],
    multiply: GroupedMM = grouped_mm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scores, w_gate_up, w_down, b_gate_up, b_down; empty where ``needs`` says no.

    Nothing of size ``[S, H]`` was saved: the down projection's output is not needed, because
    ``dS_r = <dO_t W_down, A_r> + <dO_t, b_down>``.
    """
    act = ACTIVATIONS[form.activation]
    order, inverse, offsets = plan
    w_gate_up, w_down, _, b_down = weights
    top_k, transposed, interleaved = form.top_k, form.transposed, form.interleaved
    rows = pre.shape[0]
    token = (order // top_k).long()
    real = (torch.arange(rows, device=x.device) < offsets[-1]).unsqueeze(1)
    weight = _slot_scores(scores, inverse, offsets, x)[order.long()].unsqueeze(1)

    g, u = split(torch.where(real, pre, 0), act, interleaved)
    a = act.forward(g, u)
    dout_rows = torch.where(real, dout[token], 0)
    da_unscaled = multiply(dout_rows, w_down, offsets, "nt" if transposed else "nn").to(weight.dtype)

    d_scores = x.new_empty(0)
    if needs[1]:
        per_row = (da_unscaled * a.to(weight.dtype)).sum(1)
        if b_down is not None:
            per_row = per_row + (dout_rows.to(weight.dtype) * bias_rows(b_down, offsets, rows).to(weight.dtype)).sum(1)
        d_scores = per_row[inverse.long()].reshape(x.shape[0], top_k)

    dg, du = act.backward((da_unscaled * weight).to(x.dtype), g, u)
    dh = join(dg, du, interleaved)
    scaled_a = (a * weight).to(x.dtype)

    dx = x.new_empty(0)
    if needs[0]:
        dx_rows = multiply(dh, w_gate_up, offsets, "nt" if transposed else "nn")
        by_slot = dx_rows[inverse.long()].reshape(x.shape[0], top_k, x.shape[1])
        dx = by_slot.to(weight.dtype).sum(1).to(x.dtype)

    def weight_gradient(out_grad: Tensor, inp: Tensor) -> Tensor:
        return multiply(inp, out_grad, offsets, "tn") if transposed else multiply(out_grad, inp, offsets, "tn")

    def bias_gradient(row_grad: Tensor) -> Tensor:
        ones = torch.ones(rows, 1, dtype=row_grad.dtype, device=x.device)
        return multiply(ones, row_grad, offsets, "tn").squeeze(1).to(x.dtype)

    return (
        dx,
        d_scores,
        weight_gradient(dh, x[token]) if needs[2] else x.new_empty(0),
        weight_gradient(dout_rows, scaled_a) if needs[3] else x.new_empty(0),
        bias_gradient(dh.to(weight.dtype)) if needs[4] else x.new_empty(0),
        bias_gradient(dout_rows.to(weight.dtype) * weight) if needs[5] else x.new_empty(0),
    )


def _used(plan: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The row of every slot, and whether it has an expert, ``[S, 1]``."""
    _, inverse, offsets = plan
    return inverse.long(), (inverse < offsets[-1]).unsqueeze(1)


def _slot_weights(weights: Tensor, used: Tensor) -> Tensor:
    return torch.where(used, weights.reshape(-1, 1), 0)


def permute(x: Tensor, plan: Sequence[Tensor], top_k: int) -> Tensor:
    """Copy each token to its rows.

    Args:
        x: ``[T, H]``.
        plan: ``order``, ``inverse``, ``offsets``.
        top_k: K.

    Returns:
        ``[S, H]``, zero in the rows of sentinels.
    """
    row, used = _used(plan)
    by_slot = x.repeat_interleave(top_k, 0)
    return torch.zeros_like(by_slot).index_copy(0, row, torch.where(used, by_slot, 0))


def combine(y: Tensor, weights: Tensor | None, plan: Sequence[Tensor], top_k: int) -> Tensor:
    """Sum each token's rows, weighted. Without weights it is also the gradient of :func:`permute`.

    Args:
        y: ``[S, H]``; the rows of sentinels count for nothing, whatever they hold.
        weights: ``[T, K]`` in float32 (float64 for float64 ``y``), or None for ones.
        plan, top_k: As in :func:`permute`.

    Returns:
        ``[T, H]``, summed in the dtype of the weights and rounded once.
    """
    row, used = _used(plan)
    by_slot = torch.where(used, y.index_select(0, row), 0).to(_accumulator(y.dtype))
    if weights is not None:
        by_slot = by_slot * _slot_weights(weights, used)
    return by_slot.reshape(y.shape[0] // top_k, top_k, y.shape[1]).sum(1).to(y.dtype)


def combine_backward(
    dout: Tensor, y: Tensor, weights: Tensor | None, plan: Sequence[Tensor], top_k: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights of :func:`combine`; empty where ``needs`` says no, or without weights.

    As a torch expression it can be differentiated itself.
    """
    row, used = _used(plan)
    by_slot = dout.repeat_interleave(top_k, 0).to(_accumulator(y.dtype))
    dy, dweights = y.new_empty(0), y.new_empty(0)
    if needs[0]:
        scaled = by_slot if weights is None else by_slot * _slot_weights(weights, used)
        dy = torch.zeros_like(y).index_copy(0, row, torch.where(used, scaled, 0).to(y.dtype))
    if needs[1] and weights is not None:
        dots = (by_slot * torch.where(used, y.index_select(0, row), 0)).sum(1, keepdim=True)
        dweights = torch.where(used, dots, 0).reshape(weights.shape)
    return dy, dweights
