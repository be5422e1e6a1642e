"""Grouped GEMMs over contiguous rows: tensor maps, parameters and launch of grouped_mm.cu and grouped_288.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels.tables import Tables
from moekern.backends.cuda.kernels.tensors import ELEMENT, matrices, rows, stored_rows
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.kernel import launch


def grouped_mm_variant(dtype: torch.dtype, bias: bool, transposed: bool, stages: int, store_rows: int) -> KernelSource:
    """The grouped GEMM in tiles of up to 256 rows."""
    return KernelSource.of(
        "grouped_mm.cu", BIAS=bias, ELEMENT=ELEMENT[dtype], RING_STAGES=stages, STORE_ROWS=store_rows,
        TRANSPOSED=transposed,
    )  # fmt: skip


def grouped_288_variant(dtype: torch.dtype, bias: bool, transposed: bool) -> KernelSource:
    """The grouped GEMM in tiles of up to 288 rows."""
    return KernelSource.of("grouped_288.cu", BIAS=bias, ELEMENT=ELEMENT[dtype], TRANSPOSED=transposed)


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
        "table": tables.table(stated["TILE_ROWS"]), "counter": tables.counter(), "bias": bias,
        "columns": -(-features // stated["TILE_FEATURES"]), "inner": inner, "features": features,
    }  # fmt: skip
    maps = {
        "weights": matrices(weights, 64 if transposed else 128),
        "rows": rows(a, stated["BOX_ROWS"]),
        "tail": rows(a, stated["TAIL_ROWS"]),
        "out": stored_rows(out, store_rows),
    }
    launch(source, "grouped_mm", device, params, maps=maps)


def grouped_288(a: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor, tables: Tables, transposed: bool) -> None:
    """:func:`grouped_mm` in tiles of up to 288 rows."""
    device, inner, features = a.get_device(), a.shape[1], out.shape[1]
    source = grouped_288_variant(a.dtype, bias is not None, transposed)
    stated = constants(source)
    params = {
        "table": tables.table(stated["TILE_ROWS"]), "counter": tables.counter(), "bias": bias, "out": out,
        "columns": -(-features // stated["TILE_FEATURES"]), "inner": inner, "features": features,
    }  # fmt: skip
    maps = {
        "weights": matrices(weights, 64 if transposed else 128),
        "rows": rows(a, stated["BOX_ROWS"]),
        "tail": rows(a, stated["TAIL_ROWS"]),
    }
    launch(source, "grouped_288", device, params, maps=maps)


def grouped_product(
    a: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tables: Tables,
    transposed: bool,
    configuration: Configuration,
) -> None:
    """:func:`grouped_mm` or :func:`grouped_288`, in the form that the configuration says."""
    if configuration.tiles_288:
        grouped_288(a, weights, bias, out, tables, transposed)
    else:
        grouped_mm(a, weights, bias, out, tables, transposed, configuration.stages, configuration.store_rows)
