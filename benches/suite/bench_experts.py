"""The experts: forward as in inference, forward and backward as in training, and decode."""

from __future__ import annotations

from typing import Any

import pytest

from cases import Case, of_verb, run
from moekern.bench import decode, peers
from moekern.bench.peers.base import both_of, forward_of, saved_bytes
from moekern.bench.problem import Results
from moekern.bench.record import BOTH, DECODE, FORWARD


@pytest.mark.benchmark(group="experts, forward")
def bench_forward(benchmark: Any, case: Case) -> None:
    problem = case.problem()
    run(
        benchmark, case, forward_of(peers.OURS.build(problem), problem), lambda: of_verb(case, problem, FORWARD),
        flops=problem.flops(FORWARD), bytes=problem.bytes(FORWARD),
        error=lambda results: results.error_against(problem.reference(False)),
    )  # fmt: skip


@pytest.mark.benchmark(group="experts, forward+backward")
def bench_forward_and_backward(benchmark: Any, case: Case) -> None:
    problem = case.problem()
    layer = peers.OURS.build(problem)
    run(
        benchmark, case, both_of(layer, problem), lambda: of_verb(case, problem, BOTH),
        flops=problem.flops(BOTH), bytes=problem.bytes(BOTH), saved=saved_bytes(layer, problem),
        error=lambda results: Results(*results).error_against(problem.reference(True)),
    )  # fmt: skip


@pytest.mark.benchmark(group="experts, decode")
def bench_decode(benchmark: Any, case: Case) -> None:
    problem = case.problem()
    several = decode.problems(problem, 8 << 30)
    work, passes, remark = decode.work([peers.OURS.build(each) for each in several], several)
    assert not remark
    moved = sum(each.bytes(DECODE) for each in several) / len(several)
    benchmark.extra_info["passes"] = passes
    run(benchmark, case, work, lambda: of_verb(case, problem, DECODE), bytes=moved,
        flops=problem.flops(DECODE), repeats=passes,
        error=lambda results: results.error_against(several[-1].reference(False)))  # fmt: skip
