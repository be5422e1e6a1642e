"""The attributes of the layer that its helpers may read: its parts and options, without its methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moekern.layer.options import Options
from moekern.layer.parameters import Experts, Router, SharedExpert


def _option(name: str) -> Any:
    """An option as an attribute of the layer. Setting it checks all options, as the constructor does."""

    def read(layer: LayerAttributes) -> Any:
        return getattr(layer.options, name)

    def write(layer: LayerAttributes, value: Any) -> None:
        layer.options = replace(layer.options, **{name: value})

    return property(read, write, doc=f"The option `{name}`, which can be set.")


class LayerAttributes(nn.Module):
    """The base of :class:`moekern.MoE`; see there."""

    options: Options
    gate: Router
    experts: Experts
    shared_expert: SharedExpert | None
    shared_expert_gate: nn.Linear | None
    num_fused_experts: int
    num_apart_experts: int  # parts to be fused again when the layer has its values: see fused_shared.py
    _latest_routing: Any
    _token_mask: Tensor | None

    hidden_size: int = _option("hidden_size")
    intermediate_size: int = _option("intermediate_size")
    num_experts: int = _option("num_experts")
    top_k: int = _option("top_k")
    activation: str = _option("activation")
    routing: str = _option("routing")
    norm_topk_prob: bool = _option("norm_topk_prob")
    n_group: int = _option("n_group")
    topk_group: int | None = _option("topk_group")
    routed_scaling_factor: float = _option("routed_scaling_factor")
    router_jitter_noise: float = _option("router_jitter_noise")
    scale_input: bool = _option("scale_input")
    capacity_factor: float | None = _option("capacity_factor")
    drop_by: str = _option("drop_by")
    round_tokens_to: int = _option("round_tokens_to")
    rounding: str = _option("rounding")
