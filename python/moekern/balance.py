"""Keeping the experts evenly used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekern import checks
from moekern.layer import MoE


def load_balancing_loss(logits: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """The auxiliary loss of Switch Transformer (Fedus et al. 2021, equations 4 to 6), scaled as transformers does.

    ``E * sum_e f_e * P_e`` with ``f_e`` the share of tokens that chose expert e (these sum to top_k) and ``P_e`` its
    mean probability. It is ``top_k`` when all experts are used alike, and larger otherwise.

    Args:
        logits: ``[T, E]`` router logits; the gradient flows through these.
        tokens_per_expert: ``[E]`` counts.

    Returns:
        A scalar in float32.
    """
    checks.is_tensor("logits", logits)
    checks.is_tensor("tokens_per_expert", tokens_per_expert)
    checks.has_shape("logits", logits, ("tokens", "experts"))
    num_experts = logits.shape[1]
    checks.has_shape("tokens_per_expert", tokens_per_expert, (num_experts,), "one count an expert")
    tokens = max(logits.shape[0], 1)
    probability = torch.softmax(logits.float(), dim=-1).sum(0) / tokens
    return num_experts * ((tokens_per_expert.float() / tokens) * probability).sum()


def aux_loss(model: nn.Module) -> Tensor:
    """The sum of the load-balancing losses of all MoE layers, from their latest forward pass in training mode.

    Add it to the training loss with a small coefficient, such as 0.01.

    Raises:
        ValueError: The model has no MoE layer, or one that has not run in training mode yet.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"model: got a {type(model).__name__} without any moekern.MoE layer, expected at least one")
    losses = []
    for name, layer in layers:
        routing = layer.latest_routing
        if routing is None:
            raise ValueError(
                f"model: layer {name or type(layer).__name__!r} has not run a forward pass in training mode; "
                "call model.train() and the model first"
            )
        losses.append(load_balancing_loss(routing.logits, routing.tokens_per_expert))
    return torch.stack(losses).sum()
