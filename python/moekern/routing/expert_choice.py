"""Expert choice: every expert takes its best tokens, so that all are used equally without a loss (Zhou et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moekern.backends.observers import is_exporting
from moekern.backends.reference import take_rows
from moekern.routing import router
from moekern.verbs import checks


def expert_choice(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Let every expert choose its tokens.

    A token may be chosen by any number of experts, or by none. The choice depends on all tokens of the batch, later
    ones too: a causal language model trained with it cannot generate token by token as it was trained.

    Args:
        logits: ``[T, E]`` floating.
        capacity: C, tokens per expert, 0 to T.

    Returns:
        Weights ``[E, C]`` in float32, the softmax over experts at the chosen tokens, differentiable in the logits, and
        tokens ``[E, C]`` int64. Of equal scores the first token wins.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range.
    """
    checks.is_tensor("logits", logits)
    checks.has_dtype("logits", logits, checks.FLOATING)
    checks.has_shape("logits", logits, ("tokens", "experts"))
    checks.is_int("capacity", capacity, 0, logits.shape[0], "as many as logits have tokens")
    return choose_any(logits, capacity)


def choose_any(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """:func:`expert_choice` without its checks: comparing sizes would bind an exported program to some of them."""
    scores = router.scores(logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32), "softmax_topk")
    by_expert = scores.mT.contiguous()
    tokens = router.choose(by_expert.detach(), capacity)
    return by_expert.gather(1, tokens), tokens


def free_size(capacity: int, tokens: int) -> int:
    """The same number as a new symbolic size for torch.export, without any assumption on it.

    As a formula of the number of tokens, torch.export would assume that it is not one, and then refuse any range of
    tokens in which it can be.
    """
    free = torch.full((), capacity, device="cpu").item()
    torch._check(free >= 0)
    torch._check(free <= tokens)
    return free  # type: ignore[return-value]


def choose_real(logits: Tensor, capacity: int, mask: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`expert_choice` among the tokens that ``mask`` ``[T]`` keeps; of ``capacity`` places the first are used.

    Places that are not used have weight zero, so that shapes do not depend on the mask.
    """
    scores = router.scores(logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32), "softmax_topk")
    by_expert = scores.mT.contiguous()
    tokens = router.choose(by_expert.detach().masked_fill(~mask, -1), capacity)
    is_used = torch.arange(capacity, device=logits.device) < places
    return torch.where(is_used, by_expert.gather(1, tokens), 0), tokens


def add_rows(y: Tensor, tokens: Tensor, count: int) -> Tensor:
    """``[count, H]``, the sums by token of rows y ``[R, H]``, in float32 or float64.

    This is the transpose of an embedding lookup, which adds in a fixed order on every device.
    """
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return torch.ops.aten.embedding_dense_backward(wide, tokens, count, -1, False)  # type: ignore[no-any-return]


def run_chosen(x: Tensor, weights: Tensor, tokens: Tensor, experts: Callable[..., Tensor]) -> Tensor:
    """Run tokens ``[E, C]`` of x ``[T, H]`` through their experts and sum by token with weights ``[E, C]``.

    The gather is an embedding lookup and the sum its transpose: both, and so their gradients, add in a fixed order on
    every device.
    """
    num_experts, capacity = tokens.shape
    rows = take_rows(x, tokens.reshape(-1))
    offsets = torch.arange(num_experts + 1, device=x.device, dtype=torch.int32) * capacity
    y = experts(rows, offsets=offsets)
    weighted = y.to(weights.dtype) * weights.reshape(-1, 1)
    if not is_exporting() and capacity == 0:  # whose derivative fails without rows
        return weighted.sum(0).expand(x.shape).to(y.dtype)
    return add_rows(weighted, tokens.reshape(-1), x.shape[0]).to(y.dtype)
