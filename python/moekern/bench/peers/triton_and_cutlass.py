"""Libraries of MoE kernels for NVIDIA GPUs, called as their own layers call them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekern.bench.peers.base import Layer, Peer
from moekern.bench.problem import Problem
from moekern.report import machine


def not_installed(*packages: str) -> str | None:
    """The names of the packages to install, if any of these cannot be imported."""
    lacking = [name for name in packages if not machine.is_importable(name)]
    return f"{', '.join(lacking)} is not installed" if lacking else None


class ScatterMoE(Peer):
    """https://github.com/shawntan/scattermoe, its `mlp.GLUMLP`, written out so that it takes our weights."""

    name = "scattermoe"
    about = "ScatterMoE's Triton kernels"
    devices = usual = ("cuda",)
    waits = True  # for torch.bincount; after a capture that failed in it came an illegal access
    compiles = True

    def missing(self, problem: Problem) -> str | None:
        return not_installed("scattermoe")

    def build(self, problem: Problem) -> Layer:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

        s = problem.shape

        def forward(x: Tensor, scores: Tensor, w_up_gate: Tensor, w_down: Tensor) -> Tensor:
            *sorting, ends = flatten_sort_count(problem.ids, num_experts=s.experts)
            inner = parallel_linear(x, w_up_gate.permute(0, 2, 1), s.top_k, *sorting, ends, grouped_out=True)
            up, gate = inner.chunk(2, dim=-1)
            out: Tensor = parallel_linear(
                F.silu(gate) * up, w_down.permute(0, 2, 1), 1, *sorting, ends, grouped_in=True,
                gates=scores.to(x.dtype),
            )  # fmt: skip
            return out

        return Layer(forward, (problem.w_gate_up.roll(s.intermediate, 1), problem.w_down), swapped)


def swapped(d_up_gate: Tensor, d_down: Tensor) -> tuple[Tensor, Tensor]:
    """Gate rows before up rows."""
    return d_up_gate.roll(d_up_gate.shape[1] // 2, 1), d_down


class SonicMoE(Peer):
    """https://github.com/Dao-AILab/sonic-moe, with the routing given; gate and up rows alternate, its own layout."""

    name = "sonicmoe"
    about = "SonicMoE's CuTe kernels; tunes each shape for 20 s to minutes"
    devices = ("cuda",)
    usual = ()
    compiles = True

    def missing(self, problem: Problem) -> str | None:
        if problem.dtype == torch.float32:
            return "has no float32"
        return not_installed("sonicmoe", "quack")

    def build(self, problem: Problem) -> Layer:
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import moe_general_routing_inputs

        s = problem.shape
        token = torch.arange(s.slots, device=problem.device, dtype=torch.int32) // s.top_k
        ids = problem.ids.reshape(-1).int()
        alternating = problem.w_gate_up.unflatten(1, (2, s.intermediate)).transpose(1, 2).flatten(1, 2).contiguous()

        def forward(x: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            out: Tensor = moe_general_routing_inputs(
                x, scores.reshape(-1), token, ids, w_gate_up.permute(1, 2, 0), None, w_down.permute(1, 2, 0), None,
                s.experts, torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU,
                is_inference_mode_enabled=not torch.is_grad_enabled(),
            )[0]  # fmt: skip
            return out

        def concatenated(d_gate_up: Tensor, d_down: Tensor) -> tuple[Tensor, Tensor]:
            return d_gate_up.unflatten(1, (s.intermediate, 2)).transpose(1, 2).flatten(1, 2), d_down

        return Layer(forward, (alternating, problem.w_down), concatenated)


class MegaBlocks(Peer):
    """https://github.com/databricks/megablocks: its dropless MLP on grouped GEMMs, without its router."""

    name = "megablocks"
    about = "MegaBlocks' dropless MLP"
    devices = usual = ("cuda",)
    waits = True

    def missing(self, problem: Problem) -> str | None:
        if problem.dtype != torch.bfloat16:
            return "runs bfloat16 only"
        return not_installed("megablocks", "megablocks_ops", "grouped_gemm", "stk")

    def build(self, problem: Problem) -> Layer:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import ParallelDroplessMLP

        s = problem.shape
        module: Any = ParallelDroplessMLP(Arguments(
            hidden_size=s.hidden, ffn_hidden_size=s.intermediate, bias=False, return_bias=False, activation_fn=F.silu,
            moe_num_experts=s.experts, moe_top_k=s.top_k, mlp_type="glu", mlp_impl="grouped", fp16=False, bf16=True,
            device=torch.device(problem.device),
        ))  # fmt: skip
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)  # replaced by the problem's weights in each call
        once = Once(module)
        gate, up = problem.w_gate_up.chunk(2, 1)
        down = problem.w_down.transpose(1, 2)
        weights = tuple(w.reshape(-1, s.hidden) for w in (gate, up, down))

        def forward(x: Tensor, scores: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
            parameters = {"module.mlp.w1": w1, "module.mlp.v1": v1, "module.mlp.w2": w2}
            out: Tensor = torch.func.functional_call(once, parameters, (x, scores.to(x.dtype), problem.ids.int()))
            return out

        def joined(d_gate: Tensor, d_up: Tensor, d_down: Tensor) -> tuple[Tensor, Tensor]:
            gate, up, down = (d.view(s.experts, s.intermediate, s.hidden) for d in (d_gate, d_up, d_down))
            return torch.cat([gate, up], 1), down.transpose(1, 2)

        return Layer(forward, weights, joined)


class Once(torch.nn.Module):
    """MegaBlocks' `forward_once`, which takes the routing, as a module's forward."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        out: Tensor = self.module.forward_once(x, scores, ids)[0]
        return out.view_as(x)
