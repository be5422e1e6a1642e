"""Keeps the experts of a whole model evenly used: its layers' losses, and DeepSeek's bias without a loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekern.layer.moe import MoE
from moekern.layer.parameters import Router, inner, local
from moekern.layer.record import Routing
from moekern.routing.losses import check_group, load_balancing_loss, sequence_balancing_loss, z_loss
from moekern.verbs import checks, masks


def aux_loss(
    model: nn.Module,
    attention_mask: Tensor | None = None,
    *,
    balance: float = 1.0,
    z: float = 0.0,
    sequence: float = 0.0,
    group: Any = None,
) -> Tensor:
    """The sum of the routers' losses of all MoE layers, from their latest forward pass in training mode.

    Add it to the training loss with a small coefficient, such as 0.01. A layer keeps its latest forward pass only, so a
    recomputation under activation checkpointing does not count twice.

    Args:
        model: Anything that contains :class:`moekern.MoE` layers.
        attention_mask: Zero for padding tokens, which then do not count, besides those that the forward pass masked;
            of the shape of the layers' input without its last dimension, or one of the two in one dimension.
        balance: Coefficient of :func:`load_balancing_loss`.
        z: Coefficient of :func:`z_loss`.
        sequence: Coefficient of :func:`sequence_balancing_loss`; the last leading dimension of the layers' input is the
            sequence.
        group: See :func:`load_balancing_loss`.

    Returns:
        A scalar, on the device of the model's last layer.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind; the model has no MoE layer, or one that has not run in
            training mode yet, or ran without gradient.
    """
    for name, value in (("balance", balance), ("z", z), ("sequence", sequence)):
        checks.is_number(name, value, low=0)
    check_group(group)
    losses = []
    for name, layer in _layers(model):
        routing = layer.latest_routing
        if routing is None:
            raise ValueError(
                f"model: layer {name!r} has not run a forward pass in training mode; "
                "call model.train() and the model first"
            )
        learns = any(p.requires_grad for p in layer.gate.parameters())
        if torch.is_grad_enabled() and learns and not routing.logits.requires_grad:
            raise ValueError(
                f"model: layer {name!r} ran without gradient, so its loss would have none; "
                "checkpoint activations with use_reentrant=False, and do not run the model under torch.no_grad()"
            )
        losses.append(_layer_loss(layer, routing, attention_mask, balance, z, sequence, group))
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).sum()


def set_token_mask(model: nn.Module, mask: Tensor | None) -> None:
    """Tell all layers which tokens are padding, if the model does not pass them a mask (``mask`` of ``MoE.forward``).

    It holds for every pass in training mode, recomputations included, until it is set again; a layer whose input has
    another shape raises. So set it before each batch, or to None for batches without padding.

    Args:
        model: Contains :class:`moekern.MoE` layers.
        mask: Bool or integer, False or zero for padding, of the shape of the layers' input without its last dimension,
            and on its device, as an ``attention_mask`` usually is; None removes the mask.

    Raises:
        TypeError, ValueError: The model has no such layer, or the mask is not a bool or integer tensor.
    """
    if mask is not None:
        masks.truth("mask", mask)
    for _, layer in _layers(model):
        layer.__dict__["_token_mask"] = mask


def update_selection_bias(model: nn.Module, rate: float = 0.001, group: Any = None) -> None:
    """One step of DeepSeek's balancing without a loss (Wang et al. 2024): move the selection bias of every layer.

    The bias of experts that got more than the mean number of tokens since the latest step falls by ``rate``, so that
    they are chosen less; that of experts with fewer tokens rises. Call it once per optimiser step, after all forward
    passes of the step; or let :func:`bias_update_hook` do so.

    Args:
        model: Contains :class:`moekern.MoE` layers with ``selection_bias=True``.
        rate: The step.
        group: A torch.distributed process group over which the token counts are summed; None for this rank alone. Ranks
            that share weights must share the counts, or their biases drift apart.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind; the model has no such layer.
    """
    checks.is_number("rate", rate, low=0)
    check_group(group)
    with torch.no_grad():
        for gate in _gates_with_bias(model):
            gate.keep_bias_wide()
            bias, tokens = gate.e_score_correction_bias, gate.tokens_since_update
            assert bias is not None
            assert tokens is not None
            bias = local(bias)
            if group is not None:
                dist.all_reduce(tokens, group=group)
            counts = tokens.to(torch.float32)
            bias.add_(torch.sign(counts.mean() - counts), alpha=rate)
            tokens.zero_()


def bias_update_hook(
    optimizer: torch.optim.Optimizer, model: nn.Module, rate: float = 0.001, group: Any = None
) -> torch.utils.hooks.RemovableHandle:
    """Call :func:`update_selection_bias` after every step of the optimiser.

    Args:
        optimizer: A torch optimiser, or a wrapper that has one as ``.optimizer``, such as Accelerate's. A step that the
            wrapper skips moves no bias.
        model, rate, group: See :func:`update_selection_bias`.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: ``optimizer`` is not a torch optimiser, or another argument is of the wrong kind.
        ValueError: The model has no layer with a selection bias.
    """
    own = _unwrapped(optimizer)
    checks.is_number("rate", rate, low=0)
    check_group(group)
    _gates_with_bias(model)
    return own.register_step_post_hook(lambda *_: update_selection_bias(model, rate, group))


def _unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """The optimiser that takes the steps. Some wrappers are an Optimizer by class only, without its hooks."""
    own: Any = optimizer
    for _ in range(10):
        if isinstance(own, torch.optim.Optimizer) and hasattr(own, "_optimizer_step_post_hooks"):
            return own
        # A learning rate scheduler has an optimiser too, but its step is not the optimiser's.
        is_wrapper = hasattr(own, "step") and not hasattr(own, "get_last_lr")
        names = ("optimizer", "optim", "_optimizer") if is_wrapper else ()
        own = next((held for name in names if (held := getattr(own, name, None)) is not None), None)
    raise TypeError(
        f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer, or a wrapper that has one as "
        "`.optimizer`; pass the wrapped optimizer"
    )


def _layers(model: nn.Module) -> list[tuple[str, MoE]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    layers = [(name or "MoE", module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"model: got a {type(model).__name__} without any moekern.MoE layer, expected at least one")
    return layers


def _gates_with_bias(model: nn.Module) -> list[Router]:
    gates = [inner(layer.gate, Router) for _, layer in _layers(model)]
    gates = [gate for gate in gates if gate.e_score_correction_bias is not None]
    if not gates:
        raise ValueError("model: has no moekern.MoE layer with selection_bias=True")
    return gates


def _layer_loss(
    layer: MoE,
    routing: Routing,
    attention_mask: Tensor | None,
    balance: float,
    z: float,
    sequence: float,
    group: Any,
) -> Tensor:
    logits, counts, ids, shape, mask = routing
    if attention_mask is not None:
        given = masks.of_losses("attention_mask", attention_mask, shape).to(logits.device)
        mask = given if mask is None else mask & given
        if ids is not None:
            counts = masks.counts(ids, mask, logits.shape[1])
    loss = balance * load_balancing_loss(logits, counts, mask=mask, group=group)
    if z > 0:
        loss = loss + z * z_loss(logits, mask=mask)
    if sequence > 0:
        if ids is None:
            raise ValueError("sequence: got a coefficient above 0, but a layer routes by expert choice")
        length = shape[-1] if shape else 1
        rows = (logits.shape[0] // length if length else 0, length)
        loss = loss + sequence * sequence_balancing_loss(
            logits.unflatten(0, rows),
            ids.unflatten(0, rows),
            method=layer.routing,
            mask=None if mask is None else mask.unflatten(0, rows),
        )
    return loss
