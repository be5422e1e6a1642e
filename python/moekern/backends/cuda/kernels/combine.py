"""A token's rows, weighted and summed: parameters and launch of combine.cu and combine_beside.cu."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.kernels.tensors import ELEMENT, vector_of
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.device import multiprocessors
from moekern.backends.cuda.launch.kernel import launch

TOP_K = (1, 2, 4, 8)  # builds; combine.cu has one for any other K too


@cache
def combine_variant(dtype: torch.dtype, top_k: int, vector: int = 16) -> KernelSource:
    """The combine; `vector` is what :func:`vector_of` says of the rows."""
    built_for = top_k if top_k in TOP_K else 0
    return KernelSource.of("combine.cu", ELEMENT=ELEMENT[dtype], TOP_K=built_for, VECTOR=vector)


def combine_beside_variant(dtype: torch.dtype, top_k: int) -> KernelSource:
    """The combine that runs beside the weight gradient; `top_k` in TOP_K."""
    return KernelSource.of("combine_beside.cu", ELEMENT=ELEMENT[dtype], TOP_K=top_k)


def combine(rows: Tensor, scores: Tensor | None, inverse: Tensor, offsets: Tensor, out: Tensor, top_k: int) -> None:
    """``out[t] = sum over k of scores[t, k] * rows[inverse[t, k]]``, sentinels zero."""
    device, (tokens, hidden) = out.get_device(), out.shape
    params = {
        "rows": rows, "inverse": inverse, "offsets": offsets, "scores": scores, "out": out, "tokens": tokens,
        "hidden": hidden, "top_k": top_k, "experts": offsets.shape[0] - 1,
    }  # fmt: skip
    row_bytes = hidden * out.dtype.itemsize
    vector = vector_of(row_bytes, rows, out)
    units = tokens * -(-row_bytes // (32 * vector))
    blocks = min(4 * multiprocessors(device), -(-units // 8))
    launch(combine_variant(out.dtype, top_k, vector), "combine", device, params, blocks=blocks)


def fits_beside(hidden: int, top_k: int) -> bool:
    """Whether combine_beside.cu serves rows of so many features."""
    # Blocks that share a token: with more, too many would have none.
    return top_k in TOP_K and hidden <= 16 * _beside_features()


def _beside_features() -> int:
    return constants(KernelSource("combine_beside.cu"))["FEATURES"]


def combine_beside(rows: Tensor, inverse: Tensor, offsets: Tensor, out: Tensor, top_k: int) -> None:
    """``out[t] = sum over k of rows[inverse[t, k]]``, in the registers that ``wgrad`` launched with 160 leaves free."""
    device, (tokens, hidden) = out.get_device(), out.shape
    params = {
        "rows": rows, "inverse": inverse, "offsets": offsets, "out": out, "tokens": tokens, "hidden": hidden,
        "experts": offsets.shape[0] - 1, "span": -(-hidden // _beside_features()),
    }  # fmt: skip
    # The same split of an SM's memory as the GEMM's: blocks that ask for another one cannot share an SM with it.
    launch(combine_beside_variant(out.dtype, top_k), "combine_beside", device, params, carve_out=100)
