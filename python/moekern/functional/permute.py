"""Dispatch and combine as separate functions: tokens to rows sorted by expert, and rows back to tokens.

:func:`moekern.experts` fuses both into its GEMMs; these are for code that does something else with the sorted rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.functional.plan import Plan
from moekern.verbs import checks
from moekern.verbs import permute as verbs
from moekern.verbs.backend import resolve


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
    return verbs.permute(x, plan[:3], plan.top_k, resolve(x.device.type))


def combine(y_sorted: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows, weighted. Differentiable in rows and weights, any number of times.

    ``out[t] = sum_k weights[t, k] * y_sorted[plan.inverse[t * top_k + k]]``, summed in float32 (float64 for float64
    rows) with k ascending, and rounded once. Sentinels contribute nothing, even if their rows hold NaN.

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
    checks.has_shape("y_sorted", y_sorted, (slots, "hidden"), "one row per slot of plan")
    if weights is not None:
        checks.is_tensor("weights", weights)
        checks.has_dtype("weights", weights, checks.FLOATING)
        checks.same_device("weights", weights, "y_sorted", y_sorted)
        checks.has_shape("weights", weights, (slots // plan.top_k, plan.top_k), "tokens, top_k")
        weights = weights.to(torch.float64 if y_sorted.dtype == torch.float64 else torch.float32)
    return verbs.combine(y_sorted, weights, plan[:3], plan.top_k, resolve(y_sorted.device.type))


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
