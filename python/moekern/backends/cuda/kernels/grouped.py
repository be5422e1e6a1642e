"""The Hopper kernels as Python functions: tensor maps, parameters and launch of each.

Addresses in this file are those of cuda/README.md; sizes in bytes are written as 2 * elements, since all kernels work
on 16-bit elements. A kernel is compiled and loaded when it is first used on a device.
"""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.build import loader, sources
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.launch.program import Map, collected, launch
from moekern.backends.pointers import address

ELEMENT = {torch.bfloat16: "Bf16", torch.float16: "F16", torch.float32: "F32"}  # the last where only rows are moved
MAP_ELEMENT = {torch.bfloat16: 9, torch.float16: 6}  # CU_TENSOR_MAP_DATA_TYPE_*
ID_TYPE = {torch.uint8: 0, torch.uint16: 1, torch.int32: 2, torch.int64: 3}
RAGGED_STORE, RAGGED_LOAD = 512, 1 << 30  # rows: hopper.cuh
MOST_ROWS = (1 << 31) - 1
UP_SHARED, UP_FEW_SHARED = {136: 221696, 144: 228864}, 230912  # by rows of a block
GROUPED_SHARED, GROUPED_FEW_SHARED = {3: 214528, 4: 230912}, 230912
TILE_ROWS = 256  # of the lower tiles: plan.cu
BLOCK_ROWS, TALL_BLOCK_ROWS = 136, 144  # of a kernel whose blocks split the rows of a tile of up to 272, or 288
UP_FEW_STORE_TOKENS = 96  # of one store of a consumer warpgroup
COUNTERS = 8
COMBINE_TOP_K = (1, 2, 4, 8)


