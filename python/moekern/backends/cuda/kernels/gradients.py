"""The backward pass's own kernels as Python functions: tensor maps, parameters and launch of each.

The input gradient of a GEMM is grouped.py's `grouped_mm` with the other orientation of the
weights, and the sum over a token's rows is its `combine`.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.kernels.grouped import (
    BLOCK_ROWS,
    ELEMENT,
    MAP_ELEMENT,
    MOST_ROWS,
    RAGGED_LOAD,
    TALL_BLOCK_ROWS,
    Macros,
    Tables,
    function_of,
    multiprocessors,
)
from moekern.backends.cuda.launch.program import Map, launch
from moekern.backends.pointers import address

DH_SHARED = {136: 230912, 144: 232448}  # by rows of a block
WGRAD_SHARED = {3: 214528, 4: 230912}  # by stages
WGRAD_STORE_FEATURES = {3: 256, 4: 128}
DH_FEATURES = 256  # of a tile, and of one partial sum of dS
BESIDE_TOP_K = (1, 2, 4, 8)
BESIDE_FEATURES = 512  # of a block


def dh_variant(
    dtype: torch.dtype, activation: str, transposed: bool, interleaved: bool, one_tile: bool = False
) -> Macros:
    """Macros of the pre-activation's gradient."""
    act = ACTIVATIONS[activation]
    rows = TALL_BLOCK_ROWS if one_tile else BLOCK_ROWS
    return (
        ("ACTIVATION", act.code), ("BLOCK_ROWS", rows), ("ELEMENT", ELEMENT[dtype]),
        ("INTERLEAVED", int(interleaved and act.gated)), ("SHARED_BYTES", DH_SHARED[rows]),
        ("TRANSPOSED", int(transposed)),
    )  # fmt: skip


def wgrad_variant(dtype: torch.dtype, gather: bool, p_innermost: bool, launch_registers: int, stages: int) -> Macros:
    """Macros of the weight gradient."""
    return (
        ("ELEMENT", ELEMENT[dtype]), ("GATHER", int(gather)), ("LAUNCH_REGISTERS", launch_registers),
        ("P_INNERMOST", int(p_innermost)), ("RING_STAGES", stages), ("SHARED_BYTES", WGRAD_SHARED[stages]),
        ("STORE_FEATURES", WGRAD_STORE_FEATURES[stages]),
    )  # fmt: skip


def combine_beside_variant(dtype: torch.dtype, top_k: int) -> Macros:
    """Macros of the combine that runs beside the weight gradient; `top_k` in BESIDE_TOP_K."""
    return (("ELEMENT", ELEMENT[dtype]), ("TOP_K", top_k))


def _launch(file: str, name: str, like: Tensor, blocks: int, params: bytes) -> None:
    """Launch one of the small kernels, 256 threads a block."""
    device = like.get_device()
    function = function_of(device, file, name, 0, (("ELEMENT", ELEMENT[like.dtype]),))
    launch(function, device, blocks, 256, 0, [], params)


