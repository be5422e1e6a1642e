"""The layer calls its router and its experts as modules: hooks and wrappers act."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import moekern as mk

H, I, E, K = 32, 16, 8, 2
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "biased": {"bias": True, "router_bias": True},
    "selection bias": {"routing": "deepseek_v3", "selection_bias": True},
    "capacity": {"capacity_factor": 1.0},
    "rounding": {"round_tokens_to": 4},
    "expert choice": {"routing": "expert_choice"},
    "scaled input": {"routing": "llama4", "scale_input": True},
    "fused": {"shared_intermediate_size": I, "fuse_shared_expert": True, "shared_gate": True},
    "shared": {"shared_intermediate_size": 24, "shared_gate": True},
}


def layer(device: str = "cpu", **options: object) -> mk.MoE:
    torch.manual_seed(0)
    return mk.MoE(H, I, E, K, device=device, **options)  # type: ignore[arg-type]


def tokens(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(20, H, device=device, dtype=dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("training", [True, False])
def test_hooks_of_every_part_run_once_and_change_nothing(options: dict, training: bool, device: str) -> None:
    moe = layer(device, **options).train(training)
    x = tokens(device)
    want = moe(x)
    called: list[str] = []
    for name in ("gate", "experts", "shared_expert"):
        part = getattr(moe, name)
        if part is not None:
            part.register_forward_pre_hook(lambda module, inputs, name=name: called.append(f"before {name}"))
            part.register_forward_hook(lambda module, inputs, out, name=name: called.append(name))
    got = moe(x)
    assert torch.equal(got, want)
    assert [name for name in called if "before" not in name] == [
        name for name in ("gate", "experts", "shared_expert") if getattr(moe, name) is not None
    ]
    assert len(called) == 2 * len(set(called) & {"gate", "experts", "shared_expert"})


def test_what_a_hook_returns_counts(device: str) -> None:
    moe, x = layer(device).eval(), tokens(device)
    want = moe(x)
    handle = moe.experts.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert torch.equal(moe(x), 2 * want)
    handle.remove()
    assert torch.equal(moe(x), want)
    seen: list[Tensor] = []
    handle = moe.experts.register_full_backward_hook(lambda module, inward, outward: seen.append(outward[0]))
    moe(x).sum().backward()
    assert len(seen) == 1
    handle.remove()
    moe.experts.forward = lambda *args, **options: torch.zeros(20, H, device=device)  # as offloading replaces it
    assert not moe(x).any()


@pytest.mark.parametrize("part", ["experts", "gate"])
def test_pruned_weights_are_never_stale(part: str, device: str) -> None:
    moe, x = layer(device), tokens(device)
    module = getattr(moe, part)
    name = "gate_up_proj" if part == "experts" else "weight"
    prune.l1_unstructured(module, name, amount=0.5)
    for _ in range(2):
        moe(x).sum().backward()
    moe.eval()
    with torch.no_grad():
        before = moe(x)
        getattr(module, f"{name}_orig").mul_(-1)  # as an optimiser's step changes it
        assert not torch.equal(moe(x), before)
        if part == "experts":
            module.gate_up_proj_orig.zero_()
            assert not moe(x).any()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "parametrizations.spectral_norm"])
def test_norms_of_the_experts_weights(norm: str, device: str) -> None:
    moe, x = layer(device), tokens(device)
    function: Callable = nn.utils
    for step in norm.split("."):
        function = getattr(function, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(moe.experts, "down_proj")
    for _ in range(50):
        moe(x).sum().backward()
    if "spectral" in norm:
        sigma = torch.linalg.matrix_norm(moe.experts.down_proj.detach().flatten(1), 2).item()
        assert sigma == pytest.approx(1, abs=0.01)


def test_a_parametrization_is_seen(device: str) -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    moe, x = layer(device).eval(), tokens(device)
    want = 2 * moe(x)
    parametrize.register_parametrization(moe.experts, "down_proj", Twice())
    assert torch.allclose(moe(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_accelerate_offloads(kind: str, options: dict, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    moe, x = layer(**options).eval(), tokens()
    want = moe(x)
    with torch.no_grad():
        if kind == "cpu":
            accelerate.cpu_offload(moe, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(moe, str(tmp_path), execution_device=torch.device("cpu"))
        for _ in range(2):
            assert torch.equal(moe(x), want)


class Block(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.mlp = layer(**options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("target", ["experts.gate_up_proj", "experts.down_proj", "gate.weight"])
@pytest.mark.parametrize("options", [{}, OPTIONS["selection bias"], OPTIONS["expert choice"]], ids=str)
def test_lora_on_every_matrix(target: str, options: dict) -> None:
    peft = pytest.importorskip("peft")
    base = Block(**options)
    plain, x = copy.deepcopy(base), tokens()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[f"mlp.{target}"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    y = model(x)
    y.square().mean().backward()
    assert (y - plain(x)).abs().max() > 1e-4
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    if options.get("selection_bias"):
        mk.update_selection_bias(model, 0.125)
        assert plain.mlp.gate.e_score_correction_bias.shape == (E,)


@pytest.mark.parametrize("router", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_router_of_another_dtype(dtype: torch.dtype, router: torch.dtype, training: bool, device: str) -> None:
    """A float32 router in a half-precision layer, as in recipes: float32 logits, the output in the dtype of x."""
    moe = layer(device, dtype=dtype).train(training)
    moe.gate.to(router)
    x = tokens(device, dtype)
    y = moe(x)
    assert y.dtype == dtype
    logits = moe.gate(x)
    assert logits.dtype == (torch.float64 if router == torch.float64 else torch.float32)
    weights, ids = mk.route(logits, K)
    assert torch.equal(y, mk.experts(x, ids, weights, moe.experts.gate_up_proj, moe.experts.down_proj))
    with pytest.raises(TypeError, match=r"x: got dtype torch\.float64"):
        moe(x.double())