@cache
def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a device, rounded down to whole clusters of two."""
    return torch.cuda.get_device_properties(device).multi_processor_count // 2 * 2


Macros = tuple[tuple[str, int | str], ...]


def up_variant(
    dtype: torch.dtype, activation: str, transposed: bool, interleaved: bool, bias: bool, save: bool, few_rows: bool,
    one_tile: bool,
) -> tuple[str, Macros]:  # fmt: skip
    """File and macros of the up projection.

    `few_rows` is the form with the consumers' epilogue, for gate and up halves; `one_tile` has tiles of 288 rows in the
    other form too.
    """
    act = ACTIVATIONS[activation]
    halves = act.gated and not interleaved
    few_form = halves and few_rows
    rows = TALL_BLOCK_ROWS if few_form or one_tile else BLOCK_ROWS
    macros = (
        ("ACTIVATION", act.code), ("BIAS", int(bias)), ("BLOCK_TOKENS", rows), ("ELEMENT", ELEMENT[dtype]),
        ("INTERLEAVED", int(interleaved and act.gated)), ("SAVE", int(save)),
        ("SHARED_BYTES", UP_FEW_SHARED if few_form else UP_SHARED[rows]), ("TRANSPOSED", int(transposed)),
    )  # fmt: skip
    return "up_few.cu" if few_form else "up.cu", macros


def grouped_mm_variant(dtype: torch.dtype, bias: bool, transposed: bool, stages: int, store_rows: int) -> Macros:
    """Macros of the grouped GEMM over contiguous rows."""
    return (
        ("BIAS", int(bias)), ("ELEMENT", ELEMENT[dtype]), ("RING_STAGES", stages),
        ("SHARED_BYTES", GROUPED_SHARED[stages]), ("STORE_ROWS", store_rows), ("TRANSPOSED", int(transposed)),
    )  # fmt: skip


def grouped_few_variant(dtype: torch.dtype, bias: bool, transposed: bool) -> Macros:
    """Macros of the grouped GEMM in tiles of up to 288 rows."""
    return (
        ("BIAS", int(bias)), ("ELEMENT", ELEMENT[dtype]), ("SHARED_BYTES", GROUPED_FEW_SHARED),
        ("TRANSPOSED", int(transposed)),
    )  # fmt: skip


def combine_variant(dtype: torch.dtype, top_k: int, vector: int = 16) -> Macros:
    """Macros of the combine; `vector` is what :func:`vector_of` says of the rows."""
    return (("ELEMENT", ELEMENT[dtype]), ("TOP_K", top_k if top_k in COMBINE_TOP_K else 0), ("VECTOR", vector))


def vector_of(row_bytes: int, *matrices: Tensor) -> int:
    """Bytes of the largest vector, up to 16, that every row of these matrices is made of."""
    bits = row_bytes | 16
    for matrix in matrices:
        bits |= matrix.data_ptr()
    return bits & -bits


def function_of(device: int, file: str, name: str, shared: int, macros: Macros, carve_out: int | None = None) -> int:
    """The handle of a kernel; while a program only collects what it needs, a note of it and 0."""
    return 0 if collected(file, macros) else _loaded(device, file, name, shared, macros, carve_out)


@cache
def _loaded(device: int, file: str, name: str, shared: int, macros: Macros, carve_out: int | None) -> int:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the kernel {name} is used for the first time while a CUDA graph is being captured, where nothing can be "
            "loaded: run the layer once with these shapes and dtype before the capture"
        )
    return loader.load(sources.KernelSource.of(file, dict(macros)), name, device, shared, carve_out).handle


def _ragged(base: int, row_bytes: int) -> int:
    """The base address of a store map, shifted back by RAGGED_STORE rows.

    Modulo 2^64: of a tensor in the address space's first rows it is out of range, which the launch refuses by name.
    """
    return (base - RAGGED_STORE * row_bytes) % (1 << 64)


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
    params = struct.pack(
        "<5Q6i", topk_ids.data_ptr(), counts.data_ptr(), order.data_ptr(), inverse.data_ptr(), offsets.data_ptr(),
        slots, experts, chunks, size, ID_TYPE[topk_ids.dtype], 0,
    )  # fmt: skip
    if chunks > 1:
        count = function_of(device, "plan.cu", "plan_count", 0, ())
        launch(count, device, chunks, 1024, 4 * buckets, [], params)
    scatter = function_of(device, "plan.cu", "plan_scatter", 4 * (2 * 1025 + 32 + 32 * 1025), ())
    launch(scatter, device, chunks, 1024, 4 * (2 * buckets + 32 + 32 * buckets), [], params)


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
        addresses = offsets.data_ptr(), self.table, self.tall, self.tallest, self.expert_order, self._next_counter
        params = struct.pack("<6Q2i", *addresses, experts, COUNTERS)
        launch(function_of(device, "plan.cu", "tiles", 0, ()), device, 4 if ordered else 3, 1024, 0, [], params)

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
    rows = w.shape[2 if transposed else 1]
    if halves and transposed:
        strides = (4 * inter, 2 * inter, 4 * inter * hidden)
        return element, base, (inter, hidden, 2, experts), strides, (64, 64, 2, 1)
    if halves:
        strides = (2 * hidden, 2 * hidden * inter, 4 * hidden * inter)
        return element, base, (hidden, inter, 2, experts), strides, (64, 64, 2, 1)
    if transposed:
        return element, base, (rows, hidden, experts), (2 * rows, 2 * rows * hidden), (64, 64, 1)
    return element, base, (hidden, rows, experts), (2 * hidden, 2 * hidden * rows), (64, 128, 1)


def _ragged_rows(rows: Tensor, box_rows: int) -> Map:
    """The store map of a matrix of rows sorted by expert, clipped at an expert's last row (cuda/README.md)."""
    columns = rows.shape[1]
    base, strides = _ragged(rows.data_ptr(), 2 * columns), (2 * columns, 2 * columns)
    return MAP_ELEMENT[rows.dtype], base, (columns, RAGGED_STORE, MOST_ROWS), strides, (64, box_rows, 1)