class Rows:
    """Token and router weight of every row."""

    def __init__(self, like: Tensor, order: Tensor, scores: Tensor | None, top_k: int, token: Tensor, score: Tensor):
        """Launch the kernel that fills `token` int32 and `score` float32, both ``[S]``; `like` has the dtype."""
        slots = order.shape[0]
        self.token, self.score = token, score
        addresses = order.data_ptr(), address(scores), token.data_ptr(), score.data_ptr()
        _launch("rows.cu", "row_values", like, -(-slots // 256), struct.pack("<4Q2i", *addresses, slots, top_k))


def dh(
    dout: Tensor,
    w_down: Tensor,
    pre: Tensor,
    rows: Rows,
    tables: Tables,
    activation: str,
    transposed: bool,
    interleaved: bool,
    grad_pre: Tensor,
    scaled: Tensor | None,
    partials: Tensor | None,
    one_tile: bool = False,
) -> None:
    """Fill the gradient of `pre`, A' ``[S, I]`` and the partial sums of dS, ``[S, ceil(I / 256)]``."""
    device, hidden, experts = dout.get_device(), dout.shape[1], w_down.shape[0]
    inter = w_down.shape[1 if transposed else 2]
    macros = dh_variant(dout.dtype, activation, transposed, interleaved, one_tile)
    rows_of_block, shared = (int(dict(macros)[name]) for name in ("BLOCK_ROWS", "SHARED_BYTES"))
    inner, outer = (hidden, inter) if transposed else (inter, hidden)
    weights: Map = (
        MAP_ELEMENT[dout.dtype], w_down.data_ptr(), (inner, outer, experts), (2 * inner, 2 * inner * outer), (64, 64, 1)
    )  # fmt: skip
    params = struct.pack(
        "<9Q3iI", tables.for_blocks_of(rows_of_block), tables.counter(), dout.data_ptr(), rows.token.data_ptr(),
        rows.score.data_ptr(), pre.data_ptr(), grad_pre.data_ptr(), address(scaled), address(partials),
        hidden, inter, -(-inter // DH_FEATURES), hidden // 8,
    )  # fmt: skip
    function = function_of(device, "dh.cu", "dh", shared, macros)
    launch(function, device, multiprocessors(device), 512, shared, [weights], params)


def _ragged_rows(tensor: Tensor) -> Map:
    """Boxes of 64 rows and 64 features that end with an expert's rows (hopper.cuh)."""
    columns, pitch = tensor.shape[1], 2 * tensor.shape[1]
    dims, strides = (columns, RAGGED_LOAD, MOST_ROWS, MOST_ROWS), (pitch, (1 << 35) - pitch, pitch)
    return MAP_ELEMENT[tensor.dtype], tensor.data_ptr(), dims, strides, (64, 64, 1, 1)


def wgrad(
    p: Tensor,
    q: Tensor,
    row_token: Tensor | None,
    offsets: Tensor,
    tables: Tables,
    out: Tensor,
    p_innermost: bool,
    launch_registers: int = 168,
    stages: int = 3,
) -> None:
    """``out[e] = sum over the rows of e of p_r^T q_r``: ``[E, p, q]``, or ``[E, q, p]`` with `p_innermost`.

    `p` has the rows themselves, or with `row_token` the tokens they are gathered from.
    """
    device, experts = q.get_device(), out.shape[0]
    gather = row_token is not None
    macros = wgrad_variant(q.dtype, gather, p_innermost, launch_registers, stages)
    q_map = _ragged_rows(q)
    p_map = q_map if gather else _ragged_rows(p)
    lines = WGRAD_STORE_FEATURES[stages] if p_innermost else 64
    result: Map = (
        MAP_ELEMENT[q.dtype], out.data_ptr(), (out.shape[2], out.shape[1], experts),
        (2 * out.shape[2], 2 * out.shape[2] * out.shape[1]), (64, lines, 1),
    )  # fmt: skip
    params = struct.pack(
        "<5Q3iI", offsets.data_ptr(), tables.expert_order, tables.counter(), p.data_ptr(), address(row_token),
        experts, p.shape[1], q.shape[1], 2 * p.shape[1],
    )  # fmt: skip
    shared = WGRAD_SHARED[stages]
    function = function_of(device, "wgrad.cu", "wgrad", shared, macros)
    maps = [p_map, q_map, result]
    launch(function, device, multiprocessors(device), 384, shared, maps, params)


def score_gradient(
    partials: Tensor, inverse: Tensor, offsets: Tensor, dout: Tensor, bias: Tensor | None, top_k: int, out: Tensor
) -> None:
    """dS of every slot from the partial sums of its row, and ``<dO_t, bias_e>``; zero for sentinels."""
    slots, experts = out.numel(), offsets.shape[0] - 1
    params = struct.pack(
        "<6Q6i", partials.data_ptr(), inverse.data_ptr(), offsets.data_ptr(), dout.data_ptr(), address(bias),
        out.data_ptr(), slots, top_k, experts, partials.shape[1], dout.shape[1], 0,
    )  # fmt: skip
    slots_a_block = 256 if bias is None else 8
    _launch("rows.cu", "score_gradient", dout, -(-slots // slots_a_block), params)


def bias_gradient(
    source: Tensor, row_token: Tensor | None, row_score: Tensor | None, offsets: Tensor, out: Tensor
) -> None:
    """``out[e] = sum over the rows of e of score_r * source_r``, ``[E, N]``; `source` by token with `row_token`."""
    experts, features = out.shape
    columns = -(-features // 64)
    params = struct.pack(
        "<5Q2i", source.data_ptr(), address(row_token), address(row_score), offsets.data_ptr(), out.data_ptr(),
        features, columns,
    )  # fmt: skip
    _launch("rows.cu", "bias_gradient", source, experts * columns, params)


def combine_beside(rows: Tensor, inverse: Tensor, offsets: Tensor, out: Tensor, top_k: int) -> None:
    """``out[t] = sum over k of rows[inverse[t, k]]``, in the registers that :func:`wgrad` with 160 leaves free."""
    device, (tokens, hidden) = out.get_device(), out.shape
    macros = combine_beside_variant(out.dtype, top_k)
    # The same split of an SM's memory as the GEMM's: blocks that ask for another one cannot share an SM with it.
    function = function_of(device, "combine_beside.cu", "combine_beside", 0, macros, 100)
    params = struct.pack(
        "<4Q4i", rows.data_ptr(), inverse.data_ptr(), offsets.data_ptr(), out.data_ptr(),
        tokens, hidden, offsets.shape[0] - 1, -(-hidden // BESIDE_FEATURES),
    )  # fmt: skip
    launch(function, device, multiprocessors(device), 128, 0, [], params)
