"""Grouped matrix products: each group of rows times a matrix (varlen-M), or times other rows (varlen-K)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moekern as mk
from cases import Case, run
from moekern.bench.ceiling import product
from moekern.bench.problem import relative_error
from moekern.bench.timing import Clock, Wait


class Product:
    """The ceiling: one dense matmul of the same FLOPs."""

    def __init__(self, case: Case, m: int, k: int, n: int, gradient: bool) -> None:
        self.run = product(m, k, n, case.torch_dtype, gradient, case.device)

    def __call__(self, clock: Clock) -> Wait:
        return clock(self.run)


def rows_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x of every slot ``[S, H]``, the inner rows ``[S, I]``, offsets, and weights ``[E, I, H]``."""
    problem, s = case.problem(), case.shape
    plan = mk.plan(problem.ids, s.experts)
    rows = problem.x[plan.order.long() // s.top_k]
    inner = torch.randn(s.slots, s.intermediate, device=case.device).to(case.torch_dtype)
    return rows, inner, plan.offsets, problem.w_gate_up[:, : s.intermediate].contiguous()


def by_group(a: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    return a.float().split(offsets.diff().tolist())


@pytest.mark.benchmark(group="grouped_mm, varlen-M")
def bench_varlen_m(benchmark: Any, case: Case) -> None:
    rows, _, offsets, w = rows_of(case)
    s = case.shape
    active = int((offsets.diff() > 0).sum())

    def error(out: Tensor) -> float:
        groups = zip(by_group(rows, offsets), w.float(), strict=True)
        return relative_error(out, torch.cat([a @ b.T for a, b in groups]))

    run(
        benchmark, case, lambda: mk.grouped_mm(rows, w.mT, offsets),
        lambda: Product(case, s.slots, s.hidden, s.intermediate, False),
        flops=2.0 * s.slots * s.hidden * s.intermediate, error=error,
        bytes=float(rows.itemsize * (s.slots * (s.hidden + s.intermediate) + active * s.hidden * s.intermediate)),
    )  # fmt: skip


@pytest.mark.benchmark(group="grouped_mm, varlen-K")
def bench_varlen_k(benchmark: Any, case: Case) -> None:
    rows, inner, offsets, _ = rows_of(case)
    s = case.shape

    def error(out: Tensor) -> float:
        groups = zip(by_group(inner, offsets), by_group(rows, offsets), strict=True)
        return relative_error(out, torch.stack([a.T @ b for a, b in groups]))

    run(
        benchmark, case, lambda: mk.grouped_mm(inner, rows, offsets),
        lambda: Product(case, s.intermediate, s.slots, s.hidden, True),
        flops=2.0 * s.slots * s.hidden * s.intermediate, error=error,
        bytes=float(rows.itemsize * (s.slots * (s.hidden + s.intermediate) + s.experts * s.hidden * s.intermediate)),
    )  # fmt: skip
