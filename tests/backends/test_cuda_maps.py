"""Tensor maps of memory at any address, and boxes that end with their rows. No GPU is needed."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

import pretended
from moekern.backends.cuda.kernels import tensors, up
from moekern.backends.cuda.launch.program import FIRST, SPACING, Map, Placeholder

# Every launcher with maps, recorded and replayed at low addresses, as virtual memory has, cudaMalloc's, the highest.
PROGRAM = """
import ctypes, itertools, torch
from moekern.backends.activations import ACTIVATIONS
from moekern.backends.call import Form
from moekern.backends.cuda.passes.sizes import Sizes
from moekern.backends.cuda.kernels import combine
from moekern.backends.cuda.launch import kernel, program
from moekern.backends.cuda.passes import backward, forward
from moekern.backends.cuda.configuration import Configuration

driver = ctypes.CDLL("libcuda.so.1")
encoded = ctypes.c_int.in_dll(driver, "encoded")
kernel._loaded = lambda *_: 3
kernel.multiprocessors = combine.multiprocessors = lambda device: 132
program.compile_missing = lambda *_, **__: None
program.all_present = lambda *_: True

forms = [Configuration("hopper", up, up, tiles_288, stages, store_rows, stages)
         for up, tiles_288, stages, store_rows in ((False, False, 3, 256), (True, False, 4, 128), (True, True, 4, 128))]
sizes = [(40000, 2048, 768), (100, 8, 8), (7, 16384, 32768)]
places = [1 << 32, 0x302000000, 0x7f0000000000, (1 << 57) - (1 << 44)]
def programs(form, activation, transposed, interleaved, dtype, tokens, hidden, inter):
    columns = inter * (2 if ACTIVATIONS[activation].gated else 1)
    how = Form(activation, transposed, interleaved, 2)
    z = Sizes(0, dtype, tokens, hidden, columns, inter, 4, how, True, True, True, form)
    for save in (True, False):
        yield forward._forward_program.__wrapped__(z, save)[0], 12
    for one in backward._programs.__wrapped__(z, (True,) * 6)[0]:
        yield one, 18

for case in itertools.product(
    forms, ("swiglu", "swiglu_oai", "relu2"), (False, True), (False, True), (torch.bfloat16, torch.float16), sizes):
    *options, size = case
    for one, addresses in programs(*options, *size):
        for place in places:
            before = encoded.value
            one.replay(0, [place + i * (1 << 33) for i in range(addresses)])
            if before == encoded.value:
                assert one is not None and addresses == 18  # the overlapping combine has no maps
one, addresses = next(programs(forms[0], "swiglu", False, False, torch.bfloat16, 7, 2048, 4096))
one.replay(0, [512 * 4 * 4096] * addresses)
for low in (512 * 4 * 4096 - 16, 0):
    try:
        one.replay(0, [low] * addresses)
    except RuntimeError as error:
        assert "512 rows above address 0" in str(error), error
    else:
        raise AssertionError("no error")
assert encoded.value > 1000
print("all right")
"""


def test_every_map_is_accepted_wherever_memory_lies(tmp_path: Path) -> None:
    printed = pretended.run(PROGRAM, tmp_path)
    assert printed == "all right", printed


def _base(described: Map) -> int:
    """Of a map of place 0, in bytes from the tensor."""
    return described[1] - FIRST - SPACING


@pytest.mark.parametrize("columns", [8, 768, 65536])
@pytest.mark.parametrize("halves", [False, True])
def test_stores_end_with_the_tile(columns: int, halves: bool) -> None:
    """A tile has up to 288 rows; a box of any of its parts writes its own rows, at their places, and no other."""
    tensor = Placeholder(0, (40000, columns), torch.bfloat16, 0)
    described = up.stored_pre_activation(tensor, columns // 2, halves, 144)  # type: ignore[arg-type]
    _, _, dims, strides, _ = described
    shift = dims[-2]
    for rows, first in product((1, 143, 256, 288), (0, 5, 39_712)):
        for row in (0, 1, 100, 142, 255, 256, 287, 288, 300):
            place = (shift - rows + row, first + rows)
            assert min(place) >= 0
            at = _base(described) + sum(c * s for c, s in zip(place, strides[-2:], strict=True))
            inside = all(c < d for c, d in zip(place, dims[-2:], strict=True))
            assert inside == (row < rows)
            assert at == (first + row) * 2 * columns


@pytest.mark.parametrize("columns", [8, 768, 65536])
def test_loads_end_with_the_expert(columns: int) -> None:
    """An expert has any number of rows; the base is the tensor's, and the shift vanishes modulo 2^64."""
    described = tensors.loaded_rows(Placeholder(0, (1 << 24, columns), torch.bfloat16, 0))  # type: ignore[arg-type]
    _, _, dims, strides, _ = described
    assert _base(described) == 0
    shift = dims[1]
    for rows, first, row in product((1, 300, 1 << 29), (0, 5, 1 << 23), (0, 1, 299, 300, (1 << 29) - 1, 1 << 29)):
        place = (shift - rows + row, shift, first + rows)
        assert all(0 <= c < 1 << 31 for c in place)
        assert (place[0] < dims[1]) == (row < rows)
        assert sum(c * s for c, s in zip(place, strides, strict=True)) % (1 << 64) == (first + row) * 2 * columns
