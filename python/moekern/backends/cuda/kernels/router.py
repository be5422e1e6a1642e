"""The router's part of a layer as launches: the logits of few tokens, the choice from logits, and the backward pass.

Kernels: cuda/logits.cu, cuda/route.cu, cuda/route_backward.cu.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.kernels.tensors import ELEMENT
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.kernel import launch

MOST_TOP_K = 64
PER_LANE = (1, 2, 4, 8, 16, 32)  # builds: the logits of up to 32 times as many experts


@dataclass(frozen=True)
class Formula:
    """How weights follow from the chosen logits."""

    code: int  # 0 softmax of the chosen, 1 softmax of all, 2 sigmoid, 3 root of softplus
    normalised: bool  # 2, 3: divided by their sum
    scale: float


def formula(name: str, norm_topk_prob: bool, scale: float) -> Formula:
    """For one of :data:`moekern.routing.router.FORMULAS`."""
    if name == "softmax_topk":
        return Formula(0 if norm_topk_prob else 1, False, scale)
    if name == "topk_softmax":
        return Formula(0, False, scale)
    if name == "sqrtsoftplus_topk":
        return Formula(3, norm_topk_prob, scale)
    return Formula(2, norm_topk_prob and name == "sigmoid_topk", scale)


@cache
def route_variant(experts: int) -> KernelSource:
    """The build for so many experts, at most 1024."""
    return KernelSource.of("route.cu", PER_LANE=next(n for n in PER_LANE if 32 * n >= experts))


def route(logits: Any, ids: Any, weights: Any, how: Formula) -> None:
    """Fill `ids` int32 and `weights` float32, both ``[T, K]``, from `logits` float32 ``[T, E]``."""
    device, (tokens, experts), top_k = logits.get_device(), logits.shape, ids.shape[1]
    source = route_variant(experts)
    params = {
        "logits": logits, "ids": ids, "weights": weights, "tokens": tokens, "experts": experts, "top_k": top_k,
        "formula": how.code, "normalised": how.normalised, "scale": how.scale,
    }  # fmt: skip
    launch(source, "route", device, params, blocks=-(-tokens // constants(source)["TOKENS"]))


LOGITS_TOKENS, LOGITS_EXPERTS = 16, 8  # of a block
MOST_LOGITS_WORK = 1 << 20  # features that its blocks go through: beyond, their reading of the same rows shows


def makes_logits(tokens: int, experts: int, hidden: int) -> bool:
    """Whether the kernel for few tokens serves: there it is called sooner than a library, and takes no longer."""
    blocks = -(-tokens // LOGITS_TOKENS) * -(-experts // LOGITS_EXPERTS)
    return tokens > 0 and hidden % 8 == 0 and blocks * hidden <= MOST_LOGITS_WORK


@cache
def logits_variant(dtype: torch.dtype) -> KernelSource:
    """The logits' kernel."""
    return KernelSource.of("logits.cu", ELEMENT=ELEMENT[dtype])


@cache
def route_backward_variant(dtype: torch.dtype) -> KernelSource:
    """The kernel of the logits' gradient."""
    return KernelSource.of("route_backward.cu", ELEMENT=ELEMENT[dtype])


def logits(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """Fill `out` float32 ``[T, E]`` with ``x @ weight.T + bias``, of 16-bit elements; `bias` may be None."""
    device, (tokens, hidden), experts = x.get_device(), x.shape, weight.shape[0]
    expert_blocks = -(-experts // LOGITS_EXPERTS)
    params = {
        "x": x, "weight": weight, "bias": bias, "out": out, "tokens": tokens, "hidden": hidden, "experts": experts,
        "expert_blocks": expert_blocks,
    }  # fmt: skip
    blocks = -(-tokens // LOGITS_TOKENS) * expert_blocks
    launch(logits_variant(x.dtype), "logits", device, params, blocks=blocks)


def route_backward(logits: Any, ids: Any, weights: Any, dweights: Any, elsewhere: Any, out: Any, how: Formula) -> None:
    """Fill `out` ``[T, E]``, 16 bits, with the logits' gradient: from `dweights`, and `elsewhere` added.

    Arguments but `ids` are float32; `dweights` ``[T, K]`` and `elsewhere` ``[T, E]`` may be None.
    """
    device, (tokens, experts), top_k = logits.get_device(), logits.shape, ids.shape[1]
    source = route_backward_variant(out.dtype)
    params = {
        "logits": logits, "ids": ids, "weights": weights, "dweights": dweights, "elsewhere": elsewhere, "out": out,
        "tokens": tokens, "experts": experts, "top_k": top_k, "formula": how.code, "normalised": how.normalised,
        "scale": how.scale,
    }  # fmt: skip
    in_block = constants(source)["TOKENS"]
    launch(source, "route_backward", device, params, blocks=-(-tokens // in_block), shared=4 * in_block * experts)
