"""A layer's options: one frozen object that checks itself, is read and set as attributes, and refuses what is new."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from inspect import Parameter, signature
from typing import Any

import pytest
import torch

import moekern as mk
from moekern.layer.attributes import LayerAttributes
from moekern.layer.options import DEFAULTS, Options

H, I, E, K = 32, 16, 6, 2


def test_the_layer_takes_every_option() -> None:
    """And no other argument but device and dtype, with the same defaults."""
    arguments = dict(signature(mk.MoE).parameters)
    assert [arguments.pop(name).default for name in ("device", "dtype")] == [None, None]
    given = {name: None if p.default is Parameter.empty else p.default for name, p in arguments.items()}
    wanted = {name: DEFAULTS[name] if name not in ("hidden_size", "intermediate_size", "num_experts", "top_k") else None
              for name in DEFAULTS}  # fmt: skip
    assert given == wanted


def test_each_option_arrives() -> None:
    changed: dict[str, Any] = {
        "activation": "reglu", "router_bias": True, "routing": "deepseek_v3", "norm_topk_prob": False, "n_group": 3,
        "topk_group": 2, "routed_scaling_factor": 2.5, "selection_bias": True, "router_jitter_noise": 0.1,
        "capacity_factor": 1.5, "drop_by": "position", "round_tokens_to": 4, "rounding": "down",
        "shared_intermediate_size": 2 * I, "shared_gate": True, "fuse_shared_expert": True,
    }  # fmt: skip
    for more in (changed, {"bias": True, "scale_input": True}):
        options = mk.MoE(H, I, E, K, **more).options
        assert options == Options(H, I, E, K, **more)
        assert all(getattr(options, name) == value != DEFAULTS[name] for name, value in more.items())
    assert {*changed, "bias", "scale_input", "hidden_size", "intermediate_size", "num_experts", "top_k"} == {*DEFAULTS}


@pytest.mark.parametrize("name", [name for name in vars(LayerAttributes) if name in DEFAULTS])
def test_attributes_are_read_and_set(name: str) -> None:
    layer = mk.MoE(H, I, E, K, n_group=2)
    values = {
        "hidden_size": 64, "intermediate_size": 8, "num_experts": 4, "top_k": 3, "activation": "geglu",
        "routing": "olmoe", "norm_topk_prob": False, "n_group": 3, "topk_group": 1, "routed_scaling_factor": 0.5,
        "router_jitter_noise": 0.5, "scale_input": True, "capacity_factor": 2.0, "drop_by": "position",
        "round_tokens_to": 1, "rounding": "down",
    }  # fmt: skip
    before = layer.options
    setattr(layer, name, values[name])
    assert getattr(layer, name) == getattr(layer.options, name) == values[name]
    assert layer.options == replace(before, **{name: values[name]})
    with pytest.raises((TypeError, ValueError), match=f"{name}: got"):
        setattr(layer, name, [])
    assert getattr(layer, name) == values[name]
    with pytest.raises(FrozenInstanceError):
        setattr(layer.options, name, values[name])


def test_what_is_set_anew_counts() -> None:
    layer, x = mk.MoE(H, I, E, K).eval(), torch.randn(9, H)
    for name, value in {"top_k": 3, "routing": "sigmoid_topk", "routed_scaling_factor": 2.0}.items():
        before = layer(x)
        setattr(layer, name, value)
        other = mk.MoE(H, I, E, **{"top_k": K, **{n: getattr(layer, n) for n in ("top_k", "routing")}},
                       routed_scaling_factor=layer.routed_scaling_factor).eval()  # fmt: skip
        other.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), other(x))
        assert not torch.equal(layer(x), before)


def test_a_capacity_set_anew_needs_no_symbol() -> None:
    """Compiled code has the capacity as integers: a second factor makes a second graph with its exact capacity."""
    layer, x = mk.MoE(H, I, 2, 1, router_bias=True).eval(), torch.randn(100, H)
    with torch.no_grad():
        layer.gate.bias[1] = 1e4
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for factor, kept in ((1.1, 55), (1.3, 65), (0.5, 25), (None, 100)):
            layer.capacity_factor = factor
            assert (compiled(x) != 0).any(1).sum() == kept == (layer(x) != 0).any(1).sum()


def test_an_option_that_nobody_serves_is_refused() -> None:
    """A program names what it reads, so an option that is new to it leaves no key."""

    @dataclass(frozen=True)
    class More(Options):
        sparkle: int = 0

    for changed in (None, *(e.name for e in fields(Options) if e.init and e.type == "bool")):
        options = Options(H, I, E, K, **({changed: not DEFAULTS[changed]} if changed else {}), **(
            {"shared_intermediate_size": I} if changed in ("shared_gate", "fuse_shared_expert") else {}))  # fmt: skip
        served = changed in (None, "bias", "router_bias", "norm_topk_prob")
        assert (options.inference_key is not None) == (options.training_key is not None) == served, changed
    assert Options(H, I, E, K, routing="expert_choice").inference_key is None
    assert Options(H, I, E, K, n_group=3, topk_group=2).inference_key is None
    assert Options(H, I, E, K, n_group=3, topk_group=3).inference_key is not None
    for name, value in (("router_jitter_noise", 0.1), ("round_tokens_to", 2)):
        options = Options(H, I, E, K, **{name: value})  # type: ignore[arg-type]
        assert options.inference_key is not None
        assert options.training_key is None
    assert More(H, I, E, K).inference_key is not None
    assert More(H, I, E, K, sparkle=1).inference_key is None


def test_copies() -> None:
    options = Options(H, I, E, K, capacity_factor=1.1)
    assert options.capacity_ratio == (11, 10)
    for other in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert other == options
        assert hash(other) == hash(options)
        assert other.capacity_ratio == (11, 10)
