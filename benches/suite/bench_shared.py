"""A shared expert, separate ("beside") or fused: further experts that every token chooses.

A gated MLP of n times the routed width is the sum of n experts, so it can be fused if its width is a multiple of
theirs. State dicts keep its three matrices apart from those of the routed experts: either they are joined at every
pass, or the parameters are the joined matrices. Both are timed, and also the dense MLP through moekern's kernels, and
the layer with a separate and with a fused shared expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import moekern as mk

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Shape(NamedTuple):
    """Half the sizes of a model, so that a benchmark fits a CPU; the shared width is ``shared * inter``."""

    tokens: int
    hidden: int
    inter: int
    experts: int
    top_k: int
    shared: int

    def on_a_gpu(self) -> Shape:
        """The sizes of the model, with more tokens unless one token is measured."""
        tokens = self.tokens if self.tokens == 1 else 32 * self.tokens
        return self._replace(tokens=tokens, hidden=2 * self.hidden, inter=2 * self.inter)


SHAPES = {
    "Qwen2-MoE": Shape(256, 1024, 704, 60, 4, 4),
    "DeepSeek-V2-Lite": Shape(256, 1024, 704, 64, 6, 2),
    "DeepSeek-V3": Shape(256, 1024, 512, 64, 8, 1),
    "few experts": Shape(1024, 512, 512, 8, 2, 1),
    "DeepSeek-V3, one token": Shape(1, 1024, 512, 64, 8, 1),
}


class Problem:
    """Weights of the routed experts and of the shared one, apart as a state dict has them, and joined."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, train: bool) -> None:
        torch.manual_seed(0)
        tokens, H, I, E, K, n = shape

        def leaf(*sizes: int) -> Tensor:
            t = torch.randn(sizes, device=device) / sizes[-1] ** 0.5
            return t.to(dtype).requires_grad_(train)

        self.shape, self.train = shape, train
        self.x = leaf(tokens, H)
        self.w_gate_up, self.w_down = leaf(E, 2 * I, H), leaf(E, H, I)
        self.gate, self.up, self.down = leaf(n * I, H), leaf(n * I, H), leaf(H, n * I)
        self.joint = tuple(t.detach().requires_grad_(train) for t in self.join())
        self.weights, self.ids = mk.route(torch.randn(tokens, E, device=device), K)
        self.dout = torch.randn_like(self.x)
        shared = torch.arange(E, E + n, device=device).expand(tokens, n)
        self.all_ids = torch.cat((self.ids, shared), 1)
        self.all_weights = torch.cat((self.weights, self.weights.new_ones(tokens, n)), 1)
        self.first = torch.zeros(tokens, 1, dtype=torch.int64, device=device)

    def join(self) -> tuple[Tensor, Tensor]:
        n = self.shape.shared
        gate_up = torch.cat((self.gate.unflatten(0, (n, -1)), self.up.unflatten(0, (n, -1))), 1)
        down = self.down.unflatten(1, (n, -1)).transpose(0, 1)
        return torch.cat((self.w_gate_up, gate_up)), torch.cat((self.w_down, down))

    def beside(self) -> Tensor:
        linear = torch.nn.functional.linear
        shared = linear(torch.nn.functional.silu(linear(self.x, self.gate)) * linear(self.x, self.up), self.down)
        return mk.experts(self.x, self.ids, self.weights, self.w_gate_up, self.w_down) + shared

    def beside_in_kernels(self) -> Tensor:
        gate_up = torch.cat((self.gate, self.up)).unsqueeze(0)
        shared = mk.experts(self.x, self.first, None, gate_up, self.down.unsqueeze(0))
        return mk.experts(self.x, self.ids, self.weights, self.w_gate_up, self.w_down) + shared

    def fused(self) -> Tensor:
        return mk.experts(self.x, self.all_ids, self.all_weights, *self.joint)

    def fused_joined(self) -> Tensor:
        return mk.experts(self.x, self.all_ids, self.all_weights, *self.join())

    def step(self, way: Callable[[Problem], Tensor]) -> Tensor:
        out = way(self)
        if self.train:
            joint = way is Problem.fused
            shared = () if joint else (self.gate, self.up, self.down)
            torch.autograd.grad(
                out, (self.x, *(self.joint if joint else (self.w_gate_up, self.w_down)), *shared), self.dout
            )
        return out.detach()


WAYS = {
    "beside": Problem.beside,
    "beside, moekern's kernels": Problem.beside_in_kernels,
    "fused, weights kept joined": Problem.fused,
    "fused, joined at every pass": Problem.fused_joined,
}


def sizes_for(benchmark: Any, shape: str, device: str) -> Shape:
    sizes = SHAPES[shape]
    if benchmark.disabled:  # run once by the tests
        return Shape(min(sizes.tokens, 9), 64, 32, 10, sizes.top_k, sizes.shared)
    return sizes.on_a_gpu() if device == "cuda" else sizes


@pytest.mark.benchmark(group="shared expert")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def bench_shared(benchmark: Any, way: str, shape: str, dtype: str, train: bool, device: str) -> None:
    problem = Problem(sizes_for(benchmark, shape, device), getattr(torch, dtype), device, train)

    def run() -> Tensor:
        out = problem.step(WAYS[way])
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    expected = problem.step(Problem.beside)
    assert torch.allclose(benchmark(run).float(), expected.float(), atol=0.05, rtol=0.05)


@pytest.mark.benchmark(group="layer with a shared expert")
@pytest.mark.parametrize(
    "fused", [False, True], ids=["beside", "fused"]
)  # the first varies fastest, so that the ways follow each other in time
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_layer(benchmark: Any, fused: bool, shape: str, dtype: str, train: bool, device: str) -> None:
    tokens, H, I, E, K, n = sizes_for(benchmark, shape, device)
    torch.manual_seed(0)
    made = {
        way: mk.MoE(
            H, I, E, K, shared_intermediate_size=n * I, shared_gate=shape == "Qwen2-MoE", fuse_shared_expert=way,
            device=device, dtype=getattr(torch, dtype),
        ).train(train)
        for way in (False, True)
    }  # fmt: skip
    made[True].load_state_dict(made[False].state_dict())
    layer, x = made[fused], torch.randn(tokens, H, device=device).to(getattr(torch, dtype)).requires_grad_(train)
    dout = torch.randn_like(x)

    def run() -> Tensor:
        with torch.set_grad_enabled(train):
            out = layer(x)
            if train:
                torch.autograd.grad(out, (x, *layer.parameters()), dout)
        if device == "cuda":
            torch.cuda.synchronize()
        return out.detach()

    expected = made[False](x).detach().float()
    assert torch.allclose(benchmark(run).float(), expected, atol=0.05, rtol=0.05)
