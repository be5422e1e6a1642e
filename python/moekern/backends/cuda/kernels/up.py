"""The up projection: tensor maps, parameters and launch of up.cu and up_consumers.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.kernels.tables import Tables
from moekern.backends.cuda.kernels.tensors import (
    ELEMENT,
    MAP_ELEMENT,
    MOST_ROWS,
    matrices,
    ragged_base,
    ragged_store,
    stored_rows,
)
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.kernel import launch
from moekern.backends.cuda.launch.program import Map


def up_variant(
    dtype: torch.dtype, activation: str, transposed: bool, interleaved: bool, bias: bool, save: bool,
    by_consumers: bool, tile_rows: int,
) -> KernelSource:  # fmt: skip
    """The up projection's variant.

    With `by_consumers` the consumers run the epilogue, where gate and up are halves: in tiles of 288 rows. Otherwise a
    warpgroup of its own runs it, in tiles of `tile_rows`, 272 or 288.
    """
    act = ACTIVATIONS[activation]
    by_consumers = by_consumers and act.gated and not interleaved
    return KernelSource.of(
        "up_consumers.cu" if by_consumers else "up.cu", ACTIVATION=act.code, BIAS=bias, ELEMENT=ELEMENT[dtype],
        INTERLEAVED=interleaved and act.gated, SAVE=save, TILE_ROWS=288 if by_consumers else tile_rows,
        TRANSPOSED=transposed,
    )  # fmt: skip


def _weights(w: Tensor, hidden: int, inter: int, halves: bool, transposed: bool) -> Map:
    element, base, experts = MAP_ELEMENT[w.dtype], w.data_ptr(), w.shape[0]
    if halves and transposed:
        strides = (4 * inter, 2 * inter, 4 * inter * hidden)
        return element, base, (inter, hidden, 2, experts), strides, (64, 64, 2, 1)
    if halves:
        strides = (2 * hidden, 2 * hidden * inter, 4 * hidden * inter)
        return element, base, (hidden, inter, 2, experts), strides, (64, 64, 2, 1)
    return matrices(w, 64 if transposed else 128)


def stored_pre_activation(pre: Tensor, inter: int, halves: bool, rows: int) -> Map:
    """The store map of the pre-activation, in boxes of so many rows and 64 columns, of gate or of up where halves."""
    element, columns = MAP_ELEMENT[pre.dtype], pre.shape[1]
    if not halves:
        return stored_rows(pre, rows)
    base, strides = ragged_base(pre.data_ptr(), 2 * columns), (2 * inter, 4 * inter, 4 * inter)
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
    by_consumers: bool,
    tile_rows: int,
) -> None:
    """Gather, up projection and activation of every row: fills `activated` ``[S, I]`` and `pre` ``[S, 2I]``.

    `by_consumers` and `tile_rows` choose the form: see :func:`up_variant`.
    """
    device, hidden, inter = x.get_device(), x.shape[1], activated.shape[1]
    act = ACTIVATIONS[activation]
    halves = act.gated and not interleaved
    source = up_variant(
        x.dtype, activation, transposed, interleaved, bias is not None, pre is not None, by_consumers, tile_rows
    )  # fmt: skip
    stated = constants(source)
    params = {
        "table": tables.table(stated["TILE_ROWS"]), "counter": tables.counter(), "x": x, "order": order,
        "activated": activated, "bias": bias, "columns": -(-inter // stated["FEATURES"]), "hidden": hidden,
        "inter": inter, "top_k": top_k, "pre": pre,
    }  # fmt: skip
    maps = {"weights": _weights(weights, hidden, inter, halves, transposed)}
    if source.file == "up_consumers.cu":
        maps["activated"] = stored_rows(activated, stated["STORE_ROWS"])
    elif pre is None:
        maps["pre"] = maps["weights"]  # not used
    else:
        maps["pre"] = stored_pre_activation(pre, inter, halves, stated["ROWS"])
    launch(source, source.file.removesuffix(".cu"), device, params, maps=maps)
