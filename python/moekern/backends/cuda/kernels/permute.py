"""Moving rows between token order and expert order: parameters and launch of permute.cu and combine_backward.cu.

The sum over a token's rows is grouped.py's `combine`. Rows may have any length, and begin anywhere.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from moekern.backends.cuda.kernels.grouped import ELEMENT, Macros, function_of, multiprocessors, vector_of
from moekern.backends.cuda.launch.program import launch
from moekern.backends.pointers import address

VECTORS = (16, 8, 4, 2)  # bytes of one access
PERMUTE_LOADS = 2  # vectors of a lane, as in permute.cu
MOST_BLOCKS = (1 << 31) - 1
MOST_SHARE = 32  # slots of a token that a warp of combine_backward.cu takes at most: one per lane
# Fewer warps per SM than these, and a token's slots are shared by several warps.
WARPS = 64


def permute_variant(vector: int) -> Macros:
    """Macros of the permute."""
    return (("VECTOR", vector),)


def combine_backward_variant(dtype: torch.dtype, vector: int) -> Macros:
    """Macros of the gradients of combine."""
    return (("ELEMENT", ELEMENT[dtype]), ("VECTOR", vector))


def permute(x: Tensor, inverse: Tensor, offsets: Tensor, out: Tensor, top_k: int) -> None:
    """``out[inverse[t, k]] = x[t]``, sentinels zero; neither is empty."""
    device, (tokens, hidden) = x.get_device(), x.shape
    row_bytes = hidden * x.dtype.itemsize
    vector = vector_of(row_bytes, x, out)
    params = struct.pack(
        "<4Q4i", x.data_ptr(), inverse.data_ptr(), offsets.data_ptr(), out.data_ptr(), row_bytes // vector,
        tokens, top_k, offsets.shape[0] - 1,
    )  # fmt: skip
    units = tokens * -(-row_bytes // (32 * vector * PERMUTE_LOADS))
    function = function_of(device, "permute.cu", "permute", 0, permute_variant(vector))
    launch(function, device, min(-(-units // 8), MOST_BLOCKS), 256, 0, [], params)


def share_of(tokens: int, top_k: int, multiprocessors: int) -> int:
    """Slots of a token per warp: all, so that dout is read once, where that leaves warps enough for the GPU."""
    share = min(top_k, MOST_SHARE)
    while share > 1 and tokens * -(-top_k // share) < WARPS * multiprocessors:
        share = -(-share // 2)
    return share


def combine_backward(
    dout: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    drows: Tensor | None,
    dweights: Tensor | None,
    top_k: int,
    share: int | None = None,
) -> None:
    """Fill the gradients of the rows ``[S, H]`` and of the weights, float32 ``[T, K]``; None where not wanted."""
    device, (tokens, hidden) = dout.get_device(), dout.shape
    row_bytes = hidden * dout.dtype.itemsize
    vector = vector_of(row_bytes, *(t for t in (dout, rows, drows) if t is not None))
    share = share or share_of(tokens, top_k, multiprocessors(device))
    params = struct.pack(
        "<7Q5i4x", dout.data_ptr(), rows.data_ptr(), address(weights), inverse.data_ptr(), offsets.data_ptr(),
        address(drows), address(dweights), tokens, hidden, top_k, offsets.shape[0] - 1, share,
    )  # fmt: skip
    units = tokens * -(-top_k // share)
    macros = combine_backward_variant(dout.dtype, vector)
    function = function_of(device, "combine_backward.cu", "combine_backward", 0, macros)
    launch(function, device, min(-(-units // 8), MOST_BLOCKS), 256, 0, [], params)
