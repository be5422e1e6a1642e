"""Permute and combine, forward and backward, beside torch's indexing on as many threads."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.permutation import combine, permute

TOKENS, TOP_K, EXPERTS = 2048, 8, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
shapes = pytest.mark.parametrize(("dtype", "hidden"), [(d, h) for d in DTYPES for h in (256, 2048)])


def case(dtype: str, hidden: int) -> tuple[mk.Plan, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    plan = mk.plan(torch.randint(EXPERTS, (TOKENS, TOP_K)), EXPERTS)
    x, y = torch.randn(TOKENS, hidden), torch.randn(TOKENS * TOP_K, hidden)
    return plan, x.to(DTYPES[dtype]), y.to(DTYPES[dtype]), torch.rand(TOKENS, TOP_K)


def against(benchmark: Any, peer: Callable[[], object], moved: int) -> None:
    """Adds the bytes that must move over the time, and torch's time."""
    if benchmark.enabled:
        times = []
        for _ in range(9):
            start = perf_counter()
            peer()
            times.append(perf_counter() - start)
        ours, theirs = benchmark.stats.stats.median, median(times)
        benchmark.extra_info["GB/s"] = moved / ours / 1e9
        benchmark.extra_info["torch, ms"] = theirs * 1e3
        benchmark.extra_info["times torch"] = theirs / ours


@pytest.mark.benchmark(group="permute")
@shapes
def bench_permute(benchmark: Any, dtype: str, hidden: int) -> None:
    plan, x, y, _ = case(dtype, hidden)
    token = plan.order // TOP_K
    assert torch.equal(benchmark(permute, x, plan), x[token])
    against(benchmark, lambda: x.index_select(0, token), x.nbytes + y.nbytes)


@pytest.mark.benchmark(group="combine")
@shapes
def bench_combine(benchmark: Any, dtype: str, hidden: int) -> None:
    plan, x, y, weights = case(dtype, hidden)

    def peer() -> Tensor:
        return (y[plan.inverse].view(TOKENS, TOP_K, -1).float() * weights.unsqueeze(2)).sum(1).to(y.dtype)

    torch.testing.assert_close(benchmark(combine, y, plan, weights), peer(), rtol=1e-2, atol=1e-2)
    against(benchmark, peer, x.nbytes + y.nbytes)


@pytest.mark.benchmark(group="combine")
@shapes
def bench_combine_backward(benchmark: Any, dtype: str, hidden: int) -> None:
    plan, dout, y, weights = case(dtype, hidden)
    args = (dout, y, weights, plan.inverse, plan.offsets, TOP_K, [True, True], "cpu")
    token = plan.order // TOP_K

    def peer() -> tuple[Tensor, Tensor]:
        rows = dout[token].float()
        dots = (rows * y).sum(1)
        return (rows * weights.flatten()[plan.order].unsqueeze(1)).to(y.dtype), dots[plan.inverse].view(TOKENS, TOP_K)

    dy, dweights = benchmark(torch.ops.moekern.combine_backward, *args)
    for ours, theirs in zip((dy, dweights), peer(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    against(benchmark, peer, dout.nbytes + 2 * y.nbytes)
