"""The host's part of a plan of ids on a GPU, on a pretended driver: marks, threads, ranks, ids that never arrive."""

from __future__ import annotations

from pathlib import Path

import pretended

PROGRAM = """
import ctypes, sys, torch
from moekern import _core
from moekern.backends import reference

driver = ctypes.CDLL("libcuda.so.1")
plans = 0

def plan(ids, experts, threads, device=0, allocate=None):
    global plans
    plans += 1
    marks, size = _core.cuda_plan_memory(ids.numel(), experts)
    key = (ids.numel(), experts)
    if key not in memory:
        memory[key] = torch.zeros(marks, dtype=torch.int32), torch.empty(size, dtype=torch.uint8)
    marks, staging = memory[key]
    order = torch.empty(ids.numel(), dtype=torch.int32)
    inverse, offsets = torch.empty_like(order), torch.empty(experts + 1, dtype=torch.int32)
    _core.cuda_plan(
        1, 2, device, 0, marks.data_ptr(), plans, staging.data_ptr(), ids.data_ptr(), 3, ids.numel(), experts, threads,
        allocate or (lambda: (order.data_ptr(), inverse.data_ptr(), offsets.data_ptr())),
    )
    return order, inverse, offsets

memory = {}
sizes = [(1, 1), (5, 7), (4096, 128), (4097, 128), (262144, 128), (200001, 255), (33333, 256), (262144, 1024),
         (501, 70000), (300000, 70000), (140000, 3)]
for slots, experts in sizes:
    for threads in (1, 2, 5, 16):
        many = [torch.randint(-2, experts + 2, (slots,)) for _ in range(2)]
        for ids in (*many, torch.full((slots,), experts // 2)):
            wanted = reference.plan(ids.view(-1, 1), experts)
            for a, b in zip(plan(ids, experts, threads), wanted, strict=True):
                assert torch.equal(a, b), (slots, experts, threads)
current = ctypes.c_int()
for device in (1, 0):  # the kernels of either device run in its context, and the caller's is put back
    plan(torch.zeros(100, dtype=torch.int64), 8, 1, device)
    assert ctypes.c_int.in_dll(driver, "launched_on").value == device
    assert driver.cuCtxGetDevice(ctypes.byref(current)) == 0 and current.value == 0
def no_memory():
    raise MemoryError("of the device")
for allocate, error in ((no_memory, MemoryError), (lambda: 1, TypeError)):
    ids = torch.randint(0, 128, (100000,))
    for threads in (1, 4):
        try:
            plan(ids, 128, threads, allocate=allocate)
        except error:
            pass
        else:
            raise AssertionError("no error")
        driver.finish()  # the ids still come, to memory that must live so long
        for a, b in zip(plan(ids, 128, threads), reference.plan(ids.view(-1, 1), 128), strict=True):
            assert torch.equal(a, b)
for failing, message in ((1, "the ids have not come over"), (2, "CUDA_ERROR_ILLEGAL_ADDRESS")):
    ctypes.c_int.in_dll(driver, "failing").value = failing
    for threads in (1, 4):
        try:
            plan(torch.zeros(50000, dtype=torch.int64), 8, threads)
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError("no error")
print("all right")
"""


def test_plans_on_a_pretended_driver(tmp_path: Path) -> None:
    printed = pretended.run(PROGRAM, tmp_path)
    assert printed == "all right", printed
