"""The selection bias of layers made, loaded, wrapped and recomputed in every way: tokens are counted once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moekern as mk

BIASED: dict[str, object] = {"routing": "deepseek_v3", "selection_bias": True}


def step_of(layer: mk.MoE) -> Tensor:
    """The change of the bias by one training pass and one update, in steps."""
    before = layer.gate.e_score_correction_bias.clone()
    layer.train()
    layer(torch.randn(64, 32, dtype=layer.gate.weight.dtype, device=layer.gate.weight.device)).sum().backward()
    counts = layer.gate.tokens_since_update.clone()
    assert int(counts.sum()) == 64 * 2
    mk.update_selection_bias(layer, 0.125)
    moved = layer.gate.e_score_correction_bias - before
    assert torch.equal(moved, 0.125 * torch.sign(counts.float().mean() - counts.float()))
    return moved / 0.125


@pytest.mark.parametrize(
    "way", ["assign", "assign and move", "to_empty", "meta and to_empty twice", "pickle", "double"]
)
def test_counts_follow_a_layer_however_it_was_made(way: str, device: str) -> None:
    source = mk.MoE(32, 16, 8, 2, device=device, **BIASED)
    with torch.device("meta"):
        layer = mk.MoE(32, 16, 8, 2, **BIASED)
    if way.startswith("assign"):
        layer.load_state_dict(source.state_dict(), assign=True)
        layer = layer.to(device) if way == "assign and move" else layer
    elif way.endswith(("to_empty", "twice")):
        for _ in range(2 if way.endswith("twice") else 1):
            layer.to_empty(device=device)
        layer.load_state_dict(source.state_dict())
    elif way == "pickle":
        layer = pickle.loads(pickle.dumps(source))
    else:
        layer = copy.deepcopy(source).double().float()
    assert not layer.gate.tokens_since_update.any()
    assert layer.gate.tokens_since_update.device == layer.gate.weight.device
    assert step_of(layer).abs().max() == 1


def test_to_empty_keeps_what_was_counted(device: str) -> None:
    layer = mk.MoE(32, 16, 8, 2, device=device, **BIASED)
    layer(torch.randn(5, 32, device=device))
    counts = layer.gate.tokens_since_update.clone()
    layer.to_empty(device=device)
    assert torch.equal(layer.gate.tokens_since_update, counts)


@pytest.mark.parametrize("assign", [True, False])
def test_the_bias_stays_wide_whatever_is_loaded(assign: bool, device: str) -> None:
    options = {**BIASED, "dtype": torch.bfloat16, "device": device}
    state = {name: t.bfloat16() for name, t in mk.MoE(32, 16, 8, 2, **options).state_dict().items()}
    state["gate.e_score_correction_bias"] += 1
    layer = mk.MoE(32, 16, 8, 2, **options)
    layer.load_state_dict(state, assign=assign)
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    layer.gate.e_score_correction_bias = layer.gate.e_score_correction_bias.bfloat16()  # as a loader may do
    layer(torch.randn(40, 32, device=device).bfloat16())
    mk.update_selection_bias(layer, 0.001)
    bias = layer.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert (bias - 1).abs().max().item() == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_recomputation_is_counted_once(compiled: bool, reentrant: bool, device: str) -> None:
    torch._dynamo.reset()
    layer = mk.MoE(32, 16, 8, 2, device=device, **BIASED)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    for passes in (1, 2):
        x = torch.randn(20, 32, device=device, requires_grad=True)
        checkpoint(call, x, use_reentrant=reentrant).sum().backward()
        assert int(layer.gate.tokens_since_update.sum()) == passes * 40
    call(torch.randn(20, 32, device=device)).sum().backward()
    assert int(layer.gate.tokens_since_update.sum()) == 3 * 40


class Wrapper:
    """A wrapper of an optimiser, as engines have them, which is no torch optimiser itself."""

    def __init__(self, optimizer: object):
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("depth", [1, 2])
def test_the_hook_finds_the_optimiser_in_a_wrapper(depth: int, device: str) -> None:
    layer = mk.MoE(32, 16, 8, 2, device=device, **BIASED)
    wrapped: object = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(depth):
        wrapped = Wrapper(wrapped)
    handle = mk.bias_update_hook(wrapped, layer, rate=0.125)
    layer(torch.randn(50, 32, device=device)).sum().backward()
    wrapped.step()
    assert layer.gate.e_score_correction_bias.abs().max() == 0.125
    handle.remove()
    with pytest.raises(TypeError, match="optimizer: got Wrapper"):
        mk.bias_update_hook(Wrapper(None), layer)


def test_the_hook_takes_accelerates_optimiser() -> None:
    accelerate = pytest.importorskip("accelerate")
    layer = mk.MoE(32, 16, 8, 2, **BIASED)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    mk.bias_update_hook(optimizer, layer, rate=0.125)
    accelerator.backward(model(torch.randn(50, 32)).sum())
    optimizer.step()
    assert layer.gate.e_score_correction_bias.abs().max() == 0.125


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_jitter_has_mean_one_in_every_dtype(dtype: torch.dtype, device: str) -> None:
    layer = mk.MoE(32, 16, 8, 2, router_jitter_noise=0.01, dtype=dtype, device=device)
    seen: list[Tensor] = []
    layer.gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(torch.ones(4000, 32, dtype=dtype, device=device))
    assert seen[0].dtype == dtype
    assert abs(seen[0].double().mean().item() - 1) < 2e-4
    assert (seen[0].double() - 1).abs().max() <= 0.01 + torch.finfo(dtype).eps
