"""Dispatch and combine as functions of their own: tokens to rows sorted by expert, and rows back to tokens.

:func:`moekern.experts` fuses both into its GEMMs; these are for code that does something else with the sorted rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern import _core
from moekern.backends.observers import forward_mode
from moekern.functional.plan import Plan
from moekern.verbs import checks, direct, ops
from moekern.verbs.autograd import Sliced, total
from moekern.verbs.backend import resolve

Ctx = Any  # torch types the context of a Function loosely

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def permute(x: Tensor, plan: Plan) -> Tensor:
    """Copy each token to its ``top_k`` rows, sorted by expert. Differentiable, any number of times.

    Args:
        x: ``[T, H]``, float32, bfloat16, float16 or float64.
        plan: From :func:`moekern.plan`, for T tokens, on the device of x.

    Returns:
        ``[T * top_k, H]``: row r is ``x[plan.order[r] // top_k]``, and zero for sentinels.

    Raises:
        TypeError: x is not a dense floating tensor, or plan not a :class:`moekern.Plan`.
        ValueError: Shapes or devices do not fit together.
    """
    _check_rows("x", x, "tokens")
    _check_plan(plan, "x", x)
    if x.shape[0] * plan.top_k != plan.order.shape[0]:
        raise ValueError(
            f"x: got {x.shape[0]} tokens, expected {plan.order.shape[0] // max(plan.top_k, 1)}, as plan has"
        )
    return _permuted(x, plan.inverse, plan.offsets, plan.top_k, resolve(x.device.type))


def combine(y_sorted: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows, weighted. Differentiable in rows and weights, any number of times.

    ``out[t] = sum_k weights[t, k] * y_sorted[plan.inverse[t * top_k + k]]``, summed in float32 (float64 for float64
    rows) with k ascending, and rounded once. Sentinels contribute nothing, whatever their rows hold.

    Args:
        y_sorted: ``[T * top_k, H]``, float32, bfloat16, float16 or float64, in the order of ``plan``.
        plan: From :func:`moekern.plan`, on the device of y_sorted.
        weights: ``[T, top_k]`` floating, used in float32 (float64 for float64 rows), or None for ones.

    Returns:
        ``[T, H]`` in the dtype of y_sorted.

    Raises:
        TypeError: A tensor is not dense and floating, or plan not a :class:`moekern.Plan`.
        ValueError: Shapes or devices do not fit together.
    """
    _check_rows("y_sorted", y_sorted, "rows")
    _check_plan(plan, "y_sorted", y_sorted)
    slots = plan.order.shape[0]
    checks.has_shape("y_sorted", y_sorted, (slots, "hidden"), "one row a slot of plan")
    if weights is not None:
        checks.is_tensor("weights", weights)
        checks.has_dtype("weights", weights, checks.FLOATING)
        checks.same_device("weights", weights, "y_sorted", y_sorted)
        checks.has_shape("weights", weights, (slots // plan.top_k, plan.top_k), "tokens, top_k")
        weights = weights.to(_accumulator(y_sorted.dtype))
    backend = resolve(y_sorted.device.type)
    return _combined(y_sorted, weights, plan.inverse, plan.offsets, plan.top_k, backend)


def _check_rows(name: str, value: Tensor, dimension: str) -> None:
    checks.is_tensor(name, value)
    checks.has_dtype(name, value, checks.FLOATING)
    checks.has_shape(name, value, (dimension, "hidden"))


def _check_plan(plan: Plan, name: str, value: Tensor) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a moekern.Plan")
    if plan.top_k < 1:
        raise ValueError(f"plan: got top_k {plan.top_k}, expected at least 1")
    checks.same_device("plan", plan.order, name, value)


# The mathematics in plain torch: what the reference backend and CUDA tensors run, and what is differentiated twice.


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _permute_expression(x: Tensor, inverse: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    by_slot = x.repeat_interleave(top_k, 0)
    used = (inverse < offsets[-1]).unsqueeze(1)
    return torch.zeros_like(by_slot).index_copy(0, inverse.long(), torch.where(used, by_slot, 0))


def _combine_expression(y: Tensor, weights: Tensor | None, inverse: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    used = (inverse < offsets[-1]).unsqueeze(1)
    by_slot = torch.where(used, y[inverse.long()], 0).to(_accumulator(y.dtype))
    if weights is not None:
        by_slot = by_slot * weights.reshape(-1, 1)
    return by_slot.reshape(y.shape[0] // top_k, top_k, y.shape[1]).sum(1).to(y.dtype)


def _combine_gradient_expression(
    dout: Tensor, y: Tensor, weights: Tensor | None, inverse: Tensor, offsets: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and, where there are weights, of the weights."""
    used = (inverse < offsets[-1]).unsqueeze(1)
    by_slot = dout.repeat_interleave(top_k, 0).to(_accumulator(y.dtype))
    scaled = by_slot if weights is None else by_slot * weights.reshape(-1, 1)
    dy = torch.zeros_like(y).index_copy(0, inverse.long(), torch.where(used, scaled, 0).to(y.dtype))
    if weights is None:
        return dy, dout.new_empty(0)
    dots = (by_slot * torch.where(used, y[inverse.long()], 0)).sum(1)
    return dy, torch.where(used.squeeze(1), dots, 0).reshape(weights.shape)


# The operators.

_library = torch.library.Library("moekern", "FRAGMENT")
for _schema in (
    "permute(Tensor x, Tensor inverse, Tensor offsets, int top_k, str backend) -> Tensor",
    "combine(Tensor y, Tensor? weights, Tensor inverse, Tensor offsets, int top_k, str backend) -> Tensor",
    "combine_backward(Tensor dout, Tensor y, Tensor? weights, Tensor inverse, Tensor offsets, int top_k, "
    "bool[] needs, str backend) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _ready(t: Tensor) -> Tensor:
    """Contiguous and aligned to its elements: the tensor itself or a copy."""
    t = t.contiguous()
    return t if t.data_ptr() % t.element_size() == 0 else t.clone()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _permute(x: Tensor, inverse: Tensor, offsets: Tensor, top_k: int, backend: str) -> Tensor:
    if backend != "cpu":
        return _permute_expression(x, inverse, offsets, top_k)
    x, inverse, offsets = _ready(x), inverse.contiguous(), offsets.contiguous()
    tokens, hidden = x.shape
    out = x.new_empty(inverse.shape[0], hidden)
    _core.permute(
        _DTYPE[x.dtype], torch.get_num_threads(), tokens, hidden, top_k, offsets.shape[0] - 1,
        x.data_ptr(), inverse.data_ptr(), offsets.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def _combine(y: Tensor, weights: Tensor | None, inverse: Tensor, offsets: Tensor, top_k: int, backend: str) -> Tensor:
    if backend != "cpu":
        return _combine_expression(y, weights, inverse, offsets, top_k)
    y, inverse, offsets = _ready(y), inverse.contiguous(), offsets.contiguous()
    weights = None if weights is None else _ready(weights)
    tokens, hidden = y.shape[0] // top_k, y.shape[1]
    out = y.new_empty(tokens, hidden)
    _core.combine(
        _DTYPE[y.dtype], torch.get_num_threads(), tokens, hidden, top_k, offsets.shape[0] - 1,
        y.data_ptr(), _address(weights), inverse.data_ptr(), offsets.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def _combine_backward(
    dout: Tensor,
    y: Tensor,
    weights: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``needs``: whether the gradient of the rows, of the weights, is wanted; the other is empty."""
    nothing = y.new_empty(0)
    if backend != "cpu":
        dy, dweights = _combine_gradient_expression(dout, y, weights, inverse, offsets, top_k)
        return dy if needs[0] else nothing, dweights if needs[1] else nothing.clone()
    dout, y, inverse, offsets = _ready(dout), _ready(y), inverse.contiguous(), offsets.contiguous()
    weights = None if weights is None else _ready(weights)
    tokens, hidden = dout.shape
    dy = torch.empty_like(y) if needs[0] else nothing
    dweights = torch.empty_like(weights) if needs[1] and weights is not None else y.new_empty(0)
    _core.combine_backward(
        _DTYPE[y.dtype], torch.get_num_threads(), tokens, hidden, top_k, offsets.shape[0] - 1,
        dout.data_ptr(), y.data_ptr(), _address(weights), inverse.data_ptr(), offsets.data_ptr(),
        dy.data_ptr() if needs[0] else 0, dweights.data_ptr() if needs[1] else 0,
    )  # fmt: skip
    return dy, dweights


def _permute_shape(x: Tensor, inverse: Tensor, offsets: Tensor, top_k: int, backend: str) -> Tensor:
    return x.new_empty(inverse.shape[0], x.shape[1])


def _combine_shape(
    y: Tensor, weights: Tensor | None, inverse: Tensor, offsets: Tensor, top_k: int, backend: str
) -> Tensor:
    return y.new_empty(y.shape[0] // top_k, y.shape[1])


def _combine_backward_shape(
    dout: Tensor,
    y: Tensor,
    weights: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    dy = y.new_empty(y.shape) if needs[0] else y.new_empty(0)
    return dy, weights.new_empty(weights.shape) if needs[1] and weights is not None else y.new_empty(0)


for _name, _kernel, _shape in (
    ("permute", _permute, _permute_shape),
    ("combine", _combine, _combine_shape),
    ("combine_backward", _combine_backward, _combine_backward_shape),
):
    ops.register(_library, _name, _kernel, _shape)

_permute_op = torch.ops.moekern.permute.default
_combine_op = torch.ops.moekern.combine.default
_combine_backward_op = torch.ops.moekern.combine_backward.default


# Their gradients. Permute and unweighted combine are each other's; the gradient of combine is bilinear in (dout, y)
# and (dout, weights), and is differentiated again as the expression it is.


class _Permute(Sliced):
    @staticmethod
    def forward(x: Tensor, inverse: Tensor, offsets: Tensor, top_k: int, backend: str) -> Tensor:
        out: Tensor = _permute_op(x, inverse, offsets, top_k, backend)
        return out

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:3])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 5
        inverse, offsets = ctx.saved_tensors
        direct.refuse_batched_graph("permute")
        return _combined(dout, None, inverse, offsets, *ctx.settings), None, None, None, None


class _Combine(Sliced):
    @staticmethod
    def forward(
        y: Tensor, weights: Tensor | None, inverse: Tensor, offsets: Tensor, top_k: int, backend: str
    ) -> Tensor:
        out: Tensor = _combine_op(y, weights, inverse, offsets, top_k, backend)
        return out

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        y, weights, inverse, offsets = inputs[:4]
        # Without weights the gradient needs no rows, and permute is all of it.
        ctx.save_for_backward(None if weights is None else y, weights, inverse, offsets)
        ctx.settings = inputs[4:]

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if dout is None:
            return (None, None, *nothing)
        y, weights, inverse, offsets = ctx.saved_tensors
        top_k, backend = ctx.settings
        if weights is None:
            direct.refuse_batched_graph("combine")
            return (_permuted(dout, inverse, offsets, top_k, backend), None, *nothing)
        needs = list(ctx.needs_input_grad[:2])
        if direct.transformed() or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
            dy, dweights = _combine_gradient_expression(dout, y, weights, inverse, offsets, top_k)
        else:
            dy, dweights = _combine_backward_op(dout, y, weights, inverse, offsets, top_k, needs, backend)
        return (dy if needs[0] else None, dweights if needs[1] else None, *nothing)


class _DualPermute(_Permute):
    """With a rule for tangents, which torch.compile does not take."""

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Permute.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:3])

    @staticmethod
    def jvp(ctx: Ctx, dx: Tensor | None, *_: None) -> Tensor | None:  # type: ignore[override]
        return None if dx is None else _permuted(dx, *ctx.saved_tensors, *ctx.settings)


class _DualCombine(_Combine):
    """With a rule for tangents: linear in the rows and in the weights."""

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Combine.setup_context(ctx, inputs, output)
        y, weights, inverse, offsets = inputs[:4]
        ctx.save_for_forward(None if weights is None else y, weights, inverse, offsets)

    @staticmethod
    def jvp(ctx: Ctx, dy: Tensor | None, dweights: Tensor | None, *_: None) -> Tensor | None:  # type: ignore[override]
        y, weights, *plan = ctx.saved_tensors
        return total(
            None if dy is None else _combined(dy, weights, *plan, *ctx.settings),
            None if dweights is None else _combined(y, dweights, *plan, *ctx.settings),
        )


def _permuted(*arguments: Any) -> Tensor:
    return (_DualPermute if forward_mode() else _Permute).apply(*arguments)  # type: ignore[no-any-return]


def _combined(*arguments: Any) -> Tensor:
    return (_DualCombine if forward_mode() else _Combine).apply(*arguments)  # type: ignore[no-any-return]
