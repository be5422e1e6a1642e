"""The verbs on the CPU: shapes and allocation here, all work in Rust.

float64 has no kernels of its own and is served by the reference, except for planning, permute and combine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moekern import _core
from moekern.backends import reference
from moekern.backends.call import Form, PlanTensors, Weights, sizes_of
from moekern.backends.codes import DTYPE, ID_TYPE, KIND

_LARGE = 32 << 20  # bytes
_LARGE_PLAN = 1 << 18  # slots: order and inverse take 1 MiB each


def _aligned(t: Tensor) -> Tensor:
    """The tensor itself, or a copy if its elements straddle addresses (views of foreign buffers can)."""
    return t if t.data_ptr() % t.element_size() == 0 else t.clone()


def _aligned_weights(weights: Weights) -> Weights:
    w_gate_up, w_down = _aligned(weights.w_gate_up), _aligned(weights.w_down)
    if w_gate_up is weights.w_gate_up and w_down is weights.w_down:
        return weights
    return weights._replace(w_gate_up=w_gate_up, w_down=w_down)


def _result(shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor. Large ones use memory that earlier ones gave back: faulting in fresh pages, which
    the allocator does from 32 MiB on, takes several times as long as writing a gradient."""
    size = math.prod(shape) * like.element_size()
    if size < _LARGE:
        return torch.empty(shape, dtype=like.dtype, device="cpu")
    return torch.frombuffer(_core.Pages(size), dtype=like.dtype).view(shape)


def _indices(slots: int) -> Tensor:
    """Uninitialised int32 ``[slots]``, from a large plan's size on in memory that earlier ones gave back: the allocator
    may return the megabytes of one plan to the system, and faulting them in again takes as long as planning."""
    if slots < _LARGE_PLAN:
        return torch.empty(slots, dtype=torch.int32, device="cpu")
    return torch.frombuffer(_core.Pages(4 * slots), dtype=torch.int32)


def plan(topk_ids: Tensor, num_experts: int) -> PlanTensors:
    """See :func:`moekern.backends.reference.plan`."""
    ids = _aligned(topk_ids.contiguous())
    slots = ids.numel()
    # Given back in the other order, so that each gets its own memory again, which lies in the caches of the cores that
    # write it.
    inverse, order = _indices(slots), _indices(slots)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device="cpu")
    _core.plan(
        ids.data_ptr(), ID_TYPE[ids.dtype], slots, num_experts,
        order.data_ptr(), inverse.data_ptr(), offsets.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return PlanTensors(order, inverse, offsets)


def experts_forward(
    x: Tensor, scores: Tensor | None, plan: PlanTensors, weights: Weights, form: Form, save: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`moekern.backends.reference.experts_forward`."""
    if x.dtype == torch.float64:
        return reference.experts_forward(x, scores, plan, weights, form, save)
    x, weights = _aligned(x), _aligned_weights(weights)
    sizes = sizes_of(weights, form)
    out = torch.empty_like(x)
    pre = _result((plan.order.shape[0], sizes[3]), x) if save else x.new_empty(0)
    _core.experts_forward(
        DTYPE[x.dtype], torch.get_num_threads(), x.shape[0], sizes,
        x, scores, plan, weights, form, pre if save else None, out,
    )  # fmt: skip
    return out, pre


def experts_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    scores: Tensor | None,
    plan: PlanTensors,
    weights: Weights,
    form: Form,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """See :func:`moekern.backends.reference.experts_backward`."""
    if x.dtype == torch.float64:
        return reference.experts_backward(dout, x, pre, scores, plan, weights, form, needs)
    gradients = tuple(
        _result(t.shape, t) if wanted and t is not None else x.new_empty(0)
        for t, wanted in zip((x, scores, *weights), needs, strict=True)
    )
    dout, x, weights = _aligned(dout), _aligned(x), _aligned_weights(weights)
    _core.experts_backward(
        DTYPE[x.dtype], torch.get_num_threads(), x.shape[0], sizes_of(weights, form),
        dout, x, pre, scores, plan, weights, form,
        tuple(g if wanted else None for g, wanted in zip(gradients, needs, strict=True)),
    )  # fmt: skip
    return gradients


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, kind: str) -> Tensor:
    """See :func:`moekern.backends.reference.grouped_mm`."""
    if a.dtype == torch.float64:
        return reference.grouped_mm(a, b, offsets, kind)
    a, b = _aligned(a), _aligned(b)
    experts, (rows, k) = offsets.shape[0] - 1, a.shape
    n = b.shape[1] if kind != "nn" else b.shape[2]
    out = _result((experts, k, n) if kind == "tn" else (rows, n), a)
    _core.grouped_mm(
        DTYPE[a.dtype], torch.get_num_threads(), KIND[kind], experts, rows, k, n,
        a, b, offsets, out,
    )  # fmt: skip
    return out


def _whole(t: Tensor) -> Tensor:
    return _aligned(t.contiguous())


def permute(x: Tensor, plan: Sequence[Tensor], top_k: int) -> Tensor:
    """See :func:`moekern.backends.reference.permute`."""
    x, (_, inverse, offsets) = _whole(x), map(torch.Tensor.contiguous, plan)
    tokens, hidden = x.shape
    out = x.new_empty(inverse.shape[0], hidden)
    _core.permute(
        DTYPE[x.dtype], torch.get_num_threads(), (tokens, hidden, top_k, offsets.shape[0] - 1),
        x, (None, inverse, offsets), out,
    )  # fmt: skip
    return out


def combine(y: Tensor, weights: Tensor | None, plan: Sequence[Tensor], top_k: int) -> Tensor:
    """See :func:`moekern.backends.reference.combine`."""
    y, (_, inverse, offsets) = _whole(y), map(torch.Tensor.contiguous, plan)
    weights = None if weights is None else _whole(weights)
    tokens, hidden = y.shape[0] // top_k, y.shape[1]
    out = y.new_empty(tokens, hidden)
    _core.combine(
        DTYPE[y.dtype], torch.get_num_threads(), (tokens, hidden, top_k, offsets.shape[0] - 1),
        y, weights, (None, inverse, offsets), out,
    )  # fmt: skip
    return out


def combine_backward(
    dout: Tensor, y: Tensor, weights: Tensor | None, plan: Sequence[Tensor], top_k: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """See :func:`moekern.backends.reference.combine_backward`."""
    dout, y, (_, inverse, offsets) = _whole(dout), _whole(y), map(torch.Tensor.contiguous, plan)
    weights = None if weights is None else _whole(weights)
    tokens, hidden = dout.shape
    dy = torch.empty_like(y) if needs[0] else y.new_empty(0)
    dweights = torch.empty_like(weights) if needs[1] and weights is not None else None
    _core.combine_backward(
        DTYPE[y.dtype], torch.get_num_threads(), (tokens, hidden, top_k, offsets.shape[0] - 1),
        dout, y, weights, (None, inverse, offsets), dy if needs[0] else None, dweights,
    )  # fmt: skip
    return dy, y.new_empty(0) if dweights is None else dweights
