"""Routing: from a router's logits to the experts of each token and their weights.

The formulas are named after the order of their steps. Each model family of transformers is an alias of the formula
that its router class computes; the other options have the names of its configuration.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moekern.verbs import checks

FORMULAS = ("softmax_topk", "topk_softmax", "sigmoid_topk", "topk_sigmoid", "sqrtsoftplus_topk")

# Model (folder of transformers/models) -> the formula of its router.
METHODS: dict[str, str] = {
    **{formula: formula for formula in FORMULAS},
    "mixtral": "softmax_topk",
    "minimax": "softmax_topk",
    "qwen2_moe": "softmax_topk",
    "qwen3_moe": "softmax_topk",
    "olmoe": "softmax_topk",
    "jamba": "softmax_topk",
    "dbrx": "softmax_topk",
    "deepseek_v2": "softmax_topk",
    "gpt_oss": "topk_softmax",
    "granitemoe": "topk_softmax",
    "deepseek_v3": "sigmoid_topk",
    "glm4_moe": "sigmoid_topk",
    "deepseek_v4": "sqrtsoftplus_topk",
    "llama4": "topk_sigmoid",
}

_SMALL = 2048  # entries; with fewer, sorting is faster than the six passes of packing


def route(
    logits: Tensor,
    top_k: int,
    *,
    method: str = "softmax_topk",
    norm_topk_prob: bool = True,
    selection_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token.

    The arithmetic is float32 (float64 for float64 logits), under autocast too. Of equal scores the lowest index wins,
    on every device.

    Args:
        logits: ``[T, E]`` (any leading dimensions), floating.
        top_k: K, between 1 and E.
        method: ``"softmax_topk"``: softmax over all experts, then the K largest (Mixtral, Qwen, OLMoE, DeepSeek-V2).
            ``"topk_softmax"``: the K largest logits, softmax over these (gpt-oss, Granite).
            ``"sigmoid_topk"``: the K largest of every expert's own sigmoid (DeepSeek-V3, GLM-4).
            ``"sqrtsoftplus_topk"``: the same with the square root of the softplus (DeepSeek-V4).
            ``"topk_sigmoid"``: the sigmoid of the K largest logits (Llama 4, K = 1).
            A model's name, such as ``"deepseek_v3"``, stands for its formula.
        norm_topk_prob: Scale the K weights to sum to one (Mixtral and Qwen3 do, OLMoE does not). ``"topk_softmax"``
            always sums to one, ``"topk_sigmoid"`` is never scaled.
        selection_bias: ``[E]``, added to the scores for choosing only (DeepSeek-V3's ``e_score_correction_bias``);
            no gradient flows to it.
        n_group: Cut the experts into this many groups of neighbours; only experts of the best groups can be chosen. A
            group's score is its largest one after a softmax (DeepSeek-V2), else the sum of its two largest
            (DeepSeek-V3).
        topk_group: The number of groups that stay; all by default.
        routed_scaling_factor: Multiplies the weights at the end.

    Returns:
        Weights ``[T, K]`` in float32, differentiable in the logits, and ids ``[T, K]`` int64, best first.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range.
    """
    checks.is_tensor("logits", logits)
    checks.has_dtype("logits", logits, checks.FLOATING)
    if logits.ndim < 1:
        raise ValueError("logits: got a scalar, expected [..., experts]")
    num_experts = logits.shape[-1]
    check_options(top_k, num_experts, method, norm_topk_prob, n_group, topk_group, routed_scaling_factor)
    if selection_bias is not None:
        checks.is_tensor("selection_bias", selection_bias)
        checks.has_dtype("selection_bias", selection_bias, checks.FLOATING)
        checks.has_shape("selection_bias", selection_bias, (num_experts,), "one per expert")
        checks.same_device("selection_bias", selection_bias, "logits", logits)
    formula = METHODS[method]
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    grouped = n_group > 1 and topk_group is not None and topk_group < n_group

    # Every score function is increasing, so that without bias and groups the logits themselves decide: they do not
    # saturate, and the scores of the experts left out need not be computed.
    ranking = logits.detach()
    if selection_bias is not None or grouped:
        ranking = scores(ranking, formula)
    if selection_bias is not None:
        ranking = ranking + selection_bias.detach().to(ranking.dtype)
    if grouped:
        assert topk_group is not None
        ranking = _best_groups(ranking, n_group, topk_group, 1 if formula == "softmax_topk" else 2)
    ids = choose(ranking, top_k)
    return weights_of(logits, ids, method, norm_topk_prob, routed_scaling_factor), ids


def weights_of(logits: Tensor, ids: Tensor, method: str, norm_topk_prob: bool, routed_scaling_factor: float) -> Tensor:
    """The weights ``[T, K]`` of chosen experts, see :func:`route`, from logits in float32 or float64."""
    formula = METHODS[method]
    if formula == "topk_softmax" or (formula == "softmax_topk" and norm_topk_prob):
        weights = torch.softmax(logits.gather(-1, ids), dim=-1)
    elif formula == "softmax_topk":
        weights = scores(logits, formula).gather(-1, ids)
    else:
        weights = scores(logits.gather(-1, ids), formula)
        if norm_topk_prob and formula != "topk_sigmoid":
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights if routed_scaling_factor == 1 else weights * routed_scaling_factor


