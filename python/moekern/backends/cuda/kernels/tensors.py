"""Tensors as the kernels see them: names of element types, widths of vectors, tensor maps.

Addresses and strides are those of cuda/README.md; sizes in bytes are written as 2 * elements, since every kernel with a
tensor map works on 16-bit elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.program import Map

ELEMENT = {torch.bfloat16: "Bf16", torch.float16: "F16", torch.float32: "F32"}  # the last where only rows are moved
MAP_ELEMENT = {torch.bfloat16: 9, torch.float16: 6}  # CU_TENSOR_MAP_DATA_TYPE_*
MOST_ROWS = (1 << 31) - 1
_HOPPER = KernelSource("hopper.cuh")


def vector_of(row_bytes: int, *matrices: Tensor) -> int:
    """Bytes of the largest vector, up to 16, that every row of these matrices is made of."""
    bits = row_bytes | 16
    for matrix in matrices:
        bits |= matrix.data_ptr()
    return bits & -bits


def matrices(weights: Tensor, box_rows: int) -> Map:
    """A matrix of each expert, in boxes of 64 columns."""
    experts, outer, inner = weights.shape
    strides = (2 * inner, 2 * inner * outer)
    return MAP_ELEMENT[weights.dtype], weights.data_ptr(), (inner, outer, experts), strides, (64, box_rows, 1)


def rows(a: Tensor, box_rows: int) -> Map:
    """One matrix, in boxes of 64 columns."""
    count, columns = a.shape
    return MAP_ELEMENT[a.dtype], a.data_ptr(), (columns, count), (2 * columns,), (64, box_rows)


def ragged_store() -> int:
    """Rows by which the maps of ragged stores are shifted."""
    return constants(_HOPPER)["RAGGED_STORE"]


def ragged_base(base: int, row_bytes: int) -> int:
    """The base address of a store map, shifted back by :func:`ragged_store` rows.

    Modulo 2^64: of a tensor in the address space's first rows it is out of range, which the launch refuses by name.
    """
    return (base - ragged_store() * row_bytes) % (1 << 64)


def stored_rows(rows: Tensor, box_rows: int) -> Map:
    """The store map of a matrix of rows sorted by expert, clipped at an expert's last row (hopper.cuh)."""
    columns = rows.shape[1]
    base, strides = ragged_base(rows.data_ptr(), 2 * columns), (2 * columns, 2 * columns)
    return MAP_ELEMENT[rows.dtype], base, (columns, ragged_store(), MOST_ROWS), strides, (64, box_rows, 1)


def loaded_rows(rows: Tensor) -> Map:
    """The load map of such a matrix: boxes of 64 rows and 64 features, zeros past an expert's last row (hopper.cuh)."""
    columns, pitch = rows.shape[1], 2 * rows.shape[1]
    shift = constants(_HOPPER)["RAGGED_LOAD"]
    dims, strides = (columns, shift, MOST_ROWS, MOST_ROWS), (pitch, (1 << 35) - pitch, pitch)
    return MAP_ELEMENT[rows.dtype], rows.data_ptr(), dims, strides, (64, 64, 1, 1)