def _pre_activation(pre: Tensor, inter: int, halves: bool, rows: int) -> Map:
    element, columns = MAP_ELEMENT[pre.dtype], pre.shape[1]
    if not halves:
        return _ragged_rows(pre, rows)
    base, strides = _ragged(pre.data_ptr(), 2 * columns), (2 * inter, 4 * inter, 4 * inter)
    return element, base, (inter, 2, RAGGED_STORE, MOST_ROWS), strides, (64, 1, rows, 1)


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
    file, macros = up_variant(
        x.dtype, activation, transposed, interleaved, bias is not None, pre is not None, few_rows, one_tile
    )  # fmt: skip
    rows, shared = (int(dict(macros)[name]) for name in ("BLOCK_TOKENS", "SHARED_BYTES"))
    params = struct.pack(
        "<6Q4iQ", tables.for_blocks_of(rows), tables.counter(), x.data_ptr(), order.data_ptr(), activated.data_ptr(),
        address(bias), -(-inter // (128 if act.gated else 256)), hidden, inter, top_k, address(pre),
    )  # fmt: skip
    weight_map = _up_weights(weights, hidden, inter, halves, transposed)
    function = function_of(device, file, file.removesuffix(".cu"), shared, macros)
    if file == "up_few.cu":
        second_map = _ragged_rows(activated, UP_FEW_STORE_TOKENS)
    else:
        second_map = weight_map if pre is None else _pre_activation(pre, inter, halves, rows)
    maps = [weight_map, second_map]
    launch(function, device, multiprocessors(device), 512, shared, maps, params)


def _weights(weights: Tensor, transposed: bool) -> Map:
    """Boxes of 64 x 64, or 64 k x 128 features."""
    experts, outer, inner = weights.shape
    strides = (2 * inner, 2 * inner * outer)
    return MAP_ELEMENT[weights.dtype], weights.data_ptr(), (inner, outer, experts), strides, (
        64, 64 if transposed else 128, 1
    )  # fmt: skip


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
    element, shared = MAP_ELEMENT[a.dtype], GROUPED_SHARED[stages]
    macros = grouped_mm_variant(a.dtype, bias is not None, transposed, stages, store_rows)
    weight_map = _weights(weights, transposed)
    row_map: Map = (element, a.data_ptr(), (inner, a.shape[0]), (2 * inner,), (64, 128))
    few_map: Map = (element, a.data_ptr(), (inner, a.shape[0]), (2 * inner,), (64, 32))
    out_map = _ragged_rows(out, store_rows)
    params = struct.pack(
        "<3Q3i4x", tables.table, tables.counter(), 0 if bias is None else bias.data_ptr(),
        -(-features // 256), inner, features,
    )  # fmt: skip
    function = function_of(device, "grouped_mm.cu", "grouped_mm", shared, macros)
    maps = [weight_map, row_map, few_map, out_map]
    launch(function, device, multiprocessors(device), 384, shared, maps, params)


def grouped_few(a: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor, tables: Tables, transposed: bool) -> None:
    """:func:`grouped_mm` in tiles of up to 288 rows."""
    device, inner, features = a.get_device(), a.shape[1], out.shape[1]
    macros = grouped_few_variant(a.dtype, bias is not None, transposed)
    row_map, last_map = (
        (MAP_ELEMENT[a.dtype], a.data_ptr(), (inner, a.shape[0]), (2 * inner,), (64, box)) for box in (64, 16)
    )
    params = struct.pack(
        "<4Q4i", tables.for_blocks_of(TALL_BLOCK_ROWS), tables.counter(), address(bias), out.data_ptr(),
        -(-features // 256), inner, features, 0,
    )  # fmt: skip
    function = function_of(device, "grouped_few.cu", "grouped_few", GROUPED_FEW_SHARED, macros)
    maps = [_weights(weights, transposed), row_map, last_map]
    launch(function, device, multiprocessors(device), 384, GROUPED_FEW_SHARED, maps, params)


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
    row_bytes = hidden * out.dtype.itemsize
    vector = vector_of(row_bytes, rows, out)
    macros = combine_variant(out.dtype, top_k, vector)
    params = struct.pack(
        "<5Q4i", rows.data_ptr(), inverse.data_ptr(), offsets.data_ptr(), 0 if scores is None else scores.data_ptr(),
        out.data_ptr(), tokens, hidden, top_k, offsets.shape[0] - 1,
    )  # fmt: skip
    units = tokens * -(-row_bytes // (32 * vector))
    blocks = min(4 * multiprocessors(device), -(-units // 8))
    function = function_of(device, "combine.cu", "combine", 0, macros)
    launch(function, device, blocks, 256, 0, [], params)