def check_options(
    top_k: int,
    num_experts: int,
    method: str,
    norm_topk_prob: bool,
    n_group: int,
    topk_group: int | None,
    routed_scaling_factor: float,
) -> None:
    """Raise TypeError or ValueError unless the options of :func:`route` fit together."""
    checks.is_int("top_k", top_k, 1, num_experts, f"there are {num_experts} experts")
    checks.one_of("method", method, tuple(METHODS))
    checks.is_bool("norm_topk_prob", norm_topk_prob)
    checks.is_int("n_group", n_group, 1)
    if num_experts % n_group != 0:
        raise ValueError(f"n_group: got {n_group}, expected a divisor of the {num_experts} experts")
    if topk_group is not None:
        checks.is_int("topk_group", topk_group, 1, n_group, f"n_group is {n_group}")
        if topk_group * (num_experts // n_group) < top_k:
            raise ValueError(
                f"topk_group: got {topk_group} groups of {num_experts // n_group} experts, "
                f"expected at least top_k, {top_k}, experts in them"
            )
    checks.is_number("routed_scaling_factor", routed_scaling_factor, above=0)


def scores(logits: Tensor, method: str) -> Tensor:
    """The score of every expert for every token, before the choice; logits and result ``[..., E]``."""
    formula = METHODS[method]
    if formula in ("softmax_topk", "topk_softmax"):
        return torch.softmax(logits, dim=-1)
    if formula == "sqrtsoftplus_topk":
        return torch.nn.functional.softplus(logits).sqrt()
    return torch.sigmoid(logits)


def weights_of_all(
    logits: Tensor, ids: Tensor, method: str, norm_topk_prob: bool, routed_scaling_factor: float
) -> Tensor:
    """The weight ``[T, E]`` of every expert, on the scale of the weights that :func:`route` returns."""
    formula = METHODS[method]
    if formula == "topk_softmax" or (formula == "softmax_topk" and norm_topk_prob):
        weights = torch.exp(logits - torch.logsumexp(logits.gather(-1, ids), dim=-1, keepdim=True))
    else:
        weights = scores(logits, formula)
        if norm_topk_prob and formula not in ("softmax_topk", "topk_sigmoid"):
            weights = weights / (weights.gather(-1, ids).sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor


def choose(ranking: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension, largest first; of equal values the lowest index first.

    NaN of either sign counts as larger than all numbers, so that a diverged router shows in the output.

    torch.topk does not say which of equal values it takes. A stable sort does; on a GPU it takes about as long
    (16384 x 128 on an H100: 142 us against 129). On a CPU it takes three to five times as long, so there value and
    index are packed into one int64, whose order has no ties; that takes one to two times as long
    (benches/suite/bench_route.py).
    """
    small = not torch.compiler.is_compiling() and ranking.numel() < _SMALL
    if ranking.device.type != "cpu" or ranking.dtype != torch.float32 or small:
        order = largest_first(ranking)
        return order[..., :k].contiguous()  # each user of a slice would copy it, and take its slower path
    bits = (_one_nan(ranking) + 0.0).view(torch.int32)  # adding zero makes one zero of the two
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards
    last = ranking.shape[-1] - 1
    from_the_end = torch.arange(last, -1, -1, device=ranking.device)
    packed = (ascending.to(torch.int64) << 31) | from_the_end
    return torch.topk(packed, k, dim=-1)[1]


def largest_first(values: Tensor) -> Tensor:
    """The order of the last dimension, NaN first, then the largest; of equal values the lowest index first."""
    # A CPU compares; the radix sort of a GPU uses the bits, by which a negative NaN is below minus infinity.
    if values.device.type != "cpu":
        values = _one_nan(values)
    return torch.sort(values, dim=-1, descending=True, stable=True)[1]


def _one_nan(values: Tensor) -> Tensor:
    """The values with the sign and payload of every NaN removed: on x86 inf - inf and 0 / 0 give negative ones."""
    return torch.nan_to_num(values, nan=math.nan, posinf=math.inf, neginf=-math.inf)


def above_nothing(values: Tensor) -> Tensor:
    """The values with minus infinity raised to the lowest finite number, so that it can stand for no candidate."""
    return values.clamp(min=torch.finfo(values.dtype).min)


def _best_groups(ranking: Tensor, n_group: int, topk_group: int, best: int) -> Tensor:
    """The ranking with minus infinity in all but the best groups, which are scored by the sum of their best members."""
    members = ranking.unflatten(-1, (n_group, -1))
    group_scores = torch.topk(members, min(best, members.shape[-1]), dim=-1)[0].sum(-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, choose(group_scores, topk_group), True)
    return above_nothing(members).masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
