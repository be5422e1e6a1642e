"""Moving rows between token order and expert order: parameters and launch of permute.cu and combine_backward.cu.

The sum over a token's rows is combine.py's `combine`. Rows may have any length, and begin anywhere.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.kernels.tensors import ELEMENT, vector_of
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.device import multiprocessors
from moekern.backends.cuda.launch.kernel import launch

VECTORS = (16, 8, 4, 2)  # bytes of one access
MOST_BLOCKS = (1 << 31) - 1
MOST_SHARE = 32  # slots of a token that a warp of combine_backward.cu takes at most: one per lane
LEAST_WARPS = 64  # per SM; where there would be fewer, several warps share the slots of a token


@cache
def permute_variant(vector: int) -> KernelSource:
    """The permute."""
    return KernelSource.of("permute.cu", VECTOR=vector)


@cache
def combine_backward_variant(dtype: torch.dtype, vector: int) -> KernelSource:
    """The gradients of combine."""
    return KernelSource.of("combine_backward.cu", ELEMENT=ELEMENT[dtype], VECTOR=vector)


def _blocks(source: KernelSource, units: int) -> int:
    """As many as have a warp for every unit of work; beyond the largest grid a warp takes several."""
    return min(-(-units // constants(source)["WARPS"]), MOST_BLOCKS)


def permute(x: Tensor, inverse: Tensor, offsets: Tensor, out: Tensor, top_k: int) -> None:
    """``out[inverse[t, k]] = x[t]``, sentinels zero; neither is empty."""
    device, (tokens, hidden) = x.get_device(), x.shape
    row_bytes = hidden * x.dtype.itemsize
    vector = vector_of(row_bytes, x, out)
    source = permute_variant(vector)
    params = {
        "x": x, "inverse": inverse, "offsets": offsets, "rows": out, "vectors": row_bytes // vector, "tokens": tokens,
        "top_k": top_k, "experts": offsets.shape[0] - 1,
    }  # fmt: skip
    units = tokens * -(-row_bytes // constants(source)["SPAN"])
    launch(source, "permute", device, params, blocks=_blocks(source, units))


def share_of(tokens: int, top_k: int, multiprocessors: int) -> int:
    """Slots of a token per warp: all, so that dout is read once, where that leaves warps enough for the GPU."""
    share = min(top_k, MOST_SHARE)
    while share > 1 and tokens * -(-top_k // share) < LEAST_WARPS * multiprocessors:
        share = -(-share // 2)
    return share


def combine_backward(
    dout: Tensor,
    rows: Tensor,
    scores: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    drows: Tensor | None,
    dscores: Tensor | None,
    top_k: int,
    share: int | None = None,
) -> None:
    """Fill the gradients of the rows ``[S, H]`` and of the scores, float32 ``[T, K]``; None where not wanted."""
    device, (tokens, hidden) = dout.get_device(), dout.shape
    row_bytes = hidden * dout.dtype.itemsize
    vector = vector_of(row_bytes, *(t for t in (dout, rows, drows) if t is not None))
    share = share or share_of(tokens, top_k, multiprocessors(device))
    params = {
        "dout": dout, "rows": rows, "scores": scores, "inverse": inverse, "offsets": offsets, "drows": drows,
        "dscores": dscores, "tokens": tokens, "hidden": hidden, "top_k": top_k,
        "experts": offsets.shape[0] - 1, "share": share,
    }  # fmt: skip
    units, source = tokens * -(-top_k // share), combine_backward_variant(dout.dtype, vector)
    launch(source, "combine_backward", device, params, blocks=_blocks(source, units))
