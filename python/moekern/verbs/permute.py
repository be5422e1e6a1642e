"""Permute and combine, differentiable any number of times.

Permute and unweighted combine are each other's gradients. The gradient of weighted combine is a separate operator,
bilinear in (dout, rows) and in (dout, weights); its own derivatives are those of the reference's expression.
Batches of gradients and of tangents take that expression too: the ``vmap`` of ``is_grads_batched`` refuses operators
that take a list of tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern.backends import reference
from moekern.backends.observers import forward_mode
from moekern.verbs import direct, ops
from moekern.verbs.autograd import Sliced, total

Ctx = Any  # torch types the context of a Function loosely
Parts = tuple[Tensor, Tensor, Tensor]  # order, inverse, offsets


class _Permute(Sliced):
    """Arguments: x, order, inverse, offsets, top_k, backend."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int, backend: str) -> Tensor:
        return ops.permute(x, (order, inverse, offsets), top_k, backend)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:4])
        ctx.settings = inputs[4:]

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 6
        direct.refuse_batched_graph("permute")
        return (combine(dout, None, ctx.saved_tensors, *ctx.settings), *(None,) * 5)


class _Combine(Sliced):
    """Arguments: y, weights, order, inverse, offsets, top_k, backend."""

    @staticmethod
    def forward(
        y: Tensor, weights: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int, backend: str
    ) -> Tensor:
        return ops.combine(y, weights, (order, inverse, offsets), top_k, backend)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        y, weights, *plan = inputs[:5]
        # Without weights the gradient needs no rows, and permute is all of it.
        ctx.save_for_backward(None if weights is None else y, weights, *plan)
        ctx.settings = inputs[5:]

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if dout is None:
            return (None, None, *nothing)
        y, weights, *plan = ctx.saved_tensors
        top_k, backend = ctx.settings
        if weights is None:
            direct.refuse_batched_graph("combine")
            return (permute(dout, plan, top_k, backend), None, *nothing)
        needs = list(ctx.needs_input_grad[:2])
        seen = direct.transformed() or direct.batched_gradients()
        if seen or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
            dy, dweights = reference.combine_backward(dout, y, weights, plan, top_k, needs)
        else:
            dy, dweights = ops.combine_backward(dout, y, weights, plan, top_k, needs, backend)
        return (dy if needs[0] else None, dweights if needs[1] else None, *nothing)


class _DualPermute(_Permute):
    """With a rule for tangents, which torch.compile does not take."""

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Permute.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:4])

    @staticmethod
    def jvp(ctx: Ctx, dx: Tensor | None, *_: None) -> Tensor | None:  # type: ignore[override]
        return None if dx is None else permute(dx, ctx.saved_tensors, *ctx.settings)


class _DualCombine(_Combine):
    """With a rule for tangents: linear in the rows and in the weights."""

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Combine.setup_context(ctx, inputs, output)
        y, weights, *plan = inputs[:5]
        ctx.save_for_forward(None if weights is None else y, weights, *plan)

    @staticmethod
    def jvp(ctx: Ctx, dy: Tensor | None, dweights: Tensor | None, *_: None) -> Tensor | None:  # type: ignore[override]
        y, weights, *plan = ctx.saved_tensors
        return total(
            None if dy is None else combine(dy, weights, plan, *ctx.settings),
            None if dweights is None else combine(y, dweights, plan, *ctx.settings),
        )


def permute(x: Tensor, plan: Parts, top_k: int, backend: str) -> Tensor:
    """The rows of every token, sorted by expert; see :func:`moekern.permute`."""
    if direct.batched_gradients():
        return reference.permute(x, plan, top_k)
    if forward_mode():
        return _DualPermute.apply(x, *plan, top_k, backend)  # type: ignore[no-any-return]
    if direct.transformed() or (torch.is_grad_enabled() and x.requires_grad):
        return _Permute.apply(x, *plan, top_k, backend)  # type: ignore[no-any-return]
    return ops.permute(x, plan, top_k, backend)  # type: ignore[no-any-return]


def combine(y: Tensor, weights: Tensor | None, plan: Parts, top_k: int, backend: str) -> Tensor:
    """The sum of every token's rows; see :func:`moekern.combine`. The weights have the dtype of the sums."""
    if direct.batched_gradients():
        return reference.combine(y, weights, plan, top_k)
    if forward_mode():
        return _DualCombine.apply(y, weights, *plan, top_k, backend)  # type: ignore[no-any-return]
    wanted = y.requires_grad or (weights is not None and weights.requires_grad)
    if direct.transformed() or (torch.is_grad_enabled() and wanted):
        return _Combine.apply(y, weights, *plan, top_k, backend)  # type: ignore[no-any-return]
    return ops.combine(y, weights, plan, top_k, backend)  # type: ignore[no-any-return]
