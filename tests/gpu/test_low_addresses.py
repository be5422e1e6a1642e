"""Memory at low addresses, as expandable segments, symmetric memory and CUDA's pools give it: the same bits."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import problems
from problems import NAMES, make
from ragged import COUNTS, normal, plan_of_counts

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
ARENA = 128 << 20


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


class _Properties(ctypes.Structure):
    """`CUmemAllocationProp` of pinned memory of a device."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location_type", ctypes.c_int), ("device", ctypes.c_int), ("flags", ctypes.c_int))


class Arena:
    """Memory of the driver's virtual memory management, handed out piece by piece as tensors."""

    def __init__(self) -> None:
        torch.empty(1, device="cuda")  # makes the device's context current
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._device = torch.cuda.current_device()
        properties = _Properties(type=1, location_type=1, device=self._device)
        size, handle, address = ctypes.c_size_t(), ctypes.c_ulonglong(), ctypes.c_ulonglong()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(properties), ctypes.c_int(0))
        self.size = ctypes.c_size_t(-(-ARENA // size.value) * size.value)
        zero, hint = ctypes.c_ulonglong(0), ctypes.c_ulonglong(1 << 33)
        self._call("cuMemAddressReserve", ctypes.byref(address), self.size, ctypes.c_size_t(0), hint, zero)
        self._call("cuMemCreate", ctypes.byref(handle), self.size, ctypes.byref(properties), zero)
        self._call("cuMemMap", address, self.size, ctypes.c_size_t(0), handle, zero)
        access = _Access(location_type=1, device=self._device, flags=3)
        self._call("cuMemSetAccess", address, self.size, ctypes.byref(access), ctypes.c_size_t(1))
        self.address, self._handle = address, handle
        self.next = address.value + 16

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._driver, name)(*arguments)
        assert result == 0, f"{name}: error {result}"

    def close(self) -> None:
        torch.cuda.synchronize()
        self._call("cuMemUnmap", self.address, self.size)
        self._call("cuMemRelease", self._handle)
        self._call("cuMemAddressFree", self.address, self.size)

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in the arena, at an odd multiple of 16 bytes."""
        begin, count = self.next, tensor.numel() * tensor.element_size()
        self.next += -(-count // 32) * 32 + (16 if self.next % 32 == 0 else 32)
        assert self.next <= self.address.value + self.size.value
        interface = {"shape": (count,), "typestr": "|u1", "data": (begin, False), "version": 3, "strides": None}
        memory = torch.as_tensor(type("Memory", (), {"__cuda_array_interface__": interface})(), device="cuda")
        assert memory.data_ptr() == begin
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena()
    if made.address.value >= 1 << 44:
        made.close()
        pytest.skip(f"the driver gives no low address, but {made.address.value:#x}")
    yield made
    made.close()


def test_each_kernel_with_maps(arena: Arena) -> None:
    from moekern.backends.cuda.kernels import gradients, grouped, up
    from moekern.backends.cuda.kernels.tables import Tables

    hidden, inter, experts, rows = 328, 296, len(COUNTS), sum(COUNTS)
    order, _, offsets = plan_of_counts(COUNTS)
    x, w = normal(rows, hidden, dtype=BF16), normal(experts, 2 * inter, hidden, dtype=BF16, scale=0.05)
    w_down = normal(experts, hidden, inter, dtype=BF16, scale=0.05)
    results: list[list[Tensor]] = []
    for place in (torch.clone, arena.place):

        def new(*shape: int, place=place) -> Tensor:  # type: ignore[no-untyped-def]
            return place(torch.full(shape, float("nan"), dtype=BF16, device="cuda"))

        found = []
        x, w, w_down = place(x), place(w), place(w_down)
        for by_consumers, save in itertools.product((False, True), (True, False)):
            activated, pre = new(rows, inter), new(rows, 2 * inter)
            tables = Tables(offsets, rows)
            form = ("swiglu", False, False, by_consumers, 272)
            up.up(x, order, w, None, activated, pre if save else None, tables, 1, *form)
            found += [activated, pre] if save else [activated]
        for stages, store_rows in ((3, 256), (4, 128), (0, 0)):
            out = new(rows, hidden)
            tables = Tables(offsets, rows)
            if stages:
                grouped.grouped_mm(found[0], w_down, None, out, tables, False, stages, store_rows)
            else:
                grouped.grouped_288(found[0], w_down, None, out, tables, False)
            found.append(out)
        token = torch.arange(rows, dtype=torch.int32, device="cuda")
        for stages, gather in ((3, None), (4, token)):
            out = new(experts, hidden, inter)
            gradients.wgrad(x, found[0], gather, offsets, Tables(offsets, rows), out, False, stages=stages)
            found.append(out)
        results.append(found)
    assert len(results[0]) == 11
    for high, low in zip(*results, strict=True):
        assert low.data_ptr() < 1 << 44
        assert high.isfinite().all()
        assert torch.equal(high, low)


EXPANDABLE = """
import sys, torch
import moekern as mk
sys.path.insert(0, sys.argv[1])
from problems import error, gradients, make

assert torch.empty(1, device="cuda").data_ptr() < 1 << 44, "these segments do not lie low"
for sizes in ((1, 256, 136, 8, 2), (7, 2048, 768, 64, 8), (700, 328, 296, 3, 1), (3000, 512, 264, 4, 2)):
    p = make(*sizes, dtype=torch.bfloat16, device="cuda")
    dout = torch.randn_like(p.x)
    with mk.backend("reference"):
        truth, plain = gradients(p.cast(torch.float64), dout.double()), gradients(p, dout)
    got = gradients(p, dout)
    with torch.no_grad():
        got["inferred"], truth["inferred"], plain["inferred"] = p.run(), truth["out"], plain["out"]
    for name, value in got.items():
        allowed = max(2 * error(plain[name], truth[name]), torch.finfo(value.dtype).eps / 2, 1e-6)
        assert error(value, truth[name]) <= allowed, (name, error(value, truth[name]), allowed)
print("all right")
"""


@pytest.mark.slow
def test_expandable_segments() -> None:
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    command = [sys.executable, "-c", EXPANDABLE, str(Path(problems.__file__).parent)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "all right", result.stdout + result.stderr


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [90, 3000])
def test_views_at_odd_places(tokens: int, bias: bool) -> None:
    """Inputs that begin at a multiple of two bytes only are copied if kernels read vectors; the bits stay."""
    p = make(tokens, 256, 136, 5, 2, dtype=BF16, device="cuda", bias=bias)
    dout = torch.randn_like(p.x)
    results = []
    for moved in (False, True):
        leaves = {}
        for name, tensor in zip(NAMES, p.floating, strict=True):
            if tensor is not None:
                memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
                odd = moved and name not in ("w_gate_up", "w_down")  # torch serves these, with a warning
                leaves[name] = memory[odd:][: tensor.numel()].view(tensor.shape).copy_(tensor).requires_grad_()
        assert moved == (leaves["x"].data_ptr() % 16 != 0)
        out = p.run(**leaves)
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), dout)])
    for plain, odd in zip(*results, strict=True):
        assert torch.equal(plain, odd)
