"""The Hopper kernels as Python functions: tensor maps, parameters and launch of each.

Addresses in this file are those of cuda/README.md; sizes in bytes are written as 2 * elements, since all kernels work
on 16-bit elements. A kernel is compiled and loaded when it is first used on a device.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.codes import ID_TYPE
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import MOST_EXPERTS, Configuration
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.device import multiprocessors
from moekern.backends.cuda.launch.kernel import launch
from moekern.backends.cuda.launch.program import Map

ELEMENT = {torch.bfloat16: "Bf16", torch.float16: "F16", torch.float32: "F32"}  # the last where only rows are moved
MAP_ELEMENT = {torch.bfloat16: 9, torch.float16: 6}  # CU_TENSOR_MAP_DATA_TYPE_*
HOPPER, PLAN = KernelSource("hopper.cuh"), KernelSource("plan.cu")
MOST_ROWS = (1 << 31) - 1
TILE_ROWS = 256  # of the lower tiles: plan.cu
TILE_FEATURES = 256  # of a cluster in every GEMM
BLOCK_ROWS, TALL_BLOCK_ROWS = 136, 144  # of a kernel whose blocks split the rows of a tile of up to 272, or 288
COUNTERS = 8
COMBINE_TOP_K = (1, 2, 4, 8)


def up_variant(
    dtype: torch.dtype, activation: str, transposed: bool, interleaved: bool, bias: bool, save: bool, few_rows: bool,
    one_tile: bool,
) -> KernelSource:  # fmt: skip
    """The up projection's variant.

    `few_rows` is the form with the consumers' epilogue, for gate and up halves; `one_tile` has tiles of 288 rows in the
    other form too.
    """
    act = ACTIVATIONS[activation]
    halves = act.gated and not interleaved
    few_form = halves and few_rows
    rows = TALL_BLOCK_ROWS if few_form or one_tile else BLOCK_ROWS
    return KernelSource.of(
        "up_few.cu" if few_form else "up.cu", ACTIVATION=act.code, BIAS=bias, BLOCK_TOKENS=rows, ELEMENT=ELEMENT[dtype],
        INTERLEAVED=interleaved and act.gated, SAVE=save, TRANSPOSED=transposed,
    )  # fmt: skip


def grouped_mm_variant(dtype: torch.dtype, bias: bool, transposed: bool, stages: int, store_rows: int) -> KernelSource:
    """The grouped GEMM over contiguous rows."""
    return KernelSource.of(
        "grouped_mm.cu", BIAS=bias, ELEMENT=ELEMENT[dtype], RING_STAGES=stages, STORE_ROWS=store_rows,
        TRANSPOSED=transposed,
    )  # fmt: skip


def grouped_few_variant(dtype: torch.dtype, bias: bool, transposed: bool) -> KernelSource:
    """The grouped GEMM in tiles of up to 288 rows."""
    return KernelSource.of("grouped_few.cu", BIAS=bias, ELEMENT=ELEMENT[dtype], TRANSPOSED=transposed)


@cache
def combine_variant(dtype: torch.dtype, top_k: int, vector: int = 16) -> KernelSource:
    """The combine; `vector` is what :func:`vector_of` says of the rows."""
    built_for = top_k if top_k in COMBINE_TOP_K else 0
    return KernelSource.of("combine.cu", ELEMENT=ELEMENT[dtype], TOP_K=built_for, VECTOR=vector)


def vector_of(row_bytes: int, *matrices: Tensor) -> int:
    """Bytes of the largest vector, up to 16, that every row of these matrices is made of."""
    bits = row_bytes | 16
    for matrix in matrices:
        bits |= matrix.data_ptr()
    return bits & -bits


def ragged_store() -> int:
    """Rows by which the maps of ragged stores are shifted."""
    return constants(HOPPER)["RAGGED_STORE"]


def _ragged(base: int, row_bytes: int) -> int:
    """The base address of a store map, shifted back by :func:`ragged_store` rows.

    Modulo 2^64: of a tensor in the address space's first rows it is out of range, which the launch refuses by name.
    """
    return (base - ragged_store() * row_bytes) % (1 << 64)


# ------------------------------------------------------------------------------------------------------------ planner

ONE_BLOCK_SLOTS = 4096  # up to here one launch of one block
MOST_CHUNKS = 128


def _plan_chunks(slots: int) -> tuple[int, int]:
    if slots <= ONE_BLOCK_SLOTS:
        return 1, slots
    size = max(2048, -(-slots // MOST_CHUNKS))
    size = -(-size // 1024) * 1024
    return -(-slots // size), size


def plan_counts(slots: int, experts: int) -> int:
    """int32 words the planner needs to work in."""
    chunks, _ = _plan_chunks(slots)
    return chunks * (experts + 1) if chunks > 1 else 0


def plan(topk_ids: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, counts: Tensor) -> None:
    """Fill a plan, see :func:`moekern.backends.reference.plan`; `counts` has :func:`plan_counts` words."""
    device, slots, experts = topk_ids.get_device(), topk_ids.numel(), offsets.shape[0] - 1
    buckets = experts + 1
    chunks, size = _plan_chunks(slots)
    warps = constants(PLAN)["WARPS"]

    def scratch(buckets: int) -> int:
        return 4 * (2 * buckets + warps + warps * buckets)

    params = {
        "ids": topk_ids, "counts": counts, "order": order, "inverse": inverse, "offsets": offsets, "slots": slots,
        "experts": experts, "chunks": chunks, "chunk_slots": size, "id_type": ID_TYPE[topk_ids.dtype],
    }  # fmt: skip
    if chunks > 1:
        launch(PLAN, "plan_count", device, params, blocks=chunks, shared=4 * buckets)
    launch(
        PLAN, "plan_scatter", device, params, blocks=chunks, shared=scratch(buckets),
        most_shared=scratch(MOST_EXPERTS + 1),
    )  # fmt: skip


class Tables:
    """The tile tables of a verb, its experts by rows, and its ticket counters, all in one small piece of memory.

    `table` is of tiles of up to 256 rows, `tall` of up to 272, `tallest` of up to 288.
    """

    @staticmethod
    def size(rows: int, experts: int) -> int:
        """Bytes it needs."""
        return 3 * 16 * Tables._entries(rows, experts) + 4 * experts + 4 * COUNTERS

    @staticmethod
    def _entries(rows: int, experts: int) -> int:
        return 1 + rows // TILE_ROWS + min(experts, rows)

    def __init__(self, offsets: Tensor, rows: int, memory: Tensor | None = None, ordered: bool = True):
        """Launch the kernel that fills it from the plan's offsets; the experts' order is for the weight gradients."""
        device, experts = offsets.get_device(), offsets.shape[0] - 1
        if memory is None:
            memory = torch.empty(self.size(rows, experts), dtype=torch.uint8, device=offsets.device)
        self.memory = memory
        self.table = memory.data_ptr()
        self.tall = self.table + 16 * self._entries(rows, experts)
        self.tallest = self.tall + 16 * self._entries(rows, experts)
        self.expert_order = self.tallest + 16 * self._entries(rows, experts)
        self._next_counter = self.expert_order + 4 * experts
        params = {
            "offsets": offsets, "table": (self.table, self.tall, self.tallest), "expert_order": self.expert_order,
            "counters": self._next_counter, "experts": experts, "counter_count": COUNTERS,
        }  # fmt: skip
        launch(PLAN, "tiles", device, params, blocks=4 if ordered else 3)

    def for_blocks_of(self, rows: int) -> int:
        """The address of the table for a kernel whose blocks take so many rows, half of a tile."""
        return {BLOCK_ROWS: self.tall, TALL_BLOCK_ROWS: self.tallest}[rows]

    def counter(self) -> int:
        """The address of a ticket counter that no other kernel of the verb uses."""
        self._next_counter += 4
        return self._next_counter - 4


# -------------------------------------------------------------------------------------------------------------- GEMMs


def _up_weights(w: Tensor, hidden: int, inter: int, halves: bool, transposed: bool) -> Map:
    element, base, experts = MAP_ELEMENT[w.dtype], w.data_ptr(), w.shape[0]
    if halves and transposed:
        strides = (4 * inter, 2 * inter, 4 * inter * hidden)
        return element, base, (inter, hidden, 2, experts), strides, (64, 64, 2, 1)
    if halves:
        strides = (2 * hidden, 2 * hidden * inter, 4 * hidden * inter)
        return element, base, (hidden, inter, 2, experts), strides, (64, 64, 2, 1)
    return matrices(w, 64 if transposed else 128)


def _ragged_rows(rows: Tensor, box_rows: int) -> Map:
    """The store map of a matrix of rows sorted by expert, clipped at an expert's last row (cuda/README.md)."""
    columns = rows.shape[1]
    base, strides = _ragged(rows.data_ptr(), 2 * columns), (2 * columns, 2 * columns)
    return MAP_ELEMENT[rows.dtype], base, (columns, ragged_store(), MOST_ROWS), strides, (64, box_rows, 1)


