"""The adapters of libraries that need a GPU, over stand-ins that keep to those libraries' layouts and signatures.

What is tested is ours: which weights go where, and how gradients come back into our layout.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekern.bench import routing, shapes
from moekern.bench.peers import PEERS, base, llama_cpp
from moekern.bench.problem import Problem

TINY = shapes.SHAPES["tiny"]


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of this name, and its parents."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def scattermoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten_sort_count(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = ids.flatten()
        sorted_ids, slots = ids.sort(stable=True)
        return sorted_ids, slots, ids.bincount(minlength=num_experts).cumsum(0)

    def parallel_linear(
        x: Tensor, weights: Tensor, k: int, experts: Tensor, slots: Tensor, ends: Tensor,
        gates: Tensor | None = None, grouped_in: bool = False, grouped_out: bool = False,
    ) -> Tensor:  # fmt: skip
        assert int(ends[-1]) == slots.numel()
        rows = x if grouped_in else x[slots // k]
        y = torch.stack([row @ weights[e] for row, e in zip(rows, experts.tolist(), strict=True)])
        if not grouped_out:
            y = torch.zeros_like(y).index_copy(0, slots, y)
        return y if gates is None else (gates.unsqueeze(1) @ y.view(*gates.shape, -1)).squeeze(1)

    install(monkeypatch, "scattermoe.parallel_experts", flatten_sort_count=flatten_sort_count,
            parallel_linear=parallel_linear)  # fmt: skip


def sonicmoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def moe_general_routing_inputs(
        x: Tensor, scores: Tensor, tokens: Tensor, ids: Tensor, w1: Tensor, b1: None, w2: Tensor, b2: None, E: int,
        stream: int, activation: str, is_inference_mode_enabled: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert (w1.shape, w2.shape) == ((2 * TINY.intermediate, TINY.hidden, E), (TINY.hidden, TINY.intermediate, E))
        assert w1.stride().index(1) == w2.stride().index(1) == 1
        assert activation == "swiglu"
        assert is_inference_mode_enabled != torch.is_grad_enabled()
        assert bool((tokens.diff() >= 0).all())
        assert tokens.dtype == ids.dtype == torch.int32
        assert scores.dtype == torch.float32
        inner = torch.stack([w1[:, :, e] @ x[t] for t, e in zip(tokens.tolist(), ids.tolist(), strict=True)])
        rows = F.silu(inner[:, ::2]) * inner[:, 1::2]
        y = torch.stack([w2[:, :, e] @ row for row, e in zip(rows, ids.tolist(), strict=True)])
        return torch.zeros_like(x).index_add(0, tokens, y * scores.unsqueeze(1)), ids.bincount(minlength=E)

    install(monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs)
    install(monkeypatch, "sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


def megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    class GLU(nn.Module):
        def __init__(self, rows: int, hidden: int) -> None:
            super().__init__()
            self.w1, self.v1, self.w2 = (nn.Parameter(torch.full((rows, hidden), float("nan"))) for _ in range(3))

    class ParallelDroplessMLP(nn.Module):
        def __init__(self, arguments: SimpleNamespace) -> None:
            super().__init__()
            a = self.arguments = arguments
            assert (a.mlp_type, a.bias, a.moe_top_k) == ("glu", False, TINY.top_k)
            self.mlp = GLU(a.moe_num_experts * a.ffn_hidden_size, a.hidden_size)

        def forward_once(self, x: Tensor, scores: Tensor, ids: Tensor) -> tuple[Tensor, None]:
            a = self.arguments
            assert all(w.is_contiguous() for w in self.mlp.parameters())
            assert scores.dtype == x.dtype
            w1, v1, w2 = (w.view(a.moe_num_experts, a.ffn_hidden_size, -1) for w in self.mlp.parameters())
            out = torch.zeros_like(x)
            for expert in range(a.moe_num_experts):
                token, k = torch.where(ids == expert)
                rows = x[token]
                y = (a.activation_fn(rows @ w1[expert].T) * (rows @ v1[expert].T)) @ w2[expert]
                out = out.index_add(0, token, y * scores[token, k, None])
            return out, None

    install(monkeypatch, "megablocks.layers.arguments", Arguments=SimpleNamespace)
    dmoe = ModuleType("megablocks.layers.dmoe")
    vars(dmoe).update(ParallelDroplessMLP=ParallelDroplessMLP)
    monkeypatch.setitem(sys.modules, "megablocks.layers.dmoe", dmoe)


STAND_INS = {"scattermoe": scattermoe, "sonicmoe": sonicmoe, "megablocks": megablocks}


@pytest.mark.parametrize("way", ["uniform", "empty"])
@pytest.mark.parametrize("name", STAND_INS)
def test_layouts(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    STAND_INS[name](monkeypatch)
    problem = Problem(TINY, torch.float32, "cpu", way)
    layer = PEERS[name].build(problem)
    for backward in (False, True):
        error = base.results_of(layer, problem, backward).error_against(base.wanted_of(layer, problem, backward))
        assert error < 1e-5


def test_what_is_not_installed_is_named() -> None:
    problem = Problem(TINY, torch.bfloat16, "cpu")
    for name in STAND_INS:
        if (reason := PEERS[name].missing(problem)) is not None:
            assert "is not installed" in reason
    assert PEERS["sonicmoe"].missing(Problem(TINY, torch.float32, "cpu")) == "has no float32"
    assert PEERS["megablocks"].missing(Problem(TINY, torch.float32, "cpu")) == "runs bfloat16 only"


@pytest.mark.skipif(llama_cpp.folder() is None, reason="no package with ggml's libraries is installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", routing.ROUTINGS)
def test_llama_cpp(way: str, dtype: torch.dtype) -> None:
    problem = Problem(TINY, dtype, "cpu", way)
    layer = PEERS["llama.cpp"].build(problem)
    assert base.results_of(layer, problem, False).error_against(problem.reference(False)) < 5e-3


def test_llama_cpp_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "folder", lambda: None)
    reason = PEERS["llama.cpp"].missing(Problem(TINY, torch.float32, "cpu"))
    assert reason == "llama_cpp is not installed: pip install llama-cpp-python"
