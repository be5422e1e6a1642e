"""The router's choice as a launch: which experts, with what weights, from a token's logits (cuda/route.cu)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from moekern.backends.cuda.kernels import Macros, _function
from moekern.backends.cuda.program import launch

MOST_TOP_K = 64
TOKENS = 8  # of a block
PER_LANE = (1, 2, 4, 8, 16, 32)  # builds: the logits of up to 32 times as many experts


@dataclass(frozen=True)
class Formula:
    """How weights follow from the chosen logits."""

    code: int  # 0 softmax of the chosen, 1 softmax of all, 2 sigmoid, 3 root of softplus
    normalised: bool  # 2, 3: divided by their sum
    scale: float


def formula(name: str, norm_topk_prob: bool, scale: float) -> Formula:
    """For one of :data:`moekern.router.FORMULAS`."""
    if name == "softmax_topk":
        return Formula(0 if norm_topk_prob else 1, False, scale)
    if name == "topk_softmax":
        return Formula(0, False, scale)
    if name == "sqrtsoftplus_topk":
        return Formula(3, norm_topk_prob, scale)
    return Formula(2, norm_topk_prob and name == "sigmoid_topk", scale)


def route_variant(experts: int) -> Macros:
    """Macros of the build for so many experts, at most 1024."""
    return (("PER_LANE", next(n for n in PER_LANE if 32 * n >= experts)),)


def route(logits: Any, ids: Any, weights: Any, how: Formula) -> None:
    """Fill `ids` int32 and `weights` float32, both ``[T, K]``, from `logits` float32 ``[T, E]``."""
    device, (tokens, experts), top_k = logits.get_device(), logits.shape, ids.shape[1]
    params = struct.pack(
        "<3Q5if", logits.data_ptr(), ids.data_ptr(), weights.data_ptr(), tokens, experts, top_k,
        how.code, how.normalised, how.scale,
    )  # fmt: skip
    function = _function(device, "route.cu", "route", 0, route_variant(experts))
    launch(function, device, -(-tokens // TOKENS), 32 * TOKENS, 0, [], params)
