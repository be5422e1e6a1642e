"""What the helpers of the layer may read of it: its parts and options, without its methods."""

from __future__ import annotations

from torch import nn

from moekern.layer.parameters import Experts, Router, SharedExpert


class LayerAttributes(nn.Module):
    """The base of :class:`moekern.MoE`; see there."""

    gate: Router
    experts: Experts
    shared_expert: SharedExpert | None
    shared_expert_gate: nn.Linear | None
    num_fused_experts: int
    num_apart_experts: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str
    routing: str
    norm_topk_prob: bool
    n_group: int
    topk_group: int | None
    routed_scaling_factor: float
    router_jitter_noise: float
    scale_input: bool
    capacity_factor: float | None
    drop_by: str
    round_tokens_to: int
    rounding: str
