"""The short way of a layer's eager inference: one program, but for the router's product where that is large.

A call whose signature has been accepted skips the layer's checks and runs choice, plan and experts at once, where the
backend has a program for that. Anything else takes the layer's own way, which gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from moekern.backends.call import Form, Weights
from moekern.functional.experts import check_experts
from moekern.layer.attributes import LayerAttributes
from moekern.layer.parameters import Experts, Router, is_ordinary
from moekern.routing import router
from moekern.verbs import direct, ops
from moekern.verbs.backend import resolve

_accepted = direct.Accepted()


def infer(layer: LayerAttributes, x: Tensor) -> Tensor | None:
    """The layer's output for ``[..., H]``, or None if the call must take the long way: it may be wrong, or unusual."""
    options = layer.options
    if (
        options.inference_key is None
        or layer._modules.get("shared_expert") is not None
        or torch.compiler.is_compiling()
    ):
        return None
    if not is_ordinary(layer._modules["experts"], Experts):
        return None
    gate, router_weight, router_bias, weights = parameters_of(layer)
    if torch.is_grad_enabled() and any(
        t is not None and getattr(t, "requires_grad", True) for t in (x, router_weight, router_bias, *weights)
    ):
        return None
    signature = direct.signature(x, router_weight, None, weights, options.activation, False, False, None)
    if signature is None:
        return None
    if gate._buffers.get("e_score_correction_bias") is not None:
        return None
    key = signature, options.inference_key, is_ordinary(gate, Router)
    call = _accepted.get(key)
    if call is None:
        call = _prepare(layer, x) or False
        _accepted.remember(key, call)
    if call is False:
        return None
    call, makes_logits = call
    tokens = x if x.ndim == 2 else x.view(-1, x.shape[-1])
    out: Tensor | None
    if makes_logits:
        if router_weight.is_neg() or (router_bias is not None and not fits(router_bias, router_weight)):
            return None
        out = call(tokens, router_weight, None, weights, router_bias)
        return out if out is None or x.ndim == 2 else out.view(x.shape)
    logits = gate(tokens)
    if logits.dtype != torch.float32 or not direct.plain(logits) or not logits.is_contiguous():  # a hook's doing
        return None
    out = call(tokens, logits, None, weights)
    return out if out is None or x.ndim == 2 else out.view(x.shape)


def parameters_of(layer: LayerAttributes) -> tuple[Any, Any, Any, Weights]:
    """The router, its weight and bias, and the projections of ordinary experts.

    Where they are plain parameters, around the attributes of nn.Module, which take several times as long.
    """
    modules = layer._modules
    gate, experts = modules["gate"], modules["experts"]
    assert gate is not None
    assert isinstance(experts, Experts)
    own, bias = experts._parameters, gate._parameters.get("bias")
    w_gate_up, w_down = own.get("gate_up_proj"), own.get("down_proj")
    b_gate_up, b_down = own.get("gate_up_proj_bias"), own.get("down_proj_bias")
    if b_gate_up is None or b_down is None:  # not there, or under another name
        b_gate_up, b_down = experts.gate_up_proj_bias, experts.down_proj_bias
    if type(w_gate_up) is Parameter and type(w_down) is Parameter:
        weights = Weights(w_gate_up, w_down, b_gate_up, b_down)
    else:
        weights = experts.projections
    weight = gate._parameters.get("weight")
    return gate, gate.weight if weight is None else weight, gate.bias if bias is None else bias, weights


def fits(bias: Tensor, weight: Tensor) -> bool:
    """Whether a router's bias is as the kernels read it."""
    return (
        direct.plain(bias)
        and bias.dtype == weight.dtype
        and bias.device == weight.device
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
    )


def _prepare(layer: LayerAttributes, x: Tensor) -> tuple[Callable[..., Tensor | None], bool] | None:
    """The program for calls like this one, and whether it makes the router's logits too.

    None if there is none, or if the call is one that is refused.
    """
    gate, weights, options = layer.gate, layer.experts.projections, layer.options
    weight = gate.weight
    if x.ndim < 1 or x.shape[-1] != options.hidden_size or x.dtype != weight.dtype or x.device != weight.device:
        return None
    tokens = x.view(-1, options.hidden_size)
    try:
        check_experts(tokens, weights, options.activation, False, False)
        module = ops.backend_module(resolve(x.device.type))
    except (TypeError, ValueError):
        return None
    if not hasattr(module, "prepare_inference") or weight.shape[0] != weights.w_gate_up.shape[0]:
        return None
    makes_logits = is_ordinary(gate, Router) and module.makes_logits(tokens, weight)
    routed_by = weight if makes_logits else torch.empty(tokens.shape[0], weight.shape[0], device=x.device)
    formula = (router.METHODS[options.routing], options.norm_topk_prob, options.routed_scaling_factor)
    form = Form(options.activation, False, False, options.top_k)
    program = module.prepare_inference(tokens, routed_by, None, weights, form, formula, makes_logits)
    return None if program is None else (program, makes_logits)
