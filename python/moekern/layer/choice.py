"""The routed part of a layer, step by step: the choice of experts, its limits, and the experts' computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern.backends.observers import is_exporting
from moekern.functional.plan import Plan, plan
from moekern.layer import fused_shared
from moekern.layer.attributes import LayerAttributes
from moekern.layer.parameters import Router, inner, whole
from moekern.layer.record import Routing, record
from moekern.routing import capacity, router
from moekern.routing.expert_choice import choose_any, choose_real, free_size, run_chosen
from moekern.routing.rounding import Rounded, rounded


def token_choice(
    layer: LayerAttributes, tokens: Tensor, logits: Tensor, shape: tuple[int, ...], mask: Tensor | None
) -> Tensor:
    """Every token chooses its experts.

    Args:
        layer: Its options, gate and experts are used.
        tokens: ``[T, H]``.
        logits: ``[T, E]``, of the layer's router.
        shape: Leading dimensions of the layer's input.
        mask: Bool ``[T]``, False for padding, or None.

    Returns:
        The routed part of the output, ``[T, H]``.
    """
    options = layer.options
    bias = inner(layer.gate, Router).e_score_correction_bias
    weights, ids = router.route(
        logits,
        options.top_k,
        method=options.routing,
        norm_topk_prob=options.norm_topk_prob,
        selection_bias=None if bias is None else whole(bias, "gate.e_score_correction_bias"),
        n_group=options.n_group,
        topk_group=options.topk_group,
        routed_scaling_factor=options.routed_scaling_factor,
    )
    if options.capacity_ratio is not None or (layer.training and options.round_tokens_to > 1):
        return _within_limits(layer, tokens, logits, ids, weights, shape, mask)
    experts, all_ids = options.num_experts + layer.num_fused_experts, ids
    if layer.num_fused_experts:
        all_ids, weights = _with_fused(layer, tokens, ids, weights)
        if not layer.training:  # planned with the experts, in one program if there is one
            return _run(layer, tokens, all_ids, weights)
    chosen = plan(all_ids, experts)
    if layer.training:
        counts = chosen.counts[: options.num_experts] if layer.num_fused_experts else chosen.counts
        record(layer, Routing(logits, counts, ids, shape, mask))
    return _run(layer, tokens, all_ids, weights, chosen)


def _within_limits(
    layer: LayerAttributes,
    tokens: Tensor,
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    shape: tuple[int, ...],
    mask: Tensor | None,
) -> Tensor:
    """The same if an expert's number of tokens has a limit, or must be a multiple."""
    options, all_tokens, chosen_ids = layer.options, tokens, ids
    multiple = options.round_tokens_to if layer.training else 1
    chosen = plan(ids, options.num_experts)
    if layer.training:
        record(layer, Routing(logits, chosen.counts, ids, shape, mask))
    if mask is not None:
        ids = torch.where(mask.unsqueeze(1), ids, -1)
        chosen = plan(ids, options.num_experts)
    limit: int | Tensor | None = None
    if options.capacity_ratio is not None:
        real: Any = ids.shape[0] if mask is None else mask.sum()
        limit = capacity.capacity_of_ratio(options.capacity_ratio, real, options.top_k, options.num_experts)
    added: Rounded | None = None
    if multiple > 1 and options.rounding != "down":
        scores = router.weights_of_all(
            logits, chosen_ids, options.routing, options.norm_topk_prob, options.routed_scaling_factor
        )
        added = rounded(chosen, scores, ids, weights, multiple, options.rounding, limit, options.drop_by, mask)
        tokens, ids, weights = added.extend(tokens, weights)
    else:
        ids = capacity.drop(chosen, ids, weights, limit, multiple, options.drop_by)
    if layer.num_fused_experts:
        ids, weights = _with_fused(layer, all_tokens, ids, weights)
    out = _run(layer, tokens, ids, weights, plan(ids, options.num_experts + layer.num_fused_experts))
    return out if added is None else added.fold(out)


def _with_fused(layer: LayerAttributes, tokens: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The choice ``[T, K]`` and its weights, with the fused experts appended, which every token takes."""
    gate = None if layer.shared_expert_gate is None else layer.shared_expert_gate(tokens)
    fused = range(layer.num_experts, layer.num_experts + layer.num_fused_experts)
    return fused_shared.chosen_by_all(ids, weights, fused, gate, ids.shape[0] - tokens.shape[0])


def _run(layer: LayerAttributes, tokens: Tensor, ids: Tensor, weights: Tensor, chosen: Plan | None = None) -> Tensor:
    """The experts' output ``[T, H]`` for chosen experts, with their plan if it is made already."""
    if not layer.options.scale_input:
        own_ids = ids if chosen is None else None
        return layer.experts(tokens, own_ids, weights, plan=chosen)  # type: ignore[no-any-return]
    # Each slot has an input of its own, so each becomes a token with one expert.
    scaled = (tokens.unsqueeze(1) * weights.unsqueeze(2).to(tokens.dtype)).flatten(0, 1)
    out: Tensor = layer.experts(scaled, ids.reshape(-1, 1), None)
    top_k = layer.options.top_k
    return out.unflatten(0, (-1, top_k)).sum(1) if top_k > 1 else out


def expert_choice(
    layer: LayerAttributes, tokens: Tensor, logits: Tensor, shape: tuple[int, ...], mask: Tensor | None
) -> Tensor:
    """Every expert chooses its tokens; arguments and result as of :func:`token_choice`."""
    top_k, num_experts = layer.options.top_k, layer.options.num_experts
    count = capacity.capacity_of(1.0, tokens.shape[0], top_k, num_experts)  # at most T, as K <= E
    if is_exporting():
        count = free_size(count, tokens.shape[0])
    counts = logits.new_full((num_experts,), count, dtype=torch.int32)
    if mask is None:
        weights, chosen = choose_any(logits, count)
    else:
        real = mask.sum()
        places = capacity.capacity_of(1.0, real, top_k, num_experts).minimum(real)
        weights, chosen = choose_real(logits, count, mask, places)
        counts = places.to(torch.int32).expand_as(counts)
    if layer.training:
        record(layer, Routing(logits, counts, None, shape, mask))
    if layer.options.routed_scaling_factor != 1:
        weights = weights * layer.options.routed_scaling_factor
    return run_chosen(tokens, weights, chosen, layer.experts)
