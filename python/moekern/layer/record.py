"""The router's decisions in a training pass: kept for the losses, and counted for the selection bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekern.backends.observers import is_exporting
from moekern.layer.attributes import LayerAttributes
from moekern.layer.parameters import Router, inner
from moekern.verbs import masks, ops


class Routing(NamedTuple):
    """The router's decisions in one forward pass.

    Attributes:
        logits: ``[T, E]`` float32, part of the autograd graph.
        tokens_per_expert: ``[E]`` int32, before any are dropped, without those that were masked.
        topk_ids: ``[T, K]``, before any are dropped; None with expert choice.
        shape: Leading dimensions of the layer's input; the last one is the sequence.
        mask: Bool ``[T]``, False for padding, which no loss counts; None if the pass had no mask.
    """

    logits: Tensor
    tokens_per_expert: Tensor
    topk_ids: Tensor | None
    shape: tuple[int, ...]
    mask: Tensor | None = None


def record(layer: LayerAttributes, routing: Routing) -> None:
    """Keep the tensors that the losses need of a training pass; masked tokens are still in its counts."""
    if is_exporting():
        return
    ids, mask = routing.topk_ids, routing.mask
    if mask is not None and ids is not None:
        counts = masks.counts(ids, mask, layer.num_experts)
        # Not by _replace: the Dynamo of torch 2.11 cannot build what that returns.
        routing = Routing(routing.logits, counts, ids, routing.shape, mask)
    layer._latest_routing = routing
    counts, total = routing.tokens_per_expert, inner(layer.gate, Router).tokens_since_update
    if total is not None:
        if torch.compiler.is_compiling():
            total.add_(ops.unless_recomputing(counts))  # whether it is one is known only when the graph runs
        elif not ops.is_recomputing():
            total.add_(counts)
