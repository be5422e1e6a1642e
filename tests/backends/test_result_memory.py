"""Memory of large results: lent to tensors, returned with the last of them, and used again."""

from __future__ import annotations

import gc

import pytest
import torch

from moekern import _core
from moekern.backends import cpu

MIB = 1 << 20


def test_pages_are_a_writable_aligned_buffer() -> None:
    view = memoryview(_core.Pages(3 * MIB + 5))
    assert view.nbytes == 3 * MIB + 5
    assert not view.readonly
    view[-1] = 7
    assert torch.frombuffer(view, dtype=torch.uint8).data_ptr() % (2 * MIB) == 0


def test_memory_outlives_views_and_is_then_used_again() -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    first = cpu._result((7, 3, MIB), like)
    address, part = first.data_ptr(), first[6, 2]
    part.fill_(3)
    del first
    gc.collect()
    other = cpu._result((7, 3, MIB), like)
    assert other.data_ptr() != address
    assert bool((part == 3).all())
    del part
    assert cpu._result((7, 3, MIB), like).data_ptr() == address


def test_small_results_come_from_torch() -> None:
    assert cpu._result((3, 5), torch.empty(0)).untyped_storage().resizable()


def test_impossible_sizes_are_memory_errors() -> None:
    with pytest.raises(MemoryError, match="bytes for a result"):
        _core.Pages(1 << 62)


def test_memory_rate() -> None:
    memory = torch.ones(MIB)
    start = -memory.data_ptr() % 64 + memory.data_ptr()
    assert _core.memory_rate(start, 2 * MIB, 2, False) > 1e6
    assert bool((memory == 1).all())
    assert _core.memory_rate(start, 2 * MIB, 2, True) > 1e6
    assert int((memory == 1.25).sum()) == 2 * MIB // 4
    for bad in ((0, 2 * MIB), (start + 1, 2 * MIB), (start, MIB - 1)):
        with pytest.raises(ValueError, match="aligned to 64"):
            _core.memory_rate(*bad, 2, False)