def _pre_activation(pre: Tensor, inter: int, halves: bool, rows: int) -> Map:
    element, columns = MAP_ELEMENT[pre.dtype], pre.shape[1]
    if not halves:
        return _ragged_rows(pre, rows)
    base, strides = _ragged(pre.data_ptr(), 2 * columns), (2 * inter, 4 * inter, 4 * inter)
    return element, base, (inter, 2, ragged_store(), MOST_ROWS), strides, (64, 1, rows, 1)


def up(
    x: Tensor,
    order: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    activated: Tensor,
    pre: Tensor | None,
    tables: Tables,
    top_k: int,
    activation: str,
    transposed: bool,
    interleaved: bool,
    few_rows: bool,
    one_tile: bool,
) -> None:
    """Gather, up projection and activation of every row: fills `activated` ``[S, I]`` and `pre` ``[S, 2I]``.

    `few_rows` and `one_tile` choose the form: see `up_variant`.
    """
    device, hidden, inter = x.get_device(), x.shape[1], activated.shape[1]
    act = ACTIVATIONS[activation]
    interleaved = interleaved and act.gated
    halves = act.gated and not interleaved
    source = up_variant(
        x.dtype, activation, transposed, interleaved, bias is not None, pre is not None, few_rows, one_tile
    )  # fmt: skip
    stated = constants(source)
    params = {
        "table": tables.for_blocks_of(stated["TOKENS"]), "counter": tables.counter(), "x": x, "order": order,
        "activated": activated, "bias": bias, "columns": -(-inter // stated["FEATURES"]), "hidden": hidden,
        "inter": inter, "top_k": top_k, "pre": pre,
    }  # fmt: skip
    maps = {"weights": _up_weights(weights, hidden, inter, halves, transposed)}
    if source.file == "up_few.cu":
        maps["activated"] = _ragged_rows(activated, stated["STORE_TOKENS"])
    elif pre is None:
        maps["pre"] = maps["weights"]  # not used
    else:
        maps["pre"] = _pre_activation(pre, inter, halves, stated["TOKENS"])
    launch(source, source.file.removesuffix(".cu"), device, params, maps=maps)


def matrices(weights: Tensor, box_rows: int) -> Map:
    """A matrix of each expert, in boxes of 64 columns."""
    experts, outer, inner = weights.shape
    strides = (2 * inner, 2 * inner * outer)
    return MAP_ELEMENT[weights.dtype], weights.data_ptr(), (inner, outer, experts), strides, (64, box_rows, 1)


def _rows(a: Tensor, box_rows: int) -> Map:
    """One matrix, in boxes of 64 columns."""
    rows, columns = a.shape
    return MAP_ELEMENT[a.dtype], a.data_ptr(), (columns, rows), (2 * columns,), (64, box_rows)


def grouped_mm(
    a: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tables: Tables,
    transposed: bool,
    stages: int,
    store_rows: int,
) -> None:
    """``out[r] = a[r] @ W_e^T + bias_e`` for the rows of every expert; `transposed` weights are ``[E, k, n]``."""
    device, inner, features = a.get_device(), a.shape[1], out.shape[1]
    source = grouped_mm_variant(a.dtype, bias is not None, transposed, stages, store_rows)
    stated = constants(source)
    params = {
        "table": tables.table, "counter": tables.counter(), "bias": bias, "columns": -(-features // TILE_FEATURES),
        "inner": inner, "features": features,
    }  # fmt: skip
    maps = {
        "weights": matrices(weights, 64 if transposed else 128),
        "rows": _rows(a, stated["BOX_ROWS"]),
        "few_rows": _rows(a, stated["TAIL_ROWS"]),
        "out": _ragged_rows(out, store_rows),
    }
    launch(source, "grouped_mm", device, params, maps=maps)


def grouped_few(a: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor, tables: Tables, transposed: bool) -> None:
    """:func:`grouped_mm` in tiles of up to 288 rows."""
    device, inner, features = a.get_device(), a.shape[1], out.shape[1]
    source = grouped_few_variant(a.dtype, bias is not None, transposed)
    stated = constants(source)
    params = {
        "table": tables.for_blocks_of(stated["ROWS"]), "counter": tables.counter(), "bias": bias, "out": out,
        "columns": -(-features // TILE_FEATURES), "inner": inner, "features": features,
    }  # fmt: skip
    maps = {
        "weights": matrices(weights, 64 if transposed else 128),
        "rows": _rows(a, stated["BOX_ROWS"]),
        "few_rows": _rows(a, stated["TAIL_ROWS"]),
    }
    launch(source, "grouped_few", device, params, maps=maps)


def grouped_product(
    a: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tables: Tables,
    transposed: bool,
    chosen: Configuration,
) -> None:
    """:func:`grouped_mm` or :func:`grouped_few`, in the form that the configuration says."""
    if chosen.one_tile:
        grouped_few(a, weights, bias, out, tables, transposed)
    else:
        grouped_mm(a, weights, bias, out, tables, transposed, chosen.stages, chosen.store_rows)


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
