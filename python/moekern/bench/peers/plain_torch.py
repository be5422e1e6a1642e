"""Peers from torch and transformers: a dense MLP, a loop over experts, torch's grouped matmul."""

from __future__ import annotations

import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekern.bench.peers.base import Layer, Peer
from moekern.bench.problem import Problem, Results
from moekern.report import machine

GROUPED_MM: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class Dense(Peer):
    """The MLP that the experts replace: SwiGLU with K I features, as many FLOPs per token as the active experts."""

    name = "dense"
    about = "a dense MLP of equal active FLOPs, which computes another function"

    def build(self, problem: Problem) -> Layer:
        s = problem.shape
        gate, up = problem.w_gate_up[: s.top_k].chunk(2, 1)
        w_gate_up = torch.cat([gate.reshape(-1, s.hidden), up.reshape(-1, s.hidden)])
        w_down = problem.w_down[: s.top_k].permute(1, 0, 2).reshape(s.hidden, -1)

        def forward(x: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            gate, up = F.linear(x, w_gate_up).chunk(2, -1)
            # A dense MLP has no use for the router's weights; they take part so that a gradient exists.
            return F.linear(F.silu(gate) * up, w_down) + 0 * scores[:, :1].to(x.dtype)

        def reference(backward: bool) -> Results:
            tensors = (problem.x, problem.scores, w_gate_up, w_down)
            leaves = tuple(t.float().detach().requires_grad_(backward) for t in tensors)
            out = forward(*leaves)
            gradients = torch.autograd.grad(out, leaves, problem.dout.float()) if backward else ()
            return Results(out.detach(), gradients)

        return Layer(forward, (w_gate_up, w_down), reference=reference)


class Loop(Peer):
    """The experts of transformers' Qwen3-MoE, as that library runs them unless told otherwise."""

    name = "transformers"
    about = "transformers' eager loop over the experts"
    waits = True

    def missing(self, problem: Problem) -> str | None:
        return (
            None if machine.is_importable("transformers") else "transformers is not installed: pip install transformers"
        )

    def build(self, problem: Problem) -> Layer:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        s = problem.shape
        config = Qwen3MoeConfig(
            hidden_size=s.hidden, moe_intermediate_size=s.intermediate, num_experts=s.experts,
            num_experts_per_tok=s.top_k,
        )  # fmt: skip
        config._experts_implementation = "eager"
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)

        def forward(x: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            weights = {"gate_up_proj": w_gate_up, "down_proj": w_down}
            out: Tensor = torch.func.functional_call(module, weights, (x, problem.ids, scores))
            return out

        return Layer(forward, (problem.w_gate_up, problem.w_down))


def grouped(x: Tensor, ids: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The experts by torch's grouped matmul over sorted rows; the host never waits for the device."""
    top_k, experts = ids.shape[1], w_down.shape[0]
    sorted_ids, order = ids.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=ids.device), right=True).int()
    token = order // top_k
    gate, up = GROUPED_MM(x[token], w_gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    y = GROUPED_MM(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    y = y * scores.reshape(-1)[order, None].to(y.dtype)
    # Each slot's row returns to its place; a sum over them repeats bit for bit, unlike an atomic index_add.
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return y[inverse].view(-1, top_k, x.shape[1]).sum(1)


class Grouped(Peer):
    """torch.nn.functional.grouped_mm around a sort and a gather."""

    name = "grouped_mm"
    about = "torch's grouped_mm, eager"

    def missing(self, problem: Problem) -> str | None:
        return None if GROUPED_MM else f"torch {torch.__version__} has no grouped_mm"

    def build(self, problem: Problem) -> Layer:
        def forward(x: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            return grouped(x, problem.ids, scores, w_gate_up, w_down)

        return Layer(forward, (problem.w_gate_up, problem.w_down))


class GroupedCompiled(Grouped):
    """The same through torch.compile."""

    name = "grouped_mm-compiled"
    about = "torch's grouped_mm through torch.compile"
    usual = ("cuda",)
    compiles = True

    def missing(self, problem: Problem) -> str | None:
        if problem.device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile needs a C++ compiler"
        return super().missing(problem)

    def build(self, problem: Problem) -> Layer:
        # One compilation serves all later shapes of the process, from the second shape on at the latest.
        compiled = _compiled()

        def forward(x: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            out: Tensor = compiled(x, problem.ids, scores, w_gate_up, w_down)
            return out

        return Layer(forward, (problem.w_gate_up, problem.w_down))


_compilations: list[Any] = []


def _compiled() -> Any:
    if not _compilations:
        # Each dtype, each pass and a single token are compiled separately; past the limit torch runs eagerly.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        _compilations.append(torch.compile(grouped))
    return _compilations[0]
