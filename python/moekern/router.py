"""Routing: from a router's logits to the experts of each token and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern import checks

METHODS = ("softmax_topk", "topk_softmax")


def route(
    logits: Tensor, top_k: int, *, method: str = "softmax_topk", norm_topk_prob: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token.

    The arithmetic is float32 (float64 for float64 logits), under autocast too.

    Args:
        logits: ``[T, E]`` (any leading dimensions), floating.
        top_k: K, between 1 and E.
        method: ``"softmax_topk"``: softmax over all experts, then the K largest (Mixtral, Qwen, OLMoE).
            ``"topk_softmax"``: the K largest logits, softmax over these (gpt-oss).
        norm_topk_prob: Scale the K weights of ``"softmax_topk"`` to sum to one (Mixtral and Qwen3 do, OLMoE does not;
            then both methods give the same weights). ``"topk_softmax"`` always sums to one.

    Returns:
        Weights ``[T, K]`` in float32, descending, differentiable in the logits, and ids ``[T, K]`` int64.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range.
    """
    checks.is_tensor("logits", logits)
    checks.has_dtype("logits", logits, checks.FLOATING)
    if logits.ndim < 1:
        raise ValueError("logits: got a scalar, expected [..., experts]")
    checks.one_of("method", method, METHODS)
    checks.is_bool("norm_topk_prob", norm_topk_prob)
    checks.is_int("top_k", top_k, 1, logits.shape[-1], f"logits have {logits.shape[-1]} experts")
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if method == "topk_softmax":
        values, ids = torch.topk(logits, top_k, dim=-1)
        return torch.softmax(values, dim=-1), ids
    weights, ids = torch.topk(torch.softmax(logits, dim=-1), top_k, dim=-1)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids
