"""Permute and combine, forward and backward, against a copy of as many bytes and torch's indexing."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

import moekern as mk
from cases import Case, run, streamed
from moekern.bench.problem import Problem, relative_error


def inputs_of(case: Case) -> tuple[Problem, mk.Plan, Tensor, Tensor]:
    """The problem, its plan, the token of each row, and random rows ``[S, H]``."""
    problem, s = case.problem(), case.shape
    plan = mk.plan(problem.ids, s.experts)
    rows = torch.randn(s.slots, s.hidden, device=case.device).to(case.torch_dtype)
    return problem, plan, plan.order.long() // s.top_k, rows


def beside(benchmark: Any, case: Case, peer: Callable[[], object]) -> None:
    """Add torch's time; pytest-benchmark has moekern's."""
    if not benchmark.enabled:
        return
    times = []
    for _ in range(9):
        start = perf_counter()
        peer()
        if case.device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    ours, theirs = benchmark.stats.stats.median, median(times)
    benchmark.extra_info.update({"torch, ms": theirs * 1e3, "times torch": theirs / ours})


@pytest.mark.benchmark(group="permute")
def bench_permute(benchmark: Any, case: Case) -> None:
    problem, plan, token, rows = inputs_of(case)
    moved = float(problem.x.nbytes + rows.nbytes)
    out = run(benchmark, case, lambda: mk.permute(problem.x, plan), lambda: streamed(case, moved), bytes=moved)
    assert torch.equal(out, problem.x[token])
    beside(benchmark, case, lambda: problem.x.index_select(0, token))


@pytest.mark.benchmark(group="combine")
def bench_combine(benchmark: Any, case: Case) -> None:
    problem, plan, _, rows = inputs_of(case)
    moved = float(problem.x.nbytes + rows.nbytes)
    inverse = plan.inverse.long()

    def peer(dtype: torch.dtype = case.torch_dtype) -> Tensor:
        taken = rows[inverse].view(*problem.scores.shape, -1).float()
        return (taken * problem.scores.unsqueeze(2)).sum(1).to(dtype)

    run(
        benchmark, case, lambda: mk.combine(rows, plan, problem.scores), lambda: streamed(case, moved), bytes=moved,
        error=lambda out: relative_error(out, peer(torch.float32)),
    )  # fmt: skip
    beside(benchmark, case, peer)


@pytest.mark.benchmark(group="combine, backward")
def bench_combine_backward(benchmark: Any, case: Case) -> None:
    problem, plan, token, rows = inputs_of(case)
    moved = float(problem.dout.nbytes + 2 * rows.nbytes)
    y, weights = rows.requires_grad_(), problem.scores.requires_grad_()
    out = mk.combine(y, plan, weights)
    inverse, row_weights = plan.inverse.long(), weights.detach().flatten()[plan.order.long()].unsqueeze(1)

    def peer(dtype: torch.dtype = case.torch_dtype) -> tuple[Tensor, Tensor]:
        grads = problem.dout[token].float()
        dots = (grads * y.detach()).sum(1)
        return (grads * row_weights).to(dtype), dots[inverse].view_as(weights)

    def error(got: tuple[Tensor, ...]) -> float:
        return max(relative_error(a, b) for a, b in zip(got, peer(torch.float32), strict=True))

    run(
        benchmark, case, lambda: torch.autograd.grad(out, (y, weights), problem.dout, retain_graph=True),
        lambda: streamed(case, moved), bytes=moved, error=error,
    )  # fmt: skip
    beside(benchmark, case, peer)
