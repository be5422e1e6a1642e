"""Shared experts, jitter and the other routing options of mk.MoE, beside the blocks of transformers that have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moekern as mk
from problems import error

H, I, S, E, K = 32, 16, 24, 8, 3


def block_of(modeling: Any, block: str, config: str, **options: Any) -> nn.Module:
    """A random block of transformers that computes its experts eagerly."""
    made = getattr(modeling, config)(hidden_size=H, num_experts_per_tok=K, **options)
    made._experts_implementation = "eager"  # a block without a model around it has none in transformers 5.0
    return randomised(getattr(modeling, block)(made))


def randomised(block: nn.Module) -> nn.Module:
    for tensor in (*block.parameters(), *block.buffers()):
        nn.init.normal_(tensor, std=0.2)
    return block


def check_same(device: str, ours: nn.Module, theirs: nn.Module, rename: dict[str, str]) -> None:
    """Output, gradient of the input and of every parameter."""
    x = torch.randn(2, 7, H, device=device)
    dout = torch.randn_like(x)
    results = []
    for module in (ours.to(device), theirs.to(device)):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.backward(dout)
        results.append({"out": out, "x": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}})
    theirs_by_name = {rename_key(name, rename): value for name, value in results[1].items()}
    assert results[0].keys() == theirs_by_name.keys()
    for name, value in results[0].items():
        assert error(value, theirs_by_name[name]) < 1e-5, name


def rename_key(name: str, rename: dict[str, str]) -> str:
    for old, new in rename.items():
        name = name.replace(old, new)
    return name


def test_block_of_qwen2_moe(device: str) -> None:
    modeling = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe", reason="needs transformers")
    block = block_of(
        modeling, "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", moe_intermediate_size=I,
        shared_expert_intermediate_size=S, num_experts=E, norm_topk_prob=False,
    )  # fmt: skip
    moe = mk.MoE(H, I, E, K, norm_topk_prob=False, shared_intermediate_size=S, shared_gate=True)
    moe.load_state_dict(block.state_dict())
    check_same(device, moe, block, {})


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_block_of_deepseek_v3(device: str, family: str) -> None:
    name = {"deepseek_v3": "DeepseekV3", "glm4_moe": "Glm4Moe"}[family]
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}", reason="needs transformers")
    block = block_of(
        modeling, f"{name}MoE" if hasattr(modeling, f"{name}MoE") else f"{name}SparseMoeBlock", f"{name}Config",
        moe_intermediate_size=I, n_routed_experts=E, n_group=4, topk_group=2, n_shared_experts=2,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    moe = mk.MoE(
        H, I, E, K, routing=family, n_group=4, topk_group=2, routed_scaling_factor=2.5, selection_bias=True,
        shared_intermediate_size=2 * I,
    )  # fmt: skip
    rename = {"shared_experts.": "shared_expert."}
    moe.load_state_dict({rename_key(k, rename): v for k, v in block.state_dict().items()})
    check_same(device, moe, block, rename)


def test_jitter_of_mixtral(device: str) -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="needs transformers")
    block = block_of(
        modeling, "MixtralSparseMoeBlock", "MixtralConfig", intermediate_size=I, num_local_experts=E,
        router_jitter_noise=0.2,
    ).to(device)  # fmt: skip
    moe = mk.MoE(H, I, E, K, router_jitter_noise=0.2).to(device)
    moe.load_state_dict(block.state_dict())
    x = torch.randn(2, 7, H, device=device)
    outputs = []
    for module in (moe, block):
        torch.manual_seed(5)
        outputs.append(module(x.clone()))  # transformers jitters its input in place
    assert error(outputs[0], outputs[1]) < 1e-6
    assert error(moe(x), outputs[0]) > 1e-3
    assert torch.equal(moe.eval()(x), moe(x))


def test_scaled_input_is_llama4s(place: tuple[str, torch.dtype]) -> None:
    """The sum over experts of each one applied to the weighted token."""
    device, dtype = place
    small = 1e-6 if dtype == torch.float32 else 2**-7
    for top_k in (1, 2):
        moe = mk.MoE(H, I, E, top_k, routing="llama4", scale_input=True).to(device, dtype)
        x = torch.randn(9, H, device=device, dtype=dtype, requires_grad=True)
        weights, ids = mk.route(moe.gate(x), top_k, method="llama4")
        expected = torch.zeros_like(x)
        for k in range(top_k):
            scaled = x * weights[:, k : k + 1].to(dtype)
            expected = expected + mk.experts(scaled, ids[:, k : k + 1], None, *moe.experts.projections)
        assert error(moe(x), expected) < small
        leaves = (x, *moe.parameters())
        dout = torch.randn_like(x)
        ours = torch.autograd.grad(moe(x), leaves, dout)
        for value, wanted in zip(ours, torch.autograd.grad(expected, leaves, dout), strict=True):
            assert error(value, wanted) < 10 * small


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_names_and_copies_of_a_shared_expert(place: tuple[str, torch.dtype], activation: str) -> None:
    device, dtype = place
    moe = mk.MoE(H, I, E, K, activation=activation, shared_intermediate_size=S, shared_gate=True).to(device, dtype)
    gate = {"shared_expert.gate_proj.weight"} if activation == "swiglu" else set()
    assert set(moe.state_dict()) == gate | {
        "gate.weight", "experts.gate_up_proj", "experts.down_proj", "shared_expert.up_proj.weight",
        "shared_expert.down_proj.weight", "shared_expert_gate.weight",
    }  # fmt: skip
    x = torch.randn(5, H, device=device, dtype=dtype)
    routed = mk.MoE(H, I, E, K, activation=activation).to(device, dtype)
    routed.load_state_dict(moe.state_dict(), strict=False)
    shared = torch.sigmoid(moe.shared_expert_gate(x)) * moe.shared_expert(x)
    assert torch.equal(moe(x), routed(x) + shared)
    before = moe(x)
    moe.reset_parameters()
    assert not torch.equal(moe(x), before)


def test_logits_are_float32_under_autocast_and_in_half_precision(device: str) -> None:
    moe = mk.MoE(H, I, E, K).to(device)
    x = torch.randn(50, H, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = moe.gate(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, moe.gate(x))
    half = mk.MoE(H, I, E, K, router_bias=True, dtype=torch.bfloat16, device=device)
    rows = x.to(torch.bfloat16)
    exact = rows.double() @ half.gate.weight.double().T + half.gate.bias.double()
    assert error(half.gate(rows), exact) < 1e-5
    half(rows).sum().backward()
    assert half.gate.weight.grad.dtype == torch.bfloat16
