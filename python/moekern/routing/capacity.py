"""Limits on the number of tokens an expert takes: the slots over the limit become sentinels."""

from __future__ import annotations

from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from moekern.functional.plan import Plan, plan
from moekern.routing import router
from moekern.verbs import checks

Count = TypeVar("Count", int, Tensor)
ORDERS = ("score", "position")


def limit_tokens(
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    *,
    capacity: int | None = None,
    multiple: int = 1,
    by: str = "score",
) -> Tensor:
    """Drop the slots of each expert that exceed its capacity or do not fill a multiple.

    A dropped slot's id becomes -1: in :func:`moekern.experts` such a slot has no work, no output and no gradient. The
    other weights of its token stay as they are.

    Args:
        topk_ids: ``[T, K]`` integer; sentinels stay sentinels.
        topk_weights: ``[T, K]`` floating, needed for ``by="score"`` only; else None is accepted.
        num_experts: E.
        capacity: The most tokens per expert (GShard, Switch Transformer); None for no limit.
        multiple: Each expert's number of tokens is rounded down to a multiple of this, so that the tiles of a grouped
            GEMM are full; :func:`moekern.round_tokens` rounds up too.
        by: Which slots stay: ``"score"``, those of largest weight, or ``"position"``, the first ones. Of equal weights
            the first stay.

    Returns:
        ``[T, K]`` int64.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, shape or range.
    """
    checks.topk_ids("topk_ids", topk_ids)
    checks.is_int("num_experts", num_experts, 1)
    check_options(capacity, multiple, by)
    if by == "score":
        checks.is_tensor("topk_weights", topk_weights)
        assert topk_weights is not None
        checks.has_dtype("topk_weights", topk_weights, checks.FLOATING)
        checks.has_shape("topk_weights", topk_weights, tuple(topk_ids.shape), "as topk_ids")
        checks.same_device("topk_weights", topk_weights, "topk_ids", topk_ids)
    return drop(plan(topk_ids, num_experts), topk_ids, topk_weights, capacity, multiple, by)


def check_options(capacity: int | None, multiple: int, by: str) -> None:
    """Raises TypeError or ValueError unless the options of :func:`limit_tokens` are in range."""
    if capacity is not None:
        checks.is_int("capacity", capacity, 0)
    checks.is_int("multiple", multiple, 1)
    checks.one_of("by", by, ORDERS)


def capacity_of(factor: float, tokens: Count, top_k: int, num_experts: int) -> Count:
    """The capacity: ``factor`` times an even share of the slots, rounded up; tokens are a number or a tensor.

    Computed in integers: 1.1 times 50 is 55, but in binary floating point a little more, which would round up to 56.
    """
    return capacity_of_ratio(ratio(min(factor, num_experts)), tokens, top_k, num_experts)  # a larger one limits nothing


def capacity_of_ratio(share: tuple[int, int], tokens: Count, top_k: int, num_experts: int) -> Count:
    """The same for a factor as a fraction, from :func:`ratio`."""
    numerator, denominator = share
    return -(-(numerator * top_k * tokens) // (denominator * num_experts))


@torch.compiler.assume_constant_result
def ratio(factor: float) -> tuple[int, int]:
    """The intended fraction: 1.1 is 11/10, and 1.3333333333333333 is 4/3."""
    exact = Fraction(str(float(factor)))
    return (exact.limit_denominator(1_000_000) or exact).as_integer_ratio()


def drop(
    chosen: Plan, topk_ids: Tensor, topk_weights: Tensor | None, capacity: int | Tensor | None, multiple: int, by: str
) -> Tensor:
    """:func:`limit_tokens` without checks, for ids whose plan is known."""
    limit = chosen.counts
    if capacity is not None:
        limit = limit.clamp(max=capacity)
    return keep_best(chosen, topk_ids, topk_weights, limit // multiple * multiple, by)


def keep_best(chosen: Plan, topk_ids: Tensor, topk_weights: Tensor | None, limit: Tensor, by: str) -> Tensor:
    """The ids with -1 for the slots of each expert over its limit, ``[E]``."""
    ids = topk_ids.reshape(-1).to(torch.int64)
    real = (ids >= 0) & (ids < chosen.num_experts)
    expert = torch.where(real, ids, 0)
    if by == "position":
        rank = chosen.inverse - chosen.offsets[expert]
    else:
        assert topk_weights is not None
        best_first = router.largest_first(topk_weights.detach().reshape(-1))
        sorted_plan = plan(ids[best_first].unsqueeze(1), chosen.num_experts)
        rank_sorted = sorted_plan.inverse - sorted_plan.offsets[expert[best_first]]
        rank = torch.empty_like(rank_sorted).scatter(0, best_first, rank_sorted)
    keep = real & (rank < limit[expert])
    return torch.where(keep, ids, -1).reshape(topk_ids.shape)
