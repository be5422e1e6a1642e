"""torchtitan's own GroupedExperts and the override that computes them with moekern."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchtitan", reason="torchtitan is not installed")

from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

import moekern as mk
from moekern.torchtitan import MoekernGroupedExperts, grouped_experts
from problems import error, forbid_torch_path

H, I, E, K = 64, 48, 6, 2


def routed_experts() -> Any:
    """torchtitan's configuration of dispatcher and experts."""
    initialise = partial(nn.init.normal_, std=0.2)
    return RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(
            dim=H, hidden_dim=I, num_experts=E,
            param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), initialise),
        ),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=K),
    )  # fmt: skip


def both(device: str) -> tuple[nn.Module, nn.Module]:
    """The original module, and the overridden one with its weights."""
    configuration = routed_experts()
    stock = configuration.build()
    told = apply_overrides(OverrideConfig(imports=["moekern.torchtitan.grouped_experts"]), configuration)
    assert len(told) == 1
    assert "MoekernGroupedExperts" in told[0]
    ours = configuration.build()
    for module in (stock, ours):
        module.init_states()
    assert ours.inner_experts.w13.abs().sum() > 0  # initialised by the original's initialisers
    state = stock.state_dict()
    assert {name: w.shape for name, w in ours.state_dict().items()} == {name: w.shape for name, w in state.items()}
    ours.load_state_dict(state)
    return stock.to(device), ours.to(device)


def gradients(module: nn.Module, out: torch.Tensor, x: torch.Tensor, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {"x": x, **dict(module.named_parameters())}
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))
    named = {name.rpartition(".")[2]: g for name, g in found.items()}
    if "w13" in named:
        named["w1_EFD"], named["w3_EFD"] = named.pop("w13").unbind(2)
    return {"out": out.detach(), **named}


def check_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert error(value, theirs[name]) < 2**-6, name  # torchtitan rounds between its products to bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert without tokens, and rows past the last one's."""
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        forbid_torch_path(monkeypatch)
    stock, ours = (module.inner_experts for module in both(device))
    counts = torch.tensor([5, 0, 17, 8, 1, 9], device=device)
    x = torch.randn(48, H, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn_like(x)
    dout[40:] = 0
    results = [gradients(module, module(x, counts), x, dout) for module in (ours, stock)]
    assert not results[0]["out"][40:].any()
    for result in results:
        result["out"], result["x"] = result["out"][:40], result["x"][:40]  # torchtitan leaves the others as they are
    check_same(*results)


def test_dispatcher_and_experts(device: str) -> None:
    stock, ours = both(device)
    x = torch.randn(2, 10, H, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights, ids = mk.route(torch.randn(2, 10, E, device=device), K)
    ids = ids.contiguous()  # torchtitan takes a view of it
    counts = mk.plan(ids.reshape(-1, K), E).counts
    dout = torch.randn_like(x)
    check_same(*(gradients(module, module(x, weights, ids, counts), x, dout) for module in (ours, stock)))


def test_other_experts_are_left_alone() -> None:
    gpt_oss = pytest.importorskip("torchtitan.models.gpt_oss.moe", reason="needs torchtitan's gpt-oss")
    configuration = routed_experts()
    configuration.inner_experts = gpt_oss.GptOssGroupedExperts.Config(dim=H, hidden_dim=I, num_experts=E)
    assert not apply_overrides(OverrideConfig(imports=["moekern.torchtitan.grouped_experts"]), configuration)


@dataclass(kw_only=True, slots=True)
class WithActivation(GroupedExperts.Config):
    """Like a release whose configuration names the activation."""

    activation_fn: Any = nn.functional.silu


def test_only_swiglu() -> None:
    sizes = {"dim": H, "hidden_dim": I, "num_experts": E}
    assert isinstance(grouped_experts(WithActivation(**sizes)), MoekernGroupedExperts.Config)
    for activation, name in ((nn.functional.gelu, "gelu"), (None, "None"), ("relu", "relu")):
        with pytest.raises(ValueError, match=f"activation_fn: got {name}, .*SwiGLU"):
            grouped_experts(WithActivation(**sizes, activation_fn=activation))
