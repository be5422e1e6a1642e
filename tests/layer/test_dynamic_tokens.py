"""One graph for any number of tokens: every option of the layer, the functions, and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moekern as mk

H, I, E, K = 16, 8, 8, 2
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "router_bias": True},
    {"routing": "deepseek_v3", "n_group": 2, "topk_group": 1, "shared_intermediate_size": 8, "selection_bias": True},
    {"shared_intermediate_size": 2 * I, "shared_gate": True, "fuse_shared_expert": True},
    {"capacity_factor": 1.0},
    {"capacity_factor": 1.0, "drop_by": "position", "round_tokens_to": 2, "rounding": "down"},
    {"round_tokens_to": 4},
    {"round_tokens_to": 4, "rounding": "up", "capacity_factor": 2.0},
    {"routing": "llama4", "scale_input": True},
    {"router_jitter_noise": 0.1},
    {"routing": "expert_choice"},
]


def graphs(function: Callable[..., Any], *inputs: Callable[[int], Tensor]) -> int:
    """The number of graphs for eleven numbers of tokens."""
    torch.compiler.reset()
    count = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for tokens in range(40, 73, 3):
        values = [make(tokens) for make in inputs]
        for value in values:
            torch._dynamo.mark_dynamic(value, 0)
        compiled(*values)
    return count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer(options: dict[str, Any], training: bool) -> None:
    layer = mk.MoE(H, I, E, K, **options).train(training)
    assert graphs(layer, lambda tokens: torch.randn(tokens, H)) == 1


def _round(x: Tensor, logits: Tensor) -> Tensor:
    weights, ids = mk.route(logits, K)
    rounded = mk.round_tokens(logits.softmax(-1), ids, weights, 4, mode="up")
    extended, *_ = rounded.extend(x, weights)
    return rounded.fold(extended)


def _permute(x: Tensor, logits: Tensor) -> Tensor:
    weights, ids = mk.route(logits, K)
    plan = mk.plan(ids, E)
    return mk.combine(mk.permute(x, plan), plan, weights)


def _experts(x: Tensor, logits: Tensor) -> Tensor:
    weights, ids = mk.route(logits, K)
    w_gate_up, w_down = torch.ones(E, 2 * I, H), torch.ones(E, H, I)
    plan = mk.plan(ids, E)
    out = mk.experts(x, None, weights, w_gate_up, w_down, plan=plan)
    out = out + mk.experts(x, mk.limit_tokens(ids, weights, E, capacity=9), weights, w_gate_up, w_down)
    offsets = plan.offsets // K
    out = out + mk.grouped_mlp(x, offsets, w_gate_up, w_down)
    return out + mk.grouped_mm(x, torch.ones(E, H, H), offsets) + mk.grouped_mm(x, x, offsets).sum()


@pytest.mark.parametrize(
    "function",
    [_round, _permute, _experts, lambda x, logits: mk.expert_choice(logits, 5)],
    ids=["round_tokens", "permute and combine", "experts and grouped products", "expert_choice"],
)
def test_functions(function: Callable[..., Any]) -> None:
    assert graphs(function, lambda tokens: torch.randn(tokens, H), lambda tokens: torch.randn(tokens, E)) == 1


@pytest.mark.parametrize("options", [{}, {"round_tokens_to": 4}, {"capacity_factor": 1.0}], ids=str)
def test_export(options: dict[str, Any]) -> None:
    layer = mk.MoE(H, I, E, K, **options).eval()
    dim = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(layer, (torch.randn(20, H),), dynamic_shapes=({0: dim},)).module()
    for tokens in (20, 33):
        x = torch.randn(tokens, H)
        torch.testing.assert_close(program(x), layer(x))


@pytest.mark.parametrize("options", [{}, {"shared_intermediate_size": I, "routed_scaling_factor": 2.0}], ids=str)
def test_export_of_expert_choice_for_any_number_of_tokens(options: dict[str, Any]) -> None:
    """The tokens per expert are a fraction of the tokens, one among them."""
    layer = mk.MoE(H, I, E, K, routing="expert_choice", **options).eval()
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(layer, (torch.randn(20, H),), dynamic_shapes=({0: tokens},)).module()
    for count in (1, 3, 4, 5, 20, 77):
        x = torch.randn(count, H)
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=0)
