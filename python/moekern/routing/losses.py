"""Losses on a router's logits that keep the experts evenly used, as functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekern.routing import router
from moekern.verbs import checks, masks


def load_balancing_loss(
    logits: Tensor, tokens_per_expert: Tensor, *, mask: Tensor | None = None, group: Any = None
) -> Tensor:
    """The auxiliary loss of Switch Transformer (Fedus et al. 2021, equations 4 to 6), scaled as transformers does.

    ``E * sum_e f_e * P_e`` with ``f_e`` the share of tokens that chose expert e (these sum to top_k) and ``P_e`` its
    mean probability. It is ``top_k`` when all experts are used alike, and larger otherwise.

    Args:
        logits: ``[T, E]`` router logits; the gradient flows through these.
        tokens_per_expert: ``[E]`` counts, without those of masked tokens.
        mask: ``[T]``, zero for tokens that do not count (padding), even if their logits are NaN; bool or integer.
            None: all count.
        group: A torch.distributed process group over which the counts are summed, so that the batches of all its ranks
            are balanced together; None for this rank alone. Data-parallel training averages the gradients over the
            ranks; that mean is then the gradient of the loss of the whole batch, for any number of tokens per rank.

    Returns:
        A scalar in float32.
    """
    _check_logits(logits, ("tokens", "experts"))
    check_group(group)
    num_experts = logits.shape[1]
    checks.is_tensor("tokens_per_expert", tokens_per_expert)
    checks.has_dtype("tokens_per_expert", tokens_per_expert, (*checks.OFFSETS, *checks.FLOATING))
    checks.has_shape("tokens_per_expert", tokens_per_expert, (num_experts,), "one count per expert")
    checks.same_device("tokens_per_expert", tokens_per_expert, "logits", logits)
    weight = _token_weights(logits, mask)
    probability = (torch.softmax(_masked(logits, weight), dim=-1) * weight).sum(0)
    counts, tokens = tokens_per_expert.float(), weight.sum()
    of_a_rank = tokens
    if group is not None:
        both = torch.cat((counts, tokens.reshape(1)))
        dist.all_reduce(both, group=group)
        counts, tokens = both[:-1], both[-1]
        of_a_rank = tokens / dist.get_world_size(group)
    return num_experts * ((counts / tokens.clamp(min=1)) * probability).sum() / _at_least_some(of_a_rank)


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The router z-loss of ST-MoE (Zoph et al. 2022, equation 5): the mean square of the logits' log-sum-exp.

    It keeps the logits small, where float32 resolves them well.

    Args:
        logits: ``[T, E]``.
        mask: As in :func:`load_balancing_loss`.
    """
    _check_logits(logits, ("tokens", "experts"))
    weight = _token_weights(logits, mask)
    square = torch.logsumexp(_masked(logits, weight), dim=-1, keepdim=True).square()
    return (square * weight).sum() / weight.sum().clamp(min=1)


def sequence_balancing_loss(
    logits: Tensor, topk_ids: Tensor, *, method: str = "deepseek_v3", mask: Tensor | None = None
) -> Tensor:
    """The sequence-wise loss of DeepSeek-V3 (2024, equations 17 to 20): balance within each sequence.

    For one sequence ``sum_e f_e * P_e`` with ``f_e = E / K`` times the share of its tokens that chose expert e, and
    ``P_e`` the mean of e's score as a share of the token's scores. It is 1 when all experts are used alike.

    Args:
        logits: ``[B, N, E]``: B sequences of N tokens.
        topk_ids: ``[B, N, K]`` int64, int32, uint8 or uint16; sentinels are not counted.
        method: The method of :func:`moekern.route`, for its scores.
        mask: ``[B, N]``, zero for padding, or None.

    Returns:
        The mean over the sequences that have a token, a scalar in float32; zero if none has.
    """
    _check_logits(logits, ("sequences", "tokens", "experts"))
    checks.is_tensor("topk_ids", topk_ids)
    checks.has_dtype("topk_ids", topk_ids, checks.INTEGER)
    checks.same_device("topk_ids", topk_ids, "logits", logits)
    sequences, length, num_experts = logits.shape
    checks.has_shape("topk_ids", topk_ids, (sequences, length, "top_k"), "as logits")
    checks.one_of("method", method, tuple(router.METHODS))
    weight = _token_weights(logits, mask)
    tokens = weight.sum(1).clamp(min=1)
    scores = router.scores(_masked(logits, weight), method)
    probability = (scores / (scores.sum(-1, keepdim=True) + 1e-20) * weight).sum(1) / tokens
    chosen = weight.expand(-1, -1, topk_ids.shape[2]).flatten(1)
    ids = topk_ids.flatten(1).to(torch.int64)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)  # a column for sentinels
    counts = probability.new_zeros(sequences, num_experts + 1).scatter_add(1, ids, chosen)[:, :-1]
    share = counts * num_experts / (topk_ids.shape[2] * tokens)
    return (share * probability).sum() / (weight.sum(1) > 0).sum().clamp(min=1)


def check_group(group: object) -> None:
    """Raise TypeError unless it is a process group of torch.distributed or None."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group: got {type(group).__name__}, expected a torch.distributed process group or None")


def _check_logits(logits: Tensor, shape: tuple[str, ...]) -> None:
    checks.is_tensor("logits", logits)
    checks.has_dtype("logits", logits, checks.FLOATING)
    checks.has_shape("logits", logits, shape)


def _token_weights(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Float32 ``[..., 1]``: one for a token that counts, zero for a masked one."""
    if mask is None:
        return torch.ones((*logits.shape[:-1], 1), dtype=torch.float32, device=logits.device)
    checks.is_tensor("mask", mask)
    checks.has_shape("mask", mask, tuple(logits.shape[:-1]), "one entry per token")
    checks.same_device("mask", mask, "logits", logits)
    return masks.truth("mask", mask).to(torch.float32).unsqueeze(-1)


def _masked(logits: Tensor, weight: Tensor) -> Tensor:
    """The logits in float32, zero for masked tokens: padding may be NaN, and zero times NaN is NaN."""
    return torch.where(weight > 0, logits.float(), 0)


def _at_least_some(tokens: Tensor) -> Tensor:
    """A number of tokens to divide by: at least one."""
    return torch.where(tokens > 0, tokens, 1)
