"""The host planner, called from Python, against the same plan from torch's sort and bincount."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

import moekern as mk
from cases import Case, run, streamed
from moekern import _core


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seconds(f: Callable[[], object], rounds: int = 15) -> float:
    """The median time of a call that is long enough to be timed alone."""
    times = []
    for _ in range(rounds):
        start = perf_counter()
        f()
        times.append(perf_counter() - start)
    return median(times)


def sort_and_bincount(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The plan of a layer without a planner; the inverse permutation, one more scatter, is left out."""
    order = torch.sort(ids.reshape(-1), stable=True).indices
    return order, torch.bincount(ids.reshape(-1), minlength=num_experts).cumsum(0)


def ids_of(routing: str, slots: int, num_experts: int) -> Tensor:
    torch.manual_seed(0)
    ids = torch.full((slots,), 3) if routing == "one expert" else torch.randint(num_experts, (slots,))
    return ids.reshape(-1, 8)


@pytest.mark.benchmark(group="plan, of the shapes")
def bench_plan_of_shape(benchmark: Any, case: Case) -> None:
    """The planner of each backend: ids of 8 bytes read, order, inverse and offsets of 4 written."""
    ids, s = case.problem().ids, case.shape
    order = sort_and_bincount(ids, s.experts)[0]
    moved = 16.0 * s.slots + 4 * (s.experts + 1)
    plan = run(benchmark, case, lambda: mk.plan(ids, s.experts), lambda: streamed(case, moved), bytes=moved)
    assert torch.equal(plan.order.long(), order)


@pytest.mark.benchmark(group="plan")
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("slots", "num_experts", "routing"),
    [(1 << 18, e, "uniform") for e in (8, 64, 128, 1024)]
    + [(1 << 18, 64, "one expert"), (1 << 14, 64, "uniform"), (1 << 20, 64, "uniform"), (1 << 24, 256, "uniform")],
)
def bench_plan(benchmark: Any, slots: int, num_experts: int, routing: str, threads: int) -> None:
    ids = ids_of(routing, slots, num_experts)
    order = benchmark(mk.plan, ids, num_experts).order
    assert torch.equal(order.long(), sort_and_bincount(ids, num_experts)[0])
    against_torch(benchmark, ids, num_experts)


@pytest.mark.benchmark(group="plan, into memory that was written before")
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("slots", "num_experts"), [(1 << 18, 64), (1 << 18, 1024), (1 << 20, 64), (1 << 22, 64), (1 << 24, 256)]
)
def bench_plan_in_place(benchmark: Any, slots: int, num_experts: int, threads: int) -> None:
    """The planner alone: fresh memory would add the system's page faults, for any writer."""
    ids = ids_of("uniform", slots, num_experts)
    order, inverse, offsets = (torch.empty(n, dtype=torch.int32) for n in (slots, slots, num_experts + 1))
    addresses = order.data_ptr(), inverse.data_ptr(), offsets.data_ptr()
    benchmark(_core.plan, ids.data_ptr(), 3, slots, num_experts, *addresses, threads)
    assert torch.equal(order, mk.plan(ids, num_experts).order)
    against_torch(benchmark, ids, num_experts)


def against_torch(benchmark: Any, ids: Tensor, num_experts: int) -> None:
    if benchmark.enabled:
        slots, stats = ids.numel(), benchmark.stats.stats
        theirs = seconds(lambda: sort_and_bincount(ids, num_experts), 15 if slots < 1 << 22 else 3)
        benchmark.extra_info["ns a slot"] = stats.median / slots * 1e9
        benchmark.extra_info["best, ns a slot"] = stats.min / slots * 1e9
        benchmark.extra_info["torch, ns a slot"] = theirs / slots * 1e9
        benchmark.extra_info["times torch"] = theirs / stats.median


@pytest.mark.benchmark(group="plan, eight slots")
def bench_plan_of_one_token(benchmark: Any) -> None:
    ids = ids_of("uniform", 8, 64)
    offsets = benchmark(mk.plan, ids, 64).offsets
    assert offsets[-1] == 8
    if benchmark.enabled:
        calls = 200
        theirs = seconds(lambda: [sort_and_bincount(ids, 64) for _ in range(calls)]) / calls
        benchmark.extra_info["torch, us"] = theirs * 1e6
