"""The whole layer with router and experts: inference, and the two passes of a training step."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import moekern as mk
from cases import Case, of_verb, run
from moekern.bench.problem import Problem, relative_error
from moekern.bench.record import BOTH, FORWARD


def layer_of(case: Case) -> tuple[mk.MoE, Problem]:
    """A layer with the problem's weights. Its own router decides; the case's routing is ignored."""
    problem, s = case.problem(), case.shape
    layer = mk.MoE(s.hidden, s.intermediate, s.experts, s.top_k, device=case.device, dtype=case.torch_dtype)
    with torch.no_grad():
        layer.experts.gate_up_proj.copy_(problem.w_gate_up)
        layer.experts.down_proj.copy_(problem.w_down)
        layer.gate.weight.normal_()
    return layer, problem


def in_float32(layer: mk.MoE, x: Tensor) -> Tensor:
    with torch.no_grad(), mk.backend("reference"):
        return deepcopy(layer).float()(x.float())


@pytest.mark.benchmark(group="layer, forward")
def bench_layer(benchmark: Any, case: Case) -> None:
    layer, problem = layer_of(case)

    @torch.no_grad()
    def work() -> Tensor:
        return layer(problem.x)

    run(
        benchmark, case, work, lambda: of_verb(case, problem, FORWARD),
        flops=problem.flops(FORWARD), bytes=problem.bytes(FORWARD),
        error=lambda out: relative_error(out, in_float32(layer, problem.x)),
    )  # fmt: skip


@pytest.mark.benchmark(group="layer, forward+backward")
def bench_layer_and_backward(benchmark: Any, case: Case) -> None:
    layer, problem = layer_of(case)
    x = problem.x.clone().requires_grad_()

    def work() -> Tensor:
        out = layer(x)
        out.backward(problem.dout)
        x.grad = None
        layer.zero_grad(set_to_none=True)
        return out.detach()

    run(
        benchmark, case, work, lambda: of_verb(case, problem, BOTH),
        flops=problem.flops(BOTH), bytes=problem.bytes(BOTH),
        error=lambda out: relative_error(out, in_float32(layer, problem.x)),
    )  # fmt: skip
