"""Token rounding (SonicMoE, Guo et al. 2025): each expert's number of tokens is a multiple, so that tiles are full.

Rounding down drops an expert's slots of least weight. Rounding up adds tokens that did not choose the expert, those
for which its weight is largest. So a token may get any number of further experts. These extra slots do not fit into
``[T, K]``: each becomes a row after the tokens, with one expert, and its output is added to its token's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekern.backends.reference import take_rows
from moekern.functional.plan import Plan, plan
from moekern.routing import router
from moekern.routing.capacity import check_options as check_capacity
from moekern.routing.capacity import keep_best
from moekern.routing.expert_choice import add_rows
from moekern.verbs import checks

MODES = ("down", "nearest", "up")


class Rounded(NamedTuple):
    """Slots after rounding.

    Attributes:
        topk_ids: ``[T, K]`` int64; -1 where the slot was dropped.
        extra_tokens: ``[E, P]`` int64: tokens given to each expert, best first; -1 for places not used. P is the most
            that rounding can add.
        extra_weights: ``[E, P]``, their weights; zero for places not used.
    """

    topk_ids: Tensor
    extra_tokens: Tensor
    extra_weights: Tensor

    def extend(self, x: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments for :func:`moekern.experts` that hold the extra slots too.

        Args:
            x: ``[T, H]``.
            topk_weights: ``[T, K]``, the weights passed to :func:`round_tokens`.

        Returns:
            ``x`` ``[T + E * P, H]``, ids and weights ``[T + E * P, K]``.

        Raises:
            TypeError, ValueError: An argument is not a floating tensor, or not of this shape.
        """
        tokens, top_k = self.topk_ids.shape
        for name, value, shape in (("x", x, (tokens, "hidden")), ("topk_weights", topk_weights, (tokens, top_k))):
            checks.is_tensor(name, value)
            checks.has_dtype(name, value, checks.FLOATING)
            checks.has_shape(name, value, shape, "the tokens that were rounded")
        if self.extra_tokens.numel() == 0:
            return x, self.topk_ids, topk_weights
        used = self.extra_tokens >= 0
        rows = take_rows(x, self.extra_tokens.clamp(min=0).reshape(-1))
        experts = torch.arange(used.shape[0], device=x.device).unsqueeze(1)
        others = (0, top_k - 1)  # the further slots of such a row
        ids = torch.nn.functional.pad(torch.where(used, experts, -1).reshape(-1, 1), others, value=-1)
        weights = torch.nn.functional.pad(self.extra_weights.reshape(-1, 1), others)
        return (
            torch.cat((x, rows)),
            torch.cat((self.topk_ids, ids)),
            torch.cat((topk_weights, weights.to(topk_weights.dtype))),
        )

    def fold(self, y: Tensor) -> Tensor:
        """Add the extra rows of the output to their tokens' rows.

        Args:
            y: ``[T + E * P, H]``, the output for the arguments from :meth:`extend`.

        Returns:
            ``[T, H]``.

        Raises:
            TypeError, ValueError: ``y`` is not a floating tensor, or not of this shape.
        """
        checks.is_tensor("y", y)
        checks.has_dtype("y", y, checks.FLOATING)
        tokens = self.topk_ids.shape[0]
        rows = tokens + self.extra_tokens.numel()
        checks.has_shape("y", y, (rows, "hidden"), "the tokens and their extra rows")
        if self.extra_tokens.numel() == 0:
            return y
        index = self.extra_tokens.clamp(min=0).reshape(-1)
        return (y[:tokens] + add_rows(y[tokens:], index, tokens)).to(y.dtype)


def round_tokens(
    scores: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    multiple: int,
    *,
    mode: str = "nearest",
    capacity: int | None = None,
    by: str = "score",
) -> Rounded:
    """Round the number of tokens of every expert to a multiple.

    ``rounded = mk.round_tokens(…)``, then ``y = rounded.fold(mk.experts(*rounded.extend(x, topk_weights), w_gate_up,
    w_down))``. Shapes do not depend on the routing, and nothing waits for a device.

    Args:
        scores: ``[T, E]`` floating: the weight of every expert for every token, such as the softmax of the router's
            logits. Differentiable at the added slots.
        topk_ids: ``[T, K]`` integer; sentinels stay sentinels.
        topk_weights: ``[T, K]`` floating, which decide whose slots are dropped.
        multiple: The multiple, such as 128, the rows of a tile of a grouped GEMM.
        mode: ``"nearest"`` (the lower one of two equally near), ``"up"`` (but down where too few tokens are left), or
            ``"down"``.
        capacity: The most tokens per expert, itself rounded down; None for no limit.
        by: ``"score"``: slots of least weight are dropped first; ``"position"``: the last ones.

    Returns:
        A :class:`Rounded`, in which the number of each expert's slots, with extra ones, is a multiple of ``multiple``.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, shape or range.
    """
    checks.topk_ids("topk_ids", topk_ids)
    checks.is_int("multiple", multiple, 1)
    checks.one_of("mode", mode, MODES)
    check_capacity(capacity, multiple, by)
    for name, value in (("scores", scores), ("topk_weights", topk_weights)):
        checks.is_tensor(name, value)
        checks.has_dtype(name, value, checks.FLOATING)
        checks.same_device(name, value, "topk_ids", topk_ids)
    checks.has_shape("scores", scores, (topk_ids.shape[0], "experts"), "one row per token, as topk_ids")
    checks.has_shape("topk_weights", topk_weights, tuple(topk_ids.shape), "as topk_ids")
    return rounded(plan(topk_ids, scores.shape[1]), scores, topk_ids, topk_weights, multiple, mode, capacity, by)


def rounded(
    chosen: Plan,
    scores: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    multiple: int,
    mode: str,
    limit: int | Tensor | None,
    by: str,
    mask: Tensor | None = None,
) -> Rounded:
    """:func:`round_tokens` without checks, for ids whose plan is known. No expert gets a masked token."""
    tokens, num_experts = scores.shape
    ids = topk_ids.to(torch.int64)
    real = (ids >= 0) & (ids < num_experts)
    # One column more takes the sentinels.
    taken = torch.zeros(tokens, num_experts + 1, dtype=torch.bool, device=ids.device)
    taken = taken.scatter(1, torch.where(real, ids, num_experts), True)[:, :num_experts]
    if mask is not None:
        taken = taken | ~mask.unsqueeze(1)

    counts = chosen.counts
    down = counts // multiple * multiple
    rest = counts - down
    goes_up = {"down": rest < 0, "nearest": 2 * rest > multiple, "up": rest > 0}[mode]
    goes_up &= multiple - rest <= tokens - taken.sum(0)
    target = torch.where(goes_up, down + multiple, down)
    if limit is not None:
        target = target.clamp(max=limit // multiple * multiple)
    kept = keep_best(chosen, ids, topk_weights, target, by)

    most = {"down": 0, "nearest": (multiple - 1) // 2, "up": multiple - 1}[mode]
    by_expert = scores.mT
    ranking = router.above_nothing(by_expert.detach()).masked_fill(taken.mT, float("-inf")).contiguous()
    extra = router.choose(ranking, min(most, tokens))
    places = torch.arange(extra.shape[1], device=ids.device)
    used = places < (target - counts).unsqueeze(1)
    weights = torch.where(used, by_expert.gather(1, extra), 0)
    return Rounded(kept, torch.where(used, extra, -1), weights)
